# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of the SSD backward: all gradients of one tile of 64 tokens, given the chunk states.

A thread block owns the tile ``half`` of one span of 128 tokens and loops over the heads of a group, so that dB and dC
are summed over heads in registers. With ``h`` the state at the span's start, ``R`` the gradient of the state at its
end, ``L_ij = exp2(a_i - a_j)`` (zero unless i >= j in one document), ``e_i`` the decay from the span's start to i and
``u_j`` that from j to its end, it computes for the columns j and the rows i of its tile

    du_j = sum_i L_ij (C_i . B_j) dy_i + u_j R B_j          dx_j = dt_j du_j + D dy_j
    dB_j = sum_heads sum_i dS_ij C_i + dt_j u_j x_j R       dS_ij = dt_j L_ij (dy_i . x_j)
    dC_i = sum_heads sum_j dS_ij B_j + e_i dy_i h

and the per-token sums from which XLA forms ddt, dA and dD (``SCORE_VECTORS``, ``ROW_VECTORS``). Three compute
warpgroups share the work (scores and dx, dB, dC); a producer streams the heads' tiles through shared memory. Scores
are kept transposed ([j, i]), so that the second product takes its left operand from registers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ssd.gpu_walk import BF16_TRANSFORMS, COL, ROW, TILE, matmul

F32_TRANSFORMS = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
WGMMA = plgpu.Layout.WGMMA
# Per-token sums, Z_ij = (C_i . B_j) dS_ij; a row of Z is summed over j, a column over i.
SCORE_VECTORS = ("x.du", "x.du through the state", "columns of Z", "rows of Z in the tile")
ROW_VECTORS = ("dy.x", "rows of Z through the state")
PARTS = ("dB through the state", "dB within", "dC through the state", "dC within", "dC of the second half")


@dataclasses.dataclass(frozen=True)
class Grads:
    """Static description of the gradient kernel."""

    batch: int
    heads: int
    groups: int
    state: int
    chunks: int  # chunks of TILE tokens, even
    splits: int = 1  # parts of a group's heads visited by different thread blocks
    segments: bool = False
    has_d: bool = False
    stages: int = 2
    dtype: jnp.dtype = jnp.bfloat16
    interpret: bool = False

    @property
    def block_heads(self) -> int:
        return self.heads // (self.groups * self.splits)


def _rows(v, n=TILE):
    return lax.broadcast_in_dim(v, (v.shape[0], n), (0,))


def _cols(v, m=TILE):
    return lax.broadcast_in_dim(v, (m, v.shape[0]), (1,))


def _load(ref):
    return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)


class _Tokens:
    """Decays and masks of the tile ``half`` of one head, read from shared memory."""

    def __init__(self, cfg, smem, slot, half):
        self.cfg, self.half, self.ab, self.seg = cfg, half, smem["ab"].at[slot], smem["seg"]
        self.slot_ab = smem["ab"]
        self.slot = slot

    def a(self, layout=ROW, half=None):
        return plgpu.load(self.ab.at[self.half if half is None else half, 0], layout=layout)

    def dt(self):
        return jnp.exp2(self.a() - plgpu.load(self.ab.at[self.half, 1], layout=ROW))

    def end(self, half):
        return self.slot_ab[self.slot, half, 0, TILE - 1]

    def through(self, half):
        """Decay across one whole tile."""
        decay = jnp.exp2(self.end(half))
        return decay * self.seg[half, 3, TILE - 1] if self.cfg.segments else decay

    def mask(self, row, layout=ROW, half=None):
        return plgpu.load(self.seg.at[self.half if half is None else half, row], layout=layout)

    def to_end(self):
        """u_j: decay from token j to the end of the span."""
        u = jnp.exp2(self.end(self.half) - self.a())
        if self.cfg.segments:
            u *= self.mask(2)
        if self.half == 1:
            return u
        return u * self.through(1)

    def from_start(self):
        """e_i: decay from the start of the span to token i."""
        e = jnp.exp2(self.a())
        if self.cfg.segments:
            e *= self.mask(1)
        if self.half == 0:
            return e
        return e * self.through(0)


