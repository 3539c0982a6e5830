# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel that walks the chunks of a sequence with the recurrent state in registers.

One thread block owns a few heads of one piece of one row. A producer warpgroup streams chunks of 64 tokens through
shared memory; a state warpgroup keeps the float32 states ``[P, N]`` of the heads as matrix-unit accumulators. In the
forward it hands their bfloat16 copies to one output warpgroup a head, so that state and outputs of different chunks
are computed at the same time.

Forward (``emit_y``), chunked SSD (Dao and Gu 2024, section 6): with ``a`` the within-chunk cumulative log2 decay and
``b = a - log2(dt)``,

    y_i   = exp2(a_i) C_i state^T + sum_{j<=i} (C_i . B_j) exp2(a_i - b_j) x_j + D x_i
    state = exp2(a_end) state + sum_j exp2(a_end - b_j) x_j B_j^T

Without ``emit_y`` only the state is walked, by one warpgroup a head; ``reverse`` walks it from the end of the sequence
with the weights ``exp2(a_i)``, which is the recurrence of the state's gradient (``x`` := dy, ``B`` := C).

Barriers: ``full`` and ``empty`` of each slot of the ring between the producer and everyone else; ``h_full`` and
``h_empty`` between the state's and the output warpgroups. No barrier is inserted automatically: every buffer has one
writer, and between two writes of one buffer all its readers have passed a barrier.
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
SHARED_BYTES = 220 * 1024  # shared memory the buffers may take
MOST_STAGES = 6


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
    has_init: bool = True  # else the start state is zero
    reverse: bool = False
    segments: bool = False
    has_d: bool = False
    dtype: jnp.dtype = jnp.bfloat16
    interpret: bool = False

    @property
    def block_heads(self) -> int:
        """Heads of a thread block; they share B and C."""
        pairs = (self.heads // self.groups) % 2 == 0
        return 2 if pairs and not (self.emit_y and self.state > 128) else 1

    @property
    def state_warpgroups(self) -> int:
        return 1 if self.emit_y else self.block_heads

    @property
    def warpgroups(self) -> int:
        """State and output warpgroups; the producer is one more."""
        return self.state_warpgroups + (self.block_heads if self.emit_y else 0)

    @property
    def stages(self) -> int:
        """Chunks in the ring of inputs: what fits."""
        tile, vector = 2 * TILE * TILE, 4 * TILE
        wide = 2 * TILE * self.state
        fixed = self.block_heads * (2 * tile + vector + (wide if self.emit_y or self.emit_states else 0))
        stage = self.block_heads * (tile + 2 * vector) + 4 * vector * self.segments + wide * (1 + self.emit_y)
        return min(MOST_STAGES, (SHARED_BYTES - fixed) // stage)

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


def _decayed_scores(cfg, scores, a_row, b_col, first):
    """M_ij = (C_i . B_j) exp2(a_i - b_j), zero unless first_i <= j <= i."""
    gate = jnp.exp2(_row(a_row, TILE) - _col(b_col, TILE))
    rows = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=plgpu.Layout.WGMMA)
    cols = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=plgpu.Layout.WGMMA)
    mask = rows >= cols
    if cfg.segments:
        mask = jnp.logical_and(mask, cols >= rows - _row(first, TILE))
    return jnp.where(mask, scores * gate, 0.0).astype(cfg.dtype)


