# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel that walks the chunks of a sequence with the recurrent state in registers.

One thread block owns a few heads of one piece of one row. A producer warpgroup streams chunks of 64 tokens through
shared memory; each compute warpgroup keeps the float32 states ``[P, N]`` of its heads as matrix-unit accumulators.

Forward (``emit_y``), chunked SSD (Dao and Gu 2024, section 6): with ``a`` the within-chunk cumulative log2 decay and
``b = a - log2(dt)``,

    y_i   = exp2(a_i) C_i state^T + sum_{j<=i} (C_i . B_j) exp2(a_i - b_j) x_j + D x_i
    state = exp2(a_end) state + sum_j exp2(a_end - b_j) x_j B_j^T

Without ``emit_y`` only the state is walked; ``reverse`` walks it from the end of the sequence with the weights
``exp2(a_i)``, which is the recurrence of the state's gradient (``x`` := dy, ``B`` := C).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # tokens a chunk, and head width of a tile
BF16_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Walk:
    """Static description of one walk kernel."""

    batch: int
    tokens: int
    heads: int
    groups: int
    state: int
    chunks: int  # chunks of TILE tokens, even
    pieces: int  # parts of the sequence walked in parallel
    emit_y: bool = False
    emit_states: bool = False  # bfloat16 state at the start (reverse: at the end) of every 2 * TILE tokens
    emit_final: bool = True
    reverse: bool = False
    segments: bool = False
    has_d: bool = False
    stages: int = 2
    dtype: jnp.dtype = jnp.bfloat16
    interpret: bool = False
    most_heads: int = 1  # heads of one compute warpgroup; two were slower (registers), see docs/kernels.md

    @property
    def warpgroups(self) -> int:
        return 2 if (self.heads // self.groups) % 2 == 0 else 1

    @property
    def heads_per_warpgroup(self) -> int:
        return self.most_heads if (self.heads // self.groups) % (2 * self.most_heads) == 0 else 1

    @property
    def block_heads(self) -> int:
        return self.warpgroups * self.heads_per_warpgroup

    @property
    def piece_chunks(self) -> int:
        return -(-self.chunks // (2 * self.pieces)) * 2


def matmul(a, b, shape, acc=None, interpret=False):
    """``acc + a @ b`` on the matrix unit, float32 ``[m, n]``; ``a`` an array or a shared-memory ref, ``b`` a ref.

    The interpreter knows neither left operands in registers nor initialised accumulators, so it gets a plain product.
    """

    def fresh(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    def onto(ref):
        plgpu.wgmma(ref, a, b)

    if interpret:
        left = a if isinstance(a, jax.Array) else a[...]
        out = jnp.dot(left, b[...], preferred_element_type=jnp.float32)
        return out if acc is None else acc + out
    if acc is not None:
        return pl.run_state(onto)(plgpu.ACC.init(acc))
    return pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32))


def _row(v, n):
    return lax.broadcast_in_dim(v, (v.shape[0], n), (0,))


def _col(v, m):
    return lax.broadcast_in_dim(v, (m, v.shape[0]), (1,))


ROW = plgpu.Layout.WGMMA.reduce(1)
COL = plgpu.Layout.WGMMA.reduce(0)


def _decayed_scores(cfg, scores, a_row, b_col, span):
    """M_ij = (C_i . B_j) exp2(a_i - b_j), zero unless i >= j in one document."""
    gate = jnp.exp2(_row(a_row, TILE) - _col(b_col, TILE))
    rows = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=plgpu.Layout.WGMMA)
    cols = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=plgpu.Layout.WGMMA)
    mask = rows >= cols
    if cfg.segments:
        mask = jnp.logical_and(mask, (rows - cols).astype(jnp.float32) <= _row(span, TILE))
    return jnp.where(mask, scores * gate, 0.0).astype(cfg.dtype)