def _scores_head(cfg, k, carry, smem, slot):
    """Warpgroup 0, one head: du and the head's share of dS (transposed)."""
    tok = _Tokens(cfg, smem, slot, k)
    x_ref = smem["x"].at[slot]
    a_row, dt = tok.a(), tok.dt()
    u = tok.to_end()
    columns, z_rows = None, []
    du = matmul(smem["b"], smem["r"].at[slot].T, (TILE, TILE), None, cfg.interpret) * _rows(u)
    x = _load(x_ref)
    through_state = jnp.sum(x * du, axis=1)
    new = []
    for i in range(2 - k):
        dy_ref = (smem["dy"] if i == 0 else smem["dy1"]).at[slot]
        grad = matmul(x_ref, dy_ref.T, (TILE, TILE), None, cfg.interpret)
        if i == 0:
            gate = jnp.exp2(_cols(tok.a(COL)) - _rows(a_row))
            rows = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=WGMMA)
            cols = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=WGMMA)
            mask = rows <= cols
            if cfg.segments:
                mask = jnp.logical_and(mask, (cols - rows).astype(jnp.float32) <= _cols(tok.mask(0, COL)))
            gate = jnp.where(mask, gate, 0.0)
        else:
            gate = jnp.exp2(_cols(tok.a(COL, 1)) + (tok.end(0) - _rows(a_row)))
            if cfg.segments:
                gate *= _cols(tok.mask(1, COL, 1)) * _rows(tok.mask(2, ROW, 0))
        scores = plgpu.load(smem["scores"].at[i], layout=WGMMA)
        m = (scores * gate).astype(cfg.dtype)
        ds = gate * _rows(dt) * grad
        new.append(carry[i] + ds)
        z = ds * scores
        z_rows.append(jnp.sum(z, axis=0))
        columns = jnp.sum(z, axis=1) if i == 0 else columns + jnp.sum(z, axis=1)
        du = matmul(m, dy_ref, du.shape, du, cfg.interpret)
    total = jnp.sum(_load(x_ref) * du, axis=1)
    dx = du * _rows(dt)
    if cfg.has_d:
        skip = _load(smem["dy"].at[slot]) * _cols(plgpu.load(smem["d"].at[slot], layout=COL))
        dx += jnp.where(_rows(tok.mask(0)) >= 0.0, skip, 0.0) if cfg.segments else skip
    return tuple(new), dx, (total, through_state, columns), z_rows


def _scores_warpgroup(cfg, k, idx, outs, smem, full, empty):
    b, span, group, split, head0 = idx
    chunk = span * 2 + k
    part_g, cross_g = outs["parts"], outs["cross"]
    for i in range(2 - k):
        c_ref = smem["c1" if i else "c"]
        smem["scores"][i] = matmul(smem["b"], c_ref.T, (TILE, TILE), None, cfg.interpret)

    def step(i, carry):
        slot = lax.rem(i, cfg.stages)
        plgpu.barrier_wait(full.at[slot])
        carry, dx, own, z_rows = _scores_head(cfg, k, carry, smem, slot)
        plgpu.barrier_arrive(empty.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem["out"][...] = dx.astype(cfg.dtype)
        for row, v in enumerate((*own, z_rows[0])):
            smem["score_vectors"][row] = v
        if k == 0:
            smem["cross_rows"][...] = z_rows[1]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["out"], outs["dx"].at[b, pl.ds(chunk * TILE, TILE), head0 + i])
        plgpu.copy_smem_to_gmem(smem["score_vectors"], outs["score_vectors"].at[b, chunk, head0 + i])
        if k == 0:
            plgpu.copy_smem_to_gmem(smem["cross_rows"], outs["cross_rows"].at[b, span, head0 + i])
        return carry

    zero = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), WGMMA)
    carry = lax.fori_loop(0, cfg.block_heads, step, (zero,) * (2 - k))
    db = None
    for i in range(2 - k):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        ds = carry[i].astype(cfg.dtype)
        smem["out"][...] = ds
        plgpu.commit_smem()
        db = matmul(ds, smem["c1" if i else "c"], (TILE, cfg.state), db, cfg.interpret)
        dc = matmul(smem["out"].T, smem["b"], (TILE, cfg.state), None, cfg.interpret)
        if i == 0:
            part_g[3, b, split, chunk, group] = dc
        else:
            cross_g[b, split, span, group] = dc
    part_g[1, b, split, chunk, group] = db
    plgpu.wait_smem_to_gmem(0)


