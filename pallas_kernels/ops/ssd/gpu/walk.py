# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel that walks the chunks of a sequence with the recurrent state in registers.

One thread block owns a few heads of one piece of one row. A producer warpgroup streams chunks of 64 tokens through
shared memory. One warpgroup a head keeps the float32 state ``[P, N]`` as matrix-unit accumulators and forms y
transposed, ``[P, tokens]``, so that its left operands (state, x) come from registers. In the forward one more
warpgroup forms the decayed scores of all heads of the block, ahead of their use.

Forward (``emit_y``), chunked SSD (Dao and Gu 2024, section 6): with ``a`` the within-chunk cumulative log2 decay and
``b = a - log2(dt)``,

    y_i   = exp2(a_i) C_i state^T + sum_{j<=i} (C_i . B_j) exp2(a_i - b_j) x_j + D x_i
    state = exp2(a_end) state + sum_j exp2(a_end - b_j) x_j B_j^T

Without ``emit_y`` only the state is walked; ``reverse`` walks it from the end of the sequence with the weights
``exp2(a_i)``, which is the recurrence of the state's gradient (``x`` := dy, ``B`` := C). Documents are in the decays
(``gpu_decay``).

Barriers: ``full`` and ``empty`` of each slot of the ring between the producer and everyone else; ``m_full`` and
``m_empty`` between the scores' and the state warpgroups. y overwrites x, so a slot is given back one chunk later. No
barrier is inserted automatically: between two writes of one buffer all its readers have passed a barrier.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import (
    BF16_TRANSFORMS,
    COL,
    F32,
    LANE_PARAMS,
    PARAMS,
    ROW,
    TILE,
    WGMMA,
    accumulate,
    clear_rows,
    cols_of,
    keep_upper,
    matmul,
    named_body,
    rows_of,
    sums_of,
    zeros,
)
from pallas_kernels.varying import call_varying