def _head_step(cfg, w_idx, hh, state, scores, smem, slot, y_dst):
    """One chunk of one head: returns the new state; writes y over x in shared memory and starts its copy out."""
    x_s, ab_s, seg_s, b_s, c_s, h_s, xw_s, d_s = smem
    lh = w_idx * cfg.heads_per_warpgroup + hh
    x_ref, xw_ref = x_s.at[slot, lh], xw_s.at[w_idx]
    a_row = plgpu.load(ab_s.at[slot, lh, 0], layout=ROW)
    b_row = plgpu.load(ab_s.at[slot, lh, 1], layout=ROW)
    a_end = ab_s[slot, lh, 0, TILE - 1]
    decay = jnp.exp2(a_end)
    weight = jnp.exp2(a_row) if cfg.reverse else jnp.exp2(a_end - b_row)
    if cfg.segments:
        weight *= plgpu.load(seg_s.at[slot, 1 if cfg.reverse else 2], layout=ROW)
        decay *= seg_s[slot, 3, TILE - 1]
    x = plgpu.load(x_ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    xw_s[w_idx] = (x * _row(weight, TILE)).astype(cfg.dtype)
    plgpu.commit_smem()
    if not cfg.emit_y:
        return matmul(xw_ref.T, b_s.at[slot], state.shape, state * decay, cfg.interpret)

    e_row, span = jnp.exp2(a_row), None
    if cfg.segments:
        e_row *= plgpu.load(seg_s.at[slot, 1], layout=ROW)
        span = plgpu.load(seg_s.at[slot, 0], layout=ROW)

    def mix():
        # Read here: layout inference does not end when this vector is read before the products start.
        b_col = plgpu.load(ab_s.at[slot, lh, 1], layout=COL)
        return _decayed_scores(cfg, scores, a_row, b_col, span)

    def inter(acc):
        plgpu.wgmma(acc, c_s.at[slot], h_s.at[lh].T)
        m = mix()
        return acc[...], m

    if cfg.interpret:
        y, m = matmul(c_s.at[slot], h_s.at[lh].T, (TILE, TILE), None, True), mix()
    else:
        y, m = pl.run_scoped(inter, plgpu.ACC((TILE, TILE), jnp.float32))
    y = matmul(m, x_ref, y.shape, y * _row(e_row, TILE), cfg.interpret)
    state = matmul(xw_ref.T, b_s.at[slot], state.shape, state * decay, cfg.interpret)
    if cfg.has_d:
        x = plgpu.load(x_ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)  # again: cheaper than registers
        skip = x * _col(plgpu.load(d_s.at[lh], layout=COL), TILE)
        y += jnp.where(_row(span, TILE) >= 0.0, skip, 0.0) if cfg.segments else skip
    x_ref[...] = y.astype(cfg.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_ref, y_dst)
    return state


def _compute(cfg, idx, outs, init_g, d_g, smem, full, empty, d_bar, w_idx):
    x_s, ab_s, seg_s, b_s, c_s, h_s, xw_s, d_s = smem
    y_g, final_g, states_g = outs
    b, h0, piece, first, steps = idx
    hpw = cfg.heads_per_warpgroup
    head = lambda hh: h0 + w_idx * hpw + hh
    states = tuple(
        plgpu.load(init_g.at[b, piece, head(hh)], layout=plgpu.Layout.WGMMA, optimized=False) for hh in range(hpw)
    )

    def step(i, states):
        slot = lax.rem(i, cfg.stages)
        chunk = first - i if cfg.reverse else first + i
        if cfg.emit_y or cfg.emit_states:
            if cfg.emit_states:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for hh in range(hpw):
                h_s[w_idx * hpw + hh] = states[hh].astype(cfg.dtype)
            plgpu.commit_smem()
            if cfg.emit_states:

                @pl.when(lax.rem(i, 2) == 0)
                def _():
                    for hh in range(hpw):
                        plgpu.copy_smem_to_gmem(h_s.at[w_idx * hpw + hh], states_g.at[b, lax.div(chunk, 2), head(hh)])

        plgpu.barrier_wait(full.at[slot])
        scores = None
        if cfg.emit_y:
            scores = matmul(c_s.at[slot], b_s.at[slot].T, (TILE, TILE), None, cfg.interpret)
        new = []
        for hh in range(hpw):
            y_dst = y_g.at[b, pl.ds(chunk * TILE, TILE), head(hh)] if cfg.emit_y else None
            new.append(_head_step(cfg, w_idx, hh, states[hh], scores, smem, slot, y_dst))
        if cfg.emit_y:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(empty.at[slot])
        return tuple(new)

    if cfg.has_d:
        for hh in range(hpw):
            plgpu.copy_gmem_to_smem(d_g.at[head(hh)], d_s.at[w_idx * hpw + hh], d_bar.at[w_idx])
        plgpu.barrier_wait(d_bar.at[w_idx])
    states = lax.fori_loop(0, steps, step, states)
    if cfg.emit_final:
        for hh in range(hpw):
            final_g[b, piece, head(hh)] = states[hh]
    plgpu.wait_smem_to_gmem(0)


def _produce(cfg, idx, ins, smem, full, empty):
    x_g, ab_g, seg_g, b_g, c_g = ins
    x_s, ab_s, seg_s, b_s, c_s = smem[:5]
    b, h0, _, first, steps = idx
    group = lax.div(h0, cfg.heads // cfg.groups)

    def step(i, _):
        slot = lax.rem(i, cfg.stages)
        chunk = first - i if cfg.reverse else first + i
        rows = pl.ds(chunk * TILE, TILE)

        @pl.when(i >= cfg.stages)
        def _():
            plgpu.barrier_wait(empty.at[slot])

        bar = full.at[slot]
        plgpu.copy_gmem_to_smem(b_g.at[b, rows, group], b_s.at[slot], bar)
        if cfg.emit_y:
            plgpu.copy_gmem_to_smem(c_g.at[b, rows, group], c_s.at[slot], bar)
        plgpu.copy_gmem_to_smem(ab_g.at[b, chunk, pl.ds(h0, cfg.block_heads)], ab_s.at[slot], bar)
        if cfg.segments:
            plgpu.copy_gmem_to_smem(seg_g.at[b, chunk], seg_s.at[slot], bar)
        for lh in range(cfg.block_heads):
            plgpu.copy_gmem_to_smem(x_g.at[b, rows, h0 + lh], x_s.at[slot, lh], bar)
        return None

    lax.fori_loop(0, steps, step, None)
    for i in range(cfg.stages):  # leave no arrival unobserved

        @pl.when(steps + i >= cfg.stages)
        def _():
            plgpu.barrier_wait(empty.at[lax.rem(steps + i, cfg.stages)])


def _body(cfg, *refs):
    it = iter(refs)
    x_g, ab_g, b_g = next(it), next(it), next(it)
    c_g = next(it) if cfg.emit_y else None
    seg_g = next(it) if cfg.segments else None
    d_g = next(it) if cfg.has_d else None
    init_g = next(it)
    y_g = next(it) if cfg.emit_y else None
    final_g = next(it) if cfg.emit_final else None
    states_g = next(it) if cfg.emit_states else None

    wg = lax.axis_index("wg")
    piece = lax.axis_index("piece")
    b, h0 = lax.axis_index("batch"), lax.axis_index("heads") * cfg.block_heads
    begin = piece * cfg.piece_chunks
    steps = jnp.maximum(jnp.minimum(cfg.piece_chunks, cfg.chunks - begin), 0)
    first = begin + steps - 1 if cfg.reverse else begin
    idx = (b, h0, piece, first, steps)

    s, hb, n, wgs = cfg.stages, cfg.block_heads, cfg.state, cfg.warpgroups
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    scratch = [
        tile((s, hb, TILE, TILE)),
        plgpu.SMEM((s, hb, 2, TILE), jnp.float32),
        plgpu.SMEM((s, 4, TILE), jnp.float32) if cfg.segments else None,
        tile((s, TILE, n)),
        tile((s, TILE, n)) if cfg.emit_y else None,
        tile((hb, TILE, n)) if cfg.emit_y or cfg.emit_states else None,
        tile((wgs, TILE, TILE)),
        plgpu.SMEM((hb, TILE), jnp.float32) if cfg.has_d else None,
    ]
    arrivals = 2 + cfg.emit_y + cfg.segments + hb

    def scoped(smem, full, empty, d_bar):
        @pl.when(wg < wgs)
        def _():
            if wgs == 2:
                plgpu.set_max_registers(240, action="increase")
            _compute(cfg, idx, (y_g, final_g, states_g), init_g, d_g, smem, full, empty, d_bar, wg)

        @pl.when(wg == wgs)
        def _():
            if wgs == 2:
                plgpu.set_max_registers(24, action="decrease")
            _produce(cfg, idx, (x_g, ab_g, seg_g, b_g, c_g), smem, full, empty)

    pl.run_scoped(
        scoped,
        scratch,
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=s),
        plgpu.Barrier(num_arrivals=wgs, num_barriers=s),
        plgpu.Barrier(num_arrivals=cfg.heads_per_warpgroup, num_barriers=wgs),
        collective_axes="wg",
    )


def walk(cfg, x, ab, b_mat, c_mat, seg, d, init):
    """Run the walk; returns the list of outputs that ``cfg`` asks for: y, final states, states.

    x ``[B, T, H, 64]``; ab ``[B, chunks, H, 2, 64]``; b_mat, c_mat ``[B, T, G, N]``; seg ``[B, chunks, 4, 64]``;
    d ``[H, 64]``; init ``[B, pieces, H, 64, N]`` float32. final: like init; states ``[B, chunks / 2, H, 64, N]``.
    """
    out = []
    if cfg.emit_y:
        out.append(jax.ShapeDtypeStruct(x.shape, cfg.dtype))
    if cfg.emit_final:
        out.append(jax.ShapeDtypeStruct(init.shape, jnp.float32))
    if cfg.emit_states:
        out.append(jax.ShapeDtypeStruct((cfg.batch, cfg.chunks // 2, cfg.heads, TILE, cfg.state), cfg.dtype))
    args = [x, ab, b_mat, c_mat if cfg.emit_y else None, seg if cfg.segments else None, d if cfg.has_d else None, init]
    kernel = plgpu.kernel(
        functools.partial(_body, cfg),
        out_type=out,
        grid=(cfg.batch, cfg.pieces, cfg.heads // cfg.block_heads),
        grid_names=("batch", "piece", "heads"),
        num_threads=cfg.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if cfg.interpret else None,
    )
    return kernel(*[a for a in args if a is not None])