def _db_warpgroup(cfg, k, idx, outs, smem, full, empty):
    part_g = outs["parts"]
    b, span, group, split, head0 = idx

    def step(i, acc):
        slot = lax.rem(i, cfg.stages)
        plgpu.barrier_wait(full.at[slot])
        tok = _Tokens(cfg, smem, slot, k)
        weight = tok.to_end() * tok.dt()
        xw = (_load(smem["x"].at[slot]) * _rows(weight)).astype(cfg.dtype)
        acc = matmul(xw, smem["r"].at[slot], acc.shape, acc, cfg.interpret)

        if k == 1:
            rh = None
            for n in range(0, cfg.state, TILE):
                cut = (slot, slice(None), pl.ds(n, TILE))
                part = jnp.sum(_load(smem["r"].at[cut]) * _load(smem["h"].at[cut]), axis=1)
                rh = part if rh is None else rh + part
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem["state_rows"][...] = rh * (tok.through(0) * tok.through(1))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["state_rows"], outs["state_rows"].at[b, span, head0 + i])

        plgpu.barrier_arrive(empty.at[slot])
        return acc

    zero = plgpu.layout_cast(jnp.zeros((TILE, cfg.state), jnp.float32), WGMMA)
    part_g[0, b, split, span * 2 + k, group] = lax.fori_loop(0, cfg.block_heads, step, zero)
    plgpu.wait_smem_to_gmem(0)


def _dc_warpgroup(cfg, k, idx, outs, smem, full, empty):
    part_g = outs["parts"]
    b, span, group, split, head0 = idx

    def step(i, acc):
        slot = lax.rem(i, cfg.stages)
        plgpu.barrier_wait(full.at[slot])
        tok = _Tokens(cfg, smem, slot, k)
        dy = _load(smem["dy"].at[slot])
        e = tok.from_start()
        inter = matmul(smem["c"], smem["h"].at[slot].T, (TILE, TILE), None, cfg.interpret)
        rows = jnp.sum(dy * inter, axis=1) * e
        acc = matmul((dy * _rows(e)).astype(cfg.dtype), smem["h"].at[slot], acc.shape, acc, cfg.interpret)
        skip = jnp.sum(dy * _load(smem["x"].at[slot]), axis=1)
        plgpu.barrier_arrive(empty.at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem["row_vectors"][0] = skip
        smem["row_vectors"][1] = rows
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem["row_vectors"], outs["row_vectors"].at[b, span * 2 + k, head0 + i])
        return acc

    zero = plgpu.layout_cast(jnp.zeros((TILE, cfg.state), jnp.float32), WGMMA)
    part_g[2, b, split, span * 2 + k, group] = lax.fori_loop(0, cfg.block_heads, step, zero)
    plgpu.wait_smem_to_gmem(0)