def _update(cfg, states, heads, smem, slot, tiles):
    """States of ``heads`` after the chunk in ``slot``; ``tiles`` are scratch space, one a head."""
    scaled = []
    for state, lh, tile in zip(states, heads, tiles):
        a_end = smem["ab"][slot, lh, 0, TILE - 1]
        decay = jnp.exp2(a_end)
        if cfg.reverse:
            weight = jnp.exp2(plgpu.load(smem["ab"].at[slot, lh, 0], layout=ROW))
        else:
            weight = jnp.exp2(a_end - plgpu.load(smem["ab"].at[slot, lh, 1], layout=ROW))
        if cfg.segments:
            weight *= plgpu.load(smem["seg"].at[slot, 1 if cfg.reverse else 2], layout=ROW)
            decay *= smem["seg"][slot, 3, TILE - 1]
        x = plgpu.load(smem["x"].at[slot, lh], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        tile[...] = (x * _row(weight, TILE)).astype(cfg.dtype)
        scaled.append(state * decay)
    plgpu.commit_smem()
    b_ref = smem["b"].at[slot]
    if cfg.interpret:
        return tuple(matmul(t.T, b_ref, s.shape, s, True) for t, s in zip(tiles, scaled))

    def products(*accs):
        for tile, acc, state in zip(tiles, accs, scaled):
            acc[...] = state
            plgpu.wgmma(acc, tile.T, b_ref)
        return tuple(acc[...] for acc in accs)

    return pl.run_scoped(products, *[plgpu.ACC(s.shape, jnp.float32) for s in scaled])


def _walk_states(cfg, idx, final_g, states_g, init_g, smem, bars, w_idx):
    """Work of a state warpgroup: all heads of the block in the forward, else head ``w_idx``."""
    b, h0, piece, first, steps = idx
    local = tuple(range(cfg.block_heads)) if cfg.emit_y else (w_idx,)
    if cfg.has_init:
        start = [plgpu.load(init_g.at[b, piece, h0 + lh], layout=plgpu.Layout.WGMMA, optimized=False) for lh in local]
    else:
        zero = plgpu.layout_cast(jnp.zeros((TILE, cfg.state), jnp.float32), plgpu.Layout.WGMMA)
        start = [zero for _ in local]

    def share(i, chunk, states):
        """Puts the states into shared memory, for the outputs and for the copy out at every second chunk."""
        if cfg.emit_states:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if cfg.emit_y:

            @pl.when(i > 0)
            def _():
                plgpu.barrier_wait(bars["h_empty"].at[0])

        for lh, state in zip(local, states):
            smem["h"][lh] = state.astype(cfg.dtype)
        plgpu.commit_smem()
        if cfg.emit_y:
            plgpu.barrier_arrive(bars["h_full"].at[0])
        if cfg.emit_states:

            @pl.when(lax.rem(i, 2) == 0)
            def _():
                for lh in local:
                    plgpu.copy_smem_to_gmem(smem["h"].at[lh], states_g.at[b, lax.div(chunk, 2), h0 + lh])

    def step(i, states):
        slot = lax.rem(i, cfg.stages)
        chunk = first - i if cfg.reverse else first + i
        if cfg.emit_y:
            share(i, chunk, states)
        elif cfg.emit_states:

            @pl.when(lax.rem(i, 2) == 0)
            def _():
                share(i, chunk, states)

        plgpu.barrier_wait(bars["full"].at[slot])
        tiles = [smem["xw"].at[lh] if cfg.emit_y else smem["xw"].at[lax.rem(i, 2), lh] for lh in local]
        states = _update(cfg, states, local, smem, slot, tiles)
        plgpu.barrier_arrive(bars["empty"].at[slot])
        return states

    states = lax.fori_loop(0, steps, step, tuple(start))
    if cfg.emit_final:
        for lh, state in zip(local, states):
            final_g[b, piece, h0 + lh] = state
    if cfg.emit_y:

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_wait(bars["h_empty"].at[0])

    plgpu.wait_smem_to_gmem(0)


def _walk_outputs(cfg, idx, y_g, d_g, smem, bars, lh):
    """Work of an output warpgroup: y of head ``lh`` of the block."""
    b, h0, _, first, steps = idx
    x_s, ab_s, y_ref = smem["x"], smem["ab"], smem["y"].at[lh]

    def step(i, _):
        slot = lax.rem(i, cfg.stages)
        x_ref, c_ref = x_s.at[slot, lh], smem["c"].at[slot]
        plgpu.barrier_wait(bars["full"].at[slot])
        scores = matmul(c_ref, smem["b"].at[slot].T, (TILE, TILE), None, cfg.interpret)
        a_row = plgpu.load(ab_s.at[slot, lh, 0], layout=ROW)
        e_row, span = jnp.exp2(a_row), None
        if cfg.segments:
            e_row *= plgpu.load(smem["seg"].at[slot, 1], layout=ROW)
            span = plgpu.load(smem["seg"].at[slot, 0], layout=ROW)
        plgpu.barrier_wait(bars["h_full"].at[0])

        def mix():
            # Read here: layout inference does not end when this vector is read before the products start.
            b_col = plgpu.load(ab_s.at[slot, lh, 1], layout=COL)
            return _decayed_scores(cfg, scores, a_row, b_col, None if span is None else span.astype(jnp.int32))

        def inter(acc):
            plgpu.wgmma(acc, c_ref, smem["h"].at[lh].T)
            m = mix()
            return acc[...], m

        if cfg.interpret:
            y, m = matmul(c_ref, smem["h"].at[lh].T, (TILE, TILE), None, True), mix()
        else:
            y, m = pl.run_scoped(inter, plgpu.ACC((TILE, TILE), jnp.float32))
        plgpu.barrier_arrive(bars["h_empty"].at[0])
        y = matmul(m, x_ref, y.shape, y * _row(e_row, TILE), cfg.interpret)
        if cfg.has_d:
            x = plgpu.load(x_ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            skip = x * _col(plgpu.load(smem["d"].at[lh], layout=COL), TILE)
            y += jnp.where(_row(span, TILE) >= 0.0, skip, 0.0) if cfg.segments else skip
        plgpu.barrier_arrive(bars["empty"].at[slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        y_ref[...] = y.astype(cfg.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_ref, y_g.at[b, pl.ds((first + i) * TILE, TILE), h0 + lh])
        return None

    if cfg.has_d:
        plgpu.copy_gmem_to_smem(d_g.at[h0 + lh], smem["d"].at[lh], bars["d"].at[lh])
        plgpu.barrier_wait(bars["d"].at[lh])
    lax.fori_loop(0, steps, step, None)
    plgpu.wait_smem_to_gmem(0)


def _produce(cfg, idx, ins, smem, full, empty):
    x_g, ab_g, seg_g, b_g, c_g = ins
    x_s, ab_s, seg_s, b_s, c_s = (smem[name] for name in ("x", "ab", "seg", "b", "c"))
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
    init_g = next(it) if cfg.has_init else None
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

    s, hb, n = cfg.stages, cfg.block_heads, cfg.state
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    scratch = {
        "x": tile((s, hb, TILE, TILE)),
        "ab": plgpu.SMEM((s, hb, 2, TILE), jnp.float32),
        "seg": plgpu.SMEM((s, 4, TILE), jnp.float32) if cfg.segments else None,
        "b": tile((s, TILE, n)),
        "c": tile((s, TILE, n)) if cfg.emit_y else None,
        "h": tile((hb, TILE, n)) if cfg.emit_y or cfg.emit_states else None,
        "xw": tile((hb, TILE, TILE) if cfg.emit_y else (2, hb, TILE, TILE)),
        "y": tile((hb, TILE, TILE)) if cfg.emit_y else None,
        "d": plgpu.SMEM((hb, TILE), jnp.float32) if cfg.has_d else None,
    }
    barriers = {
        "full": plgpu.Barrier(num_arrivals=2 + cfg.emit_y + cfg.segments + hb, num_barriers=s),
        "empty": plgpu.Barrier(num_arrivals=cfg.warpgroups, num_barriers=s),
        "h_full": plgpu.Barrier(num_arrivals=1, num_barriers=1),
        "h_empty": plgpu.Barrier(num_arrivals=hb, num_barriers=1),
        "d": plgpu.Barrier(num_arrivals=1, num_barriers=hb),
    }
    state_wgs, most = cfg.state_warpgroups, _registers(cfg)

    def scoped(smem, bars):
        @pl.when(wg < state_wgs)
        def _():
            plgpu.set_max_registers(most[0], action="increase")
            _walk_states(cfg, idx, final_g, states_g, init_g, smem, bars, wg)

        if cfg.emit_y:

            @pl.when(jnp.logical_and(wg >= state_wgs, wg < cfg.warpgroups))
            def _():
                plgpu.set_max_registers(most[1], action="increase")
                _walk_outputs(cfg, idx, y_g, d_g, smem, bars, wg - state_wgs)

        @pl.when(wg == cfg.warpgroups)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            _produce(cfg, idx, (x_g, ab_g, seg_g, b_g, c_g), smem, bars["full"], bars["empty"])

    pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")


def _registers(cfg):
    """Registers a thread of the (state, output) warpgroups; the producer keeps 24 of its share."""
    if not cfg.emit_y or cfg.block_heads == 1:
        return 240, 240
    return 208, 136


def walk(cfg, x, ab, b_mat, c_mat, seg, d, init):
    """Run the walk; returns the list of outputs that ``cfg`` asks for: y, final states, states.

    x ``[B, T, H, 64]``; ab ``[B, chunks, H, 2, 64]``; b_mat, c_mat ``[B, T, G, N]``; seg ``[B, chunks, 4, 64]``;
    d ``[H, 64]``; init, final ``[B, pieces, H, 64, N]`` float32; states ``[B, chunks / 2, H, 64, N]``.
    """
    out = []
    if cfg.emit_y:
        out.append(jax.ShapeDtypeStruct(x.shape, cfg.dtype))
    if cfg.emit_final:
        out.append(jax.ShapeDtypeStruct((cfg.batch, cfg.pieces, cfg.heads, TILE, cfg.state), jnp.float32))
    if cfg.emit_states:
        out.append(jax.ShapeDtypeStruct((cfg.batch, cfg.chunks // 2, cfg.heads, TILE, cfg.state), cfg.dtype))
    args = [x, ab, b_mat, c_mat if cfg.emit_y else None, seg if cfg.segments else None, d if cfg.has_d else None]
    args.append(init if cfg.has_init else None)
    kernel = plgpu.kernel(
        functools.partial(_body, cfg),
        out_type=out,
        grid=(cfg.batch, cfg.pieces, cfg.heads // cfg.block_heads),
        grid_names=("batch", "piece", "heads"),
        num_threads=cfg.warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if cfg.interpret else None,
    )
    return kernel(*[a for a in args if a is not None])