# A chunk is TILE tokens, a head TILE channels wide.
SHARED_BYTES = 220 * 1024  # shared memory the buffers may take
MOST_STAGES = 6
LARGEST = 100.0  # log2 of the largest weight of a pair; a larger one belongs to a score that is zero
PRODUCER_REGISTERS = 24  # of a thread
TILE_BYTES = 2 * TILE * TILE


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
    alone: int = 0  # so many tokens side by side read nothing of themselves and each other; 0: all do
    begin: int = 0  # the first chunk of the first piece; what stands before it is not walked
    size: int = 0  # chunks of a piece; 0: as pieces cut all
    most_heads: int = 2  # of a thread block
    dtype: jnp.dtype = jnp.bfloat16

    @property
    def block_heads(self) -> int:
        """Heads of a thread block, one a state warpgroup; they share B and C."""
        pairs = (self.heads // self.groups) % 2 == 0
        return 2 if pairs and self.most_heads > 1 and not (self.emit_y and self.state > 128) else 1

    @property
    def warpgroups(self) -> int:
        """State and scores warpgroups; the producer is one more."""
        return self.block_heads + self.emit_y

    @property
    def stages(self) -> int:
        """Chunks in the ring of inputs: what fits beside the copies of states and one set of scores."""
        return min(MOST_STAGES, self._free_bytes // self._stage_bytes)

    @property
    def score_stages(self) -> int:
        return 2 if self._free_bytes - self.stages * self._stage_bytes >= self.block_heads * TILE_BYTES else 1

    @property
    def state_in_memory(self) -> bool:
        """Whether the products with C read the state from shared memory: large ones leave no registers for a copy.

        y has a buffer of its own then: the ring is short, its slots are given back as soon as possible.
        """
        return self.emit_y and self.state > 128

    @property
    def _stage_bytes(self) -> int:
        vectors = 4 * TILE * (2 * self.block_heads + self.segments)
        return self.block_heads * TILE_BYTES + vectors + 2 * TILE * self.state * (1 + self.emit_y)

    @property
    def _free_bytes(self) -> int:
        copies = 2 * TILE * self.state if self.emit_states or self.state_in_memory else 0
        return SHARED_BYTES - self.block_heads * (copies + TILE_BYTES * (self.emit_y + self.state_in_memory))

    @property
    def piece_chunks(self) -> int:
        return self.size or -(-self.chunks // (2 * self.pieces)) * 2


def _clear_padding(cfg, smem, slot, *tiles):
    """Zeros on the padding of tiles ``[64 tokens, n]`` of a chunk, which may hold anything; rare, and costs a branch.

    Every warpgroup does so before it reads them: they write the same values.
    """
    if not cfg.segments:
        return

    @pl.when(smem["real"][slot, 0] < 1.5)
    def _():
        real = rows_of(plgpu.load(smem["real"].at[slot], layout=ROW), TILE) > 0.0
        for tile in tiles:
            clear_rows(tile, real, cfg.dtype)
        plgpu.commit_smem()


def _decayed(cfg, scores, a_col, b_row):
    """scores_ji exp2(a_i - b_j), bounded so that no infinity meets a score of zero."""
    gate = jnp.exp2(jnp.minimum(cols_of(a_col, TILE) - rows_of(b_row, TILE), LARGEST))
    return (scores * gate).astype(cfg.dtype)


def _walk_scores(cfg, idx, smem, bars):
    """Work of the scores' warpgroup: decayed scores of all heads of the block, in bfloat16.

    The product of the next chunk runs while the last head of a chunk is worked on.
    """
    steps = idx[-1]

    def publish(i, slot, scores, lh):
        ring = lax.rem(i, cfg.score_stages)
        a_col = plgpu.load(smem["ab"].at[slot, lh, 0], layout=COL)
        b_row = plgpu.load(smem["ab"].at[slot, lh, 1], layout=ROW)
        m = _decayed(cfg, scores, a_col, b_row)

        @pl.when(i >= cfg.score_stages)
        def _():
            plgpu.barrier_wait(bars["m_empty"].at[ring, lh])

        smem["m"][ring, lh] = m
        plgpu.commit_smem()
        plgpu.barrier_arrive(bars["m_full"].at[ring, lh])

    def step(i, scores):
        slot, after = lax.rem(i, cfg.stages), lax.rem(i + 1, cfg.stages)
        last = cfg.block_heads - 1
        for lh in range(last):
            publish(i, slot, scores, lh)

        @pl.when(i + 1 < steps)
        def _():
            plgpu.barrier_wait(bars["full"].at[after])
            _clear_padding(cfg, smem, after, smem["b"].at[after], smem["c"].at[after])

        def ahead(acc):  # of an old slot, unused, at the last chunk
            plgpu.wgmma(acc, smem["b"].at[after], smem["c"].at[after].T)
            publish(i, slot, scores, last)
            plgpu.barrier_arrive(bars["empty"].at[slot])
            return acc[...]

        return keep_upper(accumulate(ahead, TILE), cfg.alone)

    @pl.when(steps > 0)
    def _():
        plgpu.barrier_wait(bars["full"].at[0])
        _clear_padding(cfg, smem, 0, smem["b"].at[0], smem["c"].at[0])
        out = matmul(smem["b"].at[0], smem["c"].at[0].T)
        lax.fori_loop(0, steps, step, keep_upper(out, cfg.alone))

    for i in range(cfg.score_stages):  # leave no arrival unobserved

        @pl.when(steps + i >= cfg.score_stages)
        def _():
            for lh in range(cfg.block_heads):
                plgpu.barrier_wait(bars["m_empty"].at[lax.rem(steps + i, cfg.score_stages), lh])


def _head_step(cfg, state, smem, bars, i, lh, d, release, y_dst):
    """One chunk of one head: returns the new state; y overwrites x and its copy out is started."""
    slot = lax.rem(i, cfg.stages)
    ab, x_ref = smem["ab"], smem["x"].at[slot, lh]
    a_end = ab[slot, lh, 0, TILE - 1]
    decay = jnp.exp2(a_end)

    def weighted(x):
        if cfg.reverse:
            weight = jnp.exp2(plgpu.load(ab.at[slot, lh, 0], layout=COL))
        else:
            weight = jnp.exp2(a_end - plgpu.load(ab.at[slot, lh, 1], layout=COL))
        return (x.astype(F32) * cols_of(weight, TILE)).astype(cfg.dtype)

    def transposed():
        return plgpu.load(x_ref.T, layout=WGMMA)

    b_ref, y_ref = smem["b"].at[slot], smem["y"].at[lh] if cfg.state_in_memory else x_ref
    if not cfg.emit_y:
        return matmul(weighted(transposed()), b_ref, state * decay)

    c_ref = smem["c"].at[slot]
    h = smem["h"].at[lh] if cfg.state_in_memory else state.astype(cfg.dtype)

    def inter(acc):
        plgpu.wgmma(acc, h, c_ref.T)
        x = transposed()
        return acc[...], x

    y, x = accumulate(inter, TILE)
    xw = weighted(x)
    e_col = jnp.exp2(plgpu.load(ab.at[slot, lh, 0], layout=COL))
    y *= cols_of(e_col, TILE)
    if cfg.has_d:
        y += x.astype(F32) * (rows_of(plgpu.load(smem["d"].at[lh], layout=ROW), TILE) if d is None else d)
    release()
    ring = lax.rem(i, cfg.score_stages)
    m_ref = smem["m"].at[ring, lh]
    plgpu.barrier_wait(bars["m_full"].at[ring, lh])

    def products(y_acc, state_acc):
        y_acc[...] = y
        state_acc[...] = state * decay
        plgpu.wgmma(y_acc, x, m_ref)
        plgpu.wgmma(state_acc, xw, b_ref)
        out = plgpu.layout_cast(sums_of(y_acc, 1), WGMMA)
        plgpu.barrier_arrive(bars["m_empty"].at[ring, lh])
        y_ref.T[...] = out.astype(cfg.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_ref, y_dst)
        return state_acc[...]

    return accumulate(products, TILE, cfg.state)


def _walk_states(cfg, idx, outs, init_g, d_g, smem, bars, lh):
    """Work of a state warpgroup: head ``lh`` of the block."""
    y_g, final_g, states_g = outs
    b, h0, piece, first, steps = idx
    head = h0 + lh
    start = plgpu.load(init_g.at[b, piece, head], layout=WGMMA, optimized=False) if cfg.has_init else zeros(cfg.state)

    def step(i, state):
        slot = lax.rem(i, cfg.stages)
        chunk = first - i if cfg.reverse else first + i
        if cfg.state_in_memory:
            smem["h"][lh] = state.astype(cfg.dtype)
            plgpu.commit_smem()
        if cfg.emit_states:

            @pl.when(lax.rem(i, 2) == 0)
            def _():
                if not cfg.emit_y:  # else waited for at the last chunk
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if not cfg.state_in_memory:
                    smem["h"][lh] = state.astype(cfg.dtype)
                    plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem["h"].at[lh], states_g.at[b, lax.div(chunk, 2), head])

        plgpu.barrier_wait(bars["full"].at[slot])
        tiles = [smem["x"].at[slot, lh], smem["b"].at[slot]] + ([smem["c"].at[slot]] if cfg.emit_y else [])
        _clear_padding(cfg, smem, slot, *tiles)

        def release():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier of the warpgroup, too: all have read x
            if not cfg.state_in_memory:

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_arrive(bars["empty"].at[lax.rem(i + cfg.stages - 1, cfg.stages)])

        y_dst = y_g.at[b, pl.ds(chunk * TILE, TILE), head] if cfg.emit_y else None
        state = _head_step(cfg, state, smem, bars, i, lh, d, release, y_dst)
        if not cfg.emit_y or cfg.state_in_memory:
            plgpu.barrier_arrive(bars["empty"].at[slot])
        return state

    d = None
    if cfg.has_d and len(d_g.shape) == 1:
        d = d_g[head]
    elif cfg.has_d:
        plgpu.copy_gmem_to_smem(d_g.at[head], smem["d"].at[lh], bars["d"].at[lh])
        plgpu.barrier_wait(bars["d"].at[lh])
    state = lax.fori_loop(0, steps, step, start)
    if cfg.emit_final:
        final_g[b, piece, head] = state
    plgpu.wait_smem_to_gmem(0)
    if cfg.emit_y and not cfg.state_in_memory:

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_arrive(bars["empty"].at[lax.rem(steps + cfg.stages - 1, cfg.stages)])


def _produce(cfg, idx, ins, smem, full, empty):
    x_g, ab_g, real_g, b_g, c_g = ins
    x_s, ab_s, real_s, b_s, c_s = (smem[name] for name in ("x", "ab", "real", "b", "c"))
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
            plgpu.copy_gmem_to_smem(real_g.at[b, chunk], real_s.at[slot], bar)
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
    real_g = next(it) if cfg.segments else None
    d_g = next(it) if cfg.has_d else None
    init_g = next(it) if cfg.has_init else None
    y_g = next(it) if cfg.emit_y else None
    final_g = next(it) if cfg.emit_final else None
    states_g = next(it) if cfg.emit_states else None

    wg = lax.axis_index("wg")
    piece = lax.axis_index("piece")
    b, h0 = lax.axis_index("batch"), lax.axis_index("heads") * cfg.block_heads
    begin = cfg.begin + piece * cfg.piece_chunks
    steps = jnp.maximum(jnp.minimum(cfg.piece_chunks, cfg.chunks - begin), 0)
    first = begin + steps - 1 if cfg.reverse else begin
    idx = (b, h0, piece, first, steps)

    s, hb, n = cfg.stages, cfg.block_heads, cfg.state
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    scratch = {
        "x": tile((s, hb, TILE, TILE)),
        "ab": plgpu.SMEM((s, hb, 2, TILE), F32),
        "real": plgpu.SMEM((s, TILE), F32) if cfg.segments else None,
        "b": tile((s, TILE, n)),
        "c": tile((s, TILE, n)) if cfg.emit_y else None,
        "h": tile((hb, TILE, n)) if cfg.emit_states or cfg.state_in_memory else None,
        "y": tile((hb, TILE, TILE)) if cfg.state_in_memory else None,
        "m": tile((cfg.score_stages, hb, TILE, TILE)) if cfg.emit_y else None,
        "d": plgpu.SMEM((hb, TILE), F32) if cfg.has_d else None,
    }
    ring = (cfg.score_stages, hb)
    barriers = {
        "full": plgpu.Barrier(num_arrivals=2 + cfg.emit_y + cfg.segments + hb, num_barriers=s),
        "empty": plgpu.Barrier(num_arrivals=cfg.warpgroups, num_barriers=s),
        "m_full": plgpu.Barrier(num_arrivals=1, num_barriers=ring),
        "m_empty": plgpu.Barrier(num_arrivals=1, num_barriers=ring),
        "d": plgpu.Barrier(num_arrivals=1, num_barriers=hb),
    }
    most = _registers(cfg)

    def scoped(smem, bars):
        @pl.when(wg < hb)
        def _():
            plgpu.set_max_registers(most[0], action="increase")
            _walk_states(cfg, idx, (y_g, final_g, states_g), init_g, d_g, smem, bars, wg)

        if cfg.emit_y:

            @pl.when(wg == hb)
            def scores():
                plgpu.set_max_registers(most[1], action="increase")
                _walk_scores(cfg, idx, smem, bars)

        @pl.when(wg == cfg.warpgroups)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            _produce(cfg, idx, (x_g, ab_g, real_g, b_g, c_g), smem, bars["full"], bars["empty"])

    pl.run_scoped(scoped, scratch, barriers, collective_axes="wg")


def _registers(cfg):
    """Registers a thread of the (state, scores) warpgroups; the producer gives its share."""
    if not cfg.emit_y:
        return 240, 0
    if cfg.block_heads == 1:
        return 248, 232
    return 176, 128


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def walk(cfg, x, ab, b_mat, c_mat, real, d, init):
    """Run the walk; returns the list of outputs that ``cfg`` asks for: y, final states, states.

    x ``[B, T, H, 64]``; ab ``[B, chunks, H, 2, 64]``; b_mat, c_mat ``[B, T, G, N]``; real ``[B, chunks, 64]``;
    d ``[H]`` or ``[H, 64]``; init, final ``[B, pieces, H, 64, N]`` float32; states ``[B, chunks / 2, H, 64, N]``.
    """
    out = []
    if cfg.emit_y:
        out.append(jax.ShapeDtypeStruct(x.shape, cfg.dtype))
    if cfg.emit_final:
        out.append(jax.ShapeDtypeStruct((cfg.batch, cfg.pieces, cfg.heads, TILE, cfg.state), F32))
    if cfg.emit_states:
        out.append(jax.ShapeDtypeStruct((cfg.batch, cfg.chunks // 2, cfg.heads, TILE, cfg.state), cfg.dtype))
    args = [x, ab, b_mat, c_mat if cfg.emit_y else None, real if cfg.segments else None, d if cfg.has_d else None]
    args.append(init if cfg.has_init else None)
    kernel = plgpu.kernel(
        named_body("ssd_reverse_walk" if cfg.reverse else "ssd_walk", _body, cfg),
        out_type=out,
        grid=(cfg.batch, cfg.pieces, cfg.heads // cfg.block_heads),
        grid_names=("batch", "piece", "heads"),
        num_threads=cfg.warpgroups + 1,
        thread_name="wg",
        compiler_params=LANE_PARAMS if cfg.emit_states else PARAMS,  # the forward alone was not timed so
    )
    return call_varying(kernel, *[a for a in args if a is not None])