def _produce(cfg, k, idx, ins, smem, full, empty):
    b, span, _, _, head0 = idx
    own = pl.ds((span * 2 + k) * TILE, TILE)
    second = pl.ds((span * 2 + 1) * TILE, TILE)

    def step(i, _):
        slot = lax.rem(i, cfg.stages)

        @pl.when(i >= cfg.stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        bar, head = full.at[slot], head0 + i
        plgpu.copy_gmem_to_smem(ins["ab"].at[b, pl.ds(span * 2, 2), head], smem["ab"].at[slot], bar)
        plgpu.copy_gmem_to_smem(ins["r"].at[b, span, head], smem["r"].at[slot], bar)
        plgpu.copy_gmem_to_smem(ins["x"].at[b, own, head], smem["x"].at[slot], bar)
        plgpu.copy_gmem_to_smem(ins["dy"].at[b, own, head], smem["dy"].at[slot], bar)
        plgpu.copy_gmem_to_smem(ins["dy"].at[b, second, head], smem["dy1"].at[slot], bar)
        plgpu.copy_gmem_to_smem(ins["h"].at[b, span, head], smem["h"].at[slot], bar)
        if cfg.has_d:
            plgpu.copy_gmem_to_smem(ins["d"].at[head], smem["d"].at[slot], bar)
        return None

    lax.fori_loop(0, cfg.block_heads, step, None)
    for i in range(min(cfg.stages, cfg.block_heads)):
        last = cfg.block_heads - min(cfg.stages, cfg.block_heads) + i
        plgpu.barrier_wait(empty.at[last % cfg.stages])


def _schedule(cfg, block):
    """(half, index of the span) of a thread block.

    First tiles of a span take longer. The first half of the blocks runs both tiles of a span side by side, so that they
    share the states through the cache; the other half runs all first tiles before all second ones, which evens out
    the device's load.
    """
    spans = cfg.batch * cfg.groups * cfg.splits * (cfg.chunks // 2)
    paired = spans // 2
    rest = block - 2 * paired
    alone = spans - paired
    first = block < 2 * paired
    half = jnp.where(first, lax.rem(block, 2), lax.div(jnp.maximum(rest, 0), alone))
    span = jnp.where(first, lax.div(block, 2), paired + lax.rem(jnp.maximum(rest, 0), alone))
    return half, span


def _outputs(cfg):
    """Shapes of the kernel's outputs by name."""
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens, spans = (cfg.batch, cfg.chunks, cfg.heads), (cfg.batch, cfg.chunks // 2, cfg.heads)
    return {
        "score_vectors": f32((*tokens, len(SCORE_VECTORS), TILE)),
        "row_vectors": f32((*tokens, len(ROW_VECTORS), TILE)),
        "cross_rows": f32((*spans, TILE)),  # rows of Z of the second tile over columns of the first
        "state_rows": f32((*spans, TILE)),  # <R, h> by row of the states, decayed over the span
        "parts": f32((4, cfg.batch, cfg.splits, cfg.chunks, cfg.groups, TILE, cfg.state)),
        "cross": f32((cfg.batch, cfg.splits, cfg.chunks // 2, cfg.groups, TILE, cfg.state)),
        "dx": None,
    }


def _body(cfg, *refs):
    names = ["x", "dy", "ab", "b", "c", "h", "r"] + ["seg"] * cfg.segments + ["d"] * cfg.has_d
    ins, outs = dict(zip(names, refs)), dict(zip(_outputs(cfg), refs[len(names) :]))
    wg = lax.axis_index("wg")
    k, tile_index = _schedule(cfg, lax.axis_index("block"))
    rest, span = lax.div(tile_index, cfg.chunks // 2), lax.rem(tile_index, cfg.chunks // 2)
    b, rest = lax.div(rest, cfg.groups * cfg.splits), lax.rem(rest, cfg.groups * cfg.splits)
    idx = (b, span, lax.div(rest, cfg.splits), lax.rem(rest, cfg.splits), rest * cfg.block_heads)
    group = idx[2]

    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    s, n = cfg.stages, cfg.state
    scratch = {
        "x": tile((s, TILE, TILE)),
        "dy": tile((s, TILE, TILE)),
        "dy1": tile((s, TILE, TILE)),
        "h": tile((s, TILE, n)),
        "r": tile((s, TILE, n)),
        "ab": plgpu.SMEM((s, 2, 2, TILE), jnp.float32),
        "d": plgpu.SMEM((s, TILE), jnp.float32) if cfg.has_d else None,
        "b": tile((TILE, n)),
        "c": tile((TILE, n)),
        "c1": tile((TILE, n)),
        "out": tile((TILE, TILE)),
        "seg": plgpu.SMEM((2, 4, TILE), jnp.float32) if cfg.segments else None,
        "scores": plgpu.SMEM((2, TILE, TILE), jnp.float32, transforms=F32_TRANSFORMS),
        "score_vectors": plgpu.SMEM((len(SCORE_VECTORS), TILE), jnp.float32),
        "row_vectors": plgpu.SMEM((len(ROW_VECTORS), TILE), jnp.float32),
        "cross_rows": plgpu.SMEM((TILE,), jnp.float32),
        "state_rows": plgpu.SMEM((TILE,), jnp.float32),
    }

    def scoped(smem, full, empty, start):
        @pl.when(wg == 3)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            bar = start.at[0]
            plgpu.copy_gmem_to_smem(ins["b"].at[b, pl.ds((span * 2 + k) * TILE, TILE), group], smem["b"], bar)
            for name, chunk in (("c", span * 2 + k), ("c1", span * 2 + 1)):
                plgpu.copy_gmem_to_smem(ins["c"].at[b, pl.ds(chunk * TILE, TILE), group], smem[name], bar)
            if cfg.segments:
                plgpu.copy_gmem_to_smem(ins["seg"].at[b, pl.ds(span * 2, 2)], smem["seg"], bar)
            _produce(cfg, k, idx, ins, smem, full, empty)

        @pl.when(wg == 0)
        def _():
            plgpu.set_max_registers(240, action="increase")
            plgpu.barrier_wait(start.at[0])
            for half in range(2):

                @pl.when(k == half)
                def _():
                    _scores_warpgroup(cfg, half, idx, outs, smem, full, empty)

        for number, work in ((1, _db_warpgroup), (2, _dc_warpgroup)):

            @pl.when(wg == number)
            def _():
                plgpu.set_max_registers(120, action="decrease")
                plgpu.barrier_wait(start.at[0])
                for half in range(2):

                    @pl.when(k == half)
                    def _():
                        work(cfg, half, idx, outs, smem, full, empty)

    pl.run_scoped(
        scoped,
        scratch,
        plgpu.Barrier(num_arrivals=6 + cfg.has_d, num_barriers=s),
        plgpu.Barrier(num_arrivals=3, num_barriers=s),
        plgpu.Barrier(num_arrivals=3 + cfg.segments, num_barriers=1),
        collective_axes="wg",
    )


def grads(cfg, x, dy, ab, b_mat, c_mat, h, r, seg, d):
    """All gradients by name, see ``_outputs``; ``dx`` is ``[B, T, H, 64]``, "parts" and "cross" are the ``PARTS``.

    h and r ``[B, chunks / 2, H, 64, N]``: the state at the start of each span and the gradient of that at its end.
    """
    out = _outputs(cfg) | {"dx": jax.ShapeDtypeStruct(x.shape, cfg.dtype)}
    kernel = plgpu.kernel(
        functools.partial(_body, cfg),
        out_type=list(out.values()),
        grid=(cfg.batch * cfg.groups * cfg.splits * cfg.chunks,),
        grid_names=("block",),
        num_threads=4,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=8192),
        interpret=plgpu.InterpretGPUParams() if cfg.interpret else None,
    )
    args = [x, dy, ab, b_mat, c_mat, h, r] + ([seg] if cfg.segments else []) + ([d] if cfg.has_d else [])
    return dict(zip(out, kernel(*args)))
