# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel that walks the chunks of the gated delta rule with the state in registers.

One thread block owns one head of one row. A producer streams chunks of 64 tokens through shared memory. One warpgroup
per 64 value channels keeps the float32 state transposed, ``[P, N]``, as accumulators of the matrix unit, so that its
left operands (state, values, corrections) come from registers. One more warpgroup works a chunk ahead on what no state
is needed for. With ``a`` the within-chunk cumulative log2 decay and ``E_ij = exp2(a_i - a_j)`` for j <= i,

    B_ij = (k_i . k_j) E_ij, j < i       A_ij = scale (q_i . k_j) E_ij, j <= i       T = (1 + B diag(beta))^-1
    U    = T (v - diag(exp2(a)) k state)        what the tokens write, before beta: v minus what was read
    y    = scale exp2(a) q state + A beta U
    state = exp2(a_end) state + sum_j exp2(a_end - a_j) k_j (beta_j U_j)^T

(Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, section 3.3, with beta on the other side of the inverse, so that
U is there for the gradient of beta). Lengths of q and k enter as numbers a token, so that no rounded unit vector does.

Gates come as they are, of a few heads together, and documents as marks of tokens (see `clear_padding`, `documented`):
they are decays, as in `ssd`. For the gradients the forward also stores U, T, A, the tokens' numbers and the state that
enters each chunk.

Barriers: ``full`` and ``empty`` of each slot of the three rings (queries and keys; values; gates) between the producer
and those who read them; ``t_full`` and ``t_empty`` between the warpgroup of the scores and those of the state. No
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
    LOG2E,
    PARAMS,
    ROW,
    TILE,
    WGMMA,
    accumulate,
    clear_rows,
    cols_of,
    drain,
    in_one_warp,
    named_body,
    rows_of,
    sums_of,
    zeros,
)
from pallas_kernels.ops.gated_delta_rule.gpu import threads
from pallas_kernels.ops.gated_delta_rule.gpu.inverse import SCRATCH, unit_inverse
from pallas_kernels.varying import call_varying

KEY_STAGES = 3
VALUE_STAGES = 1  # its copy has a chunk's time
GATE_STAGES = 2  # read as the scores of a chunk begin
SCORE_STAGES = 2
LENGTH_EPS = 1e-6  # as in the op's docstring
LANE_PARAMS = dataclasses.replace(
    PARAMS,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    reduction_scratch_bytes=0,  # no sum over the rows of a tile, for which warps would meet in shared memory
)

# Numbers of a token that the warpgroup of the scores finds: rows of "numbers".
FROM_STATE_Q = 0  # scale exp2(a) / |q|, of what its query reads from the entering state
FROM_STATE_K = 1  # exp2(a) / |k|
TO_STATE = 2  # exp2(a_end - a) / |k|
DECAY = 3  # a
PER_Q = 4  # 1 / |q|
PER_K = 5
BETA = 6
NUMBERS = 7
STEP = PER_Q  # where the log2 decays of tokens stand until all have been summed up

HEADS = 4  # whose gates are copied together: 16 bytes of a token, the least that the copy engine takes
# Taken from the log2 decay of a document's first token: weights across it are below 2^-126, which is 0 on the device.
BETWEEN_DOCUMENTS = 144.0
FORGOTTEN = -160.0  # log2 decay of a token below which nothing is left; a sum of 64 of them still tells decays apart


@dataclasses.dataclass(frozen=True)
class Walk:
    """Static description of a walk; widths are 64 or 128, a chunk is TILE tokens."""

    batch: int
    tokens: int
    heads: int
    groups: int
    key: int
    width: int
    chunks: int
    normalize: bool
    scale: float
    decays: bool = True
    segments: bool = False
    has_init: bool = False
    emit_final: bool = False
    emit_residuals: bool = False
    exact: bool = False  # T and what it solves, and what is added to the state, in two terms each
    dtype: jnp.dtype = jnp.bfloat16

    @property
    def parts(self) -> int:
        """Warpgroups of the state, one per TILE value channels."""
        return self.width // TILE

    @property
    def registers(self) -> tuple[int, int, int]:
        """Of a thread of the warpgroups (state, scores, producer)."""
        return (176, 136, 24) if self.parts == 2 else (232, 232, 24)


def vector(ref, layout=COL):
    """A vector of shared memory, a value a row or a column of a tile."""
    return plgpu.load(ref, layout=layout, optimized=False)


def terms_of(cfg, values):
    """Left operands, the second for what the rounding of the first took."""
    return threads.two_terms(values) if cfg.exact else (values.astype(cfg.dtype),)


def clear_padding(cfg, smem, slot, *tiles):
    """Zeros on the padding of tiles ``[64 tokens, n]`` of a chunk, which may hold anything; rare, and costs a branch.

    Every warpgroup does so before it reads them: they write the same values.
    """
    if not cfg.segments:
        return
    marks, first = smem["real"].at[slot], smem["real"][slot, 0]

    @pl.when(first * first < 2.0)
    def _():
        keep = rows_of(vector(marks, ROW), TILE) != 0.0
        for tile in tiles:
            clear_rows(tile, keep, cfg.dtype)
        plgpu.commit_smem()


def documented(steps, mark):
    """Log2 decays with those of first tokens and of padding, by marks of the same shape."""
    return jnp.where(mark < 0.0, -BETWEEN_DOCUMENTS, jnp.where(mark > 0.0, steps, 0.0))


def _per_length(cfg, products):
    """1 / length of each row, from the products of the rows among each other; or 1."""
    squares = jnp.sum(threads.keep_diagonal(products), axis=1)
    return lax.rsqrt(squares + LENGTH_EPS if cfg.normalize else jnp.maximum(1.0, jnp.minimum(squares, 1.0)))


def _gates(cfg, i, head, smem, bars, numbers):
    """Fills betas of the tokens and, where their sums are to stand, log2 decays."""
    slot, gate_slot, own = lax.rem(i, KEY_STAGES), lax.rem(i, GATE_STAGES), lax.rem(head, HEADS)
    plgpu.barrier_wait(bars["gates_full"].at[gate_slot])
    beta = vector(smem["beta"].at[gate_slot, :, own], ROW)
    steps = jnp.maximum(vector(smem["g"].at[gate_slot, :, own], ROW) * LOG2E, FORGOTTEN) if cfg.decays else beta * 0.0
    plgpu.barrier_arrive(bars["gates_empty"].at[gate_slot])
    if cfg.segments:
        mark = vector(smem["real"].at[slot], ROW)
        beta, steps = jnp.where(mark != 0.0, beta, 0.0), documented(steps, mark)
    numbers[BETA] = beta
    numbers[STEP] = steps


def _numbers(cfg, numbers, per_q, per_k):
    """Fills the tokens' other numbers."""
    plgpu.commit_smem()
    decay = jnp.sum(threads.keep_lower(cols_of(vector(numbers.at[STEP]))), axis=1)
    numbers[DECAY] = decay
    plgpu.commit_smem()
    upto, after = jnp.exp2(decay), jnp.exp2(numbers[DECAY, TILE - 1] - decay)
    numbers[FROM_STATE_Q] = upto * per_q * cfg.scale
    numbers[FROM_STATE_K] = upto * per_k
    numbers[TO_STATE] = after * per_k
    numbers[PER_Q] = per_q
    numbers[PER_K] = per_k
    plgpu.commit_smem()


def _products(cfg, i, head, q, k, smem, bars, numbers):
    """(k . k, q . k, what decays and lengths of keys make of a pair), with the tokens' numbers found meanwhile.

    Two products are in flight while gates are read, the third while numbers and pairs are made. Three at once take more
    registers than there are (C7512).
    """

    def lengths(of_q, of_k):
        plgpu.wgmma(of_q, q, q.T)
        plgpu.wgmma(of_k, k, k.T)
        _gates(cfg, i, head, smem, bars, numbers)
        return _per_length(cfg, sums_of(of_q, 1)), sums_of(of_k)

    per_q, mixed = accumulate(lengths, TILE, TILE)

    def pairs(scores):
        plgpu.wgmma(scores, q, k.T)
        _numbers(cfg, numbers, per_q, _per_length(cfg, mixed))
        decay = rows_of(vector(numbers.at[DECAY], ROW)) - cols_of(vector(numbers.at[DECAY]))
        pair = jnp.exp2(jnp.minimum(decay, 0.0)) * cols_of(vector(numbers.at[PER_K]))
        return sums_of(scores), pair

    return mixed, *accumulate(pairs, TILE)


def _scores(cfg, idx, outs, smem, bars):
    """Work of the warpgroup of the scores: numbers, A and T of each chunk."""
    b, head = idx

    def step(i, _):
        slot, ring = lax.rem(i, KEY_STAGES), lax.rem(i, SCORE_STAGES)
        q, k, numbers = smem["q"].at[slot], smem["k"].at[slot], smem["numbers"].at[ring]
        a_ref, t_ref = smem["a"].at[ring], smem["t"].at[ring]
        plgpu.barrier_wait(bars["full"].at[slot])
        clear_padding(cfg, smem, slot, q, k)

        @pl.when(i >= SCORE_STAGES)
        def _():
            plgpu.barrier_wait(bars["t_empty"].at[ring])

        if cfg.emit_residuals:  # those of this slot; the last chunk's may be under way
            plgpu.wait_smem_to_gmem(3 + cfg.exact, wait_read_only=True)
        mixed, scores, pair = _products(cfg, i, head, q, k, smem, bars, numbers)
        scores *= rows_of(vector(numbers.at[PER_Q], ROW) * cfg.scale)
        a_ref[...] = threads.keep_lower(scores * pair).astype(cfg.dtype)
        mixed *= rows_of(vector(numbers.at[PER_K], ROW))
        mixed *= cols_of(vector(numbers.at[BETA]))
        mixed = threads.keep_strictly_lower(mixed * pair)
        plgpu.barrier_arrive(bars["empty"].at[slot])
        rest = smem["t_rest"].at[ring] if cfg.exact else None
        unit_inverse(mixed, t_ref, [smem["scratch"].at[threads.hidden_zero() + n] for n in range(SCRATCH)], rest)
        plgpu.commit_smem()
        plgpu.barrier_arrive(bars["t_full"].at[ring])
        if cfg.emit_residuals:
            residuals = {"a": a_ref, "t": t_ref} | ({"t_rest": rest} if cfg.exact else {}) | {"numbers": numbers}
            for name, source in residuals.items():
                plgpu.copy_smem_to_gmem(source, outs[name].at[b, i, head])
        return None

    lax.fori_loop(0, cfg.chunks, step, None)
    drain(cfg.chunks, SCORE_STAGES, [bars["t_empty"]])
    plgpu.wait_smem_to_gmem(0)


def _state_step(cfg, state, idx, outs, smem, bars, i, part):
    """One chunk of 64 value channels: returns the state that leaves."""
    b, head = idx
    slot, v_slot, ring = lax.rem(i, KEY_STAGES), lax.rem(i, VALUE_STAGES), lax.rem(i, SCORE_STAGES)
    q, k, v = smem["q"].at[slot], smem["k"].at[slot], smem["v"].at[v_slot, part]
    numbers, out = smem["numbers"].at[ring], smem["out"].at[part + threads.hidden_zero()]
    rows, channels = pl.ds(i * TILE, TILE), pl.ds(part * TILE, TILE)
    columns = [pl.ds(n, TILE) for n in range(0, cfg.key, TILE)]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier of the warpgroup, too
    for n in range(len(columns)):
        out[n] = state[:, n * TILE : (n + 1) * TILE].astype(cfg.dtype)
    plgpu.commit_smem()
    if cfg.emit_residuals:
        for n, cut in enumerate(columns):
            plgpu.copy_smem_to_gmem(out.at[n], outs["states"].at[b, i, head, channels, cut])
    plgpu.barrier_wait(bars["full"].at[slot])
    clear_padding(cfg, smem, slot, q, k)

    def read(from_k):
        for n, cut in enumerate(columns):
            plgpu.wgmma(from_k, out.at[n], k.at[:, cut].T)
        plgpu.barrier_wait(bars["v_full"].at[v_slot])
        clear_padding(cfg, smem, slot, v)
        values = plgpu.load(v.T, layout=WGMMA)
        plgpu.barrier_wait(bars["t_full"].at[ring])
        errors = values.astype(F32) - sums_of(from_k) * cols_of(vector(numbers.at[FROM_STATE_K]))
        return terms_of(cfg, errors)

    errors = accumulate(read, TILE)
    plgpu.barrier_arrive(bars["v_empty"].at[v_slot])

    def solve(solved, from_q):
        if cfg.exact:
            plgpu.wgmma(solved, errors[0], smem["t_rest"].at[ring].T)
        for term in errors[::-1]:
            plgpu.wgmma(solved, term, smem["t"].at[ring].T)
        for n, cut in enumerate(columns):
            plgpu.wgmma(from_q, out.at[n], q.at[:, cut].T)
        written = sums_of(solved, len(columns))
        corrections = written * cols_of(vector(numbers.at[BETA]))
        kept = terms_of(cfg, corrections * cols_of(vector(numbers.at[TO_STATE])))
        y = sums_of(from_q) * cols_of(vector(numbers.at[FROM_STATE_Q]))
        return written.astype(cfg.dtype), corrections.astype(cfg.dtype), kept, y

    written, corrections, kept, y = accumulate(solve, TILE, TILE)
    decay = jnp.exp2(numbers[DECAY, TILE - 1])

    def write(y_acc, state_acc):
        y_acc[...] = y
        state_acc[...] = state * decay
        plgpu.wgmma(y_acc, corrections, smem["a"].at[ring].T)
        for term in kept[::-1]:
            plgpu.wgmma(state_acc, term, k)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier of the warpgroup: all have read the state
        if cfg.emit_residuals:
            out.at[1].T[...] = written
        out.at[0].T[...] = sums_of(y_acc, 1).astype(cfg.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out.at[0], outs["y"].at[b, rows, head, channels])
        if cfg.emit_residuals:
            plgpu.copy_smem_to_gmem(out.at[1], outs["written"].at[b, rows, head, channels])
        return state_acc[...]

    state = accumulate(write, TILE, cfg.key)
    plgpu.barrier_arrive(bars["t_empty"].at[ring])
    plgpu.barrier_arrive(bars["empty"].at[slot])
    return state


def _states(cfg, idx, ins, outs, smem, bars, part):
    """Work of a warpgroup of the state."""
    b, head = idx
    channels = pl.ds(part * TILE, TILE)
    state = zeros(cfg.key)
    if cfg.has_init:
        state = plgpu.load(ins["init"].at[b, head, channels], layout=WGMMA, optimized=False)
    step = functools.partial(_state_step, cfg)
    state = lax.fori_loop(0, cfg.chunks, lambda i, state: step(state, idx, outs, smem, bars, i, part), state)
    if cfg.emit_final:
        outs["final"][b, head, channels] = state
    plgpu.wait_smem_to_gmem(0)


def _produce(cfg, idx, ins, smem, bars):
    b, head = idx
    group = lax.div(head, cfg.heads // cfg.groups)
    gates, heads = ["g"] * cfg.decays + ["beta"], pl.ds(lax.div(head, HEADS) * HEADS, HEADS)

    def step(i, _):
        slot, v_slot, rows = lax.rem(i, KEY_STAGES), lax.rem(i, VALUE_STAGES), pl.ds(i * TILE, TILE)

        @pl.when(i >= KEY_STAGES)
        def _():
            plgpu.barrier_wait(bars["empty"].at[slot])

        bar = bars["full"].at[slot]
        plgpu.copy_gmem_to_smem(ins["k"].at[b, rows, group], smem["k"].at[slot], bar)
        plgpu.copy_gmem_to_smem(ins["q"].at[b, rows, group], smem["q"].at[slot], bar)
        if cfg.segments:
            plgpu.copy_gmem_to_smem(ins["real"].at[b, i], smem["real"].at[slot], bar)
        gate_slot = lax.rem(i, GATE_STAGES)

        @pl.when(i >= GATE_STAGES)
        def _():
            plgpu.barrier_wait(bars["gates_empty"].at[gate_slot])

        bar = bars["gates_full"].at[gate_slot]
        for name in gates:
            plgpu.copy_gmem_to_smem(ins[name].at[b, rows, heads], smem[name].at[gate_slot], bar)

        @pl.when(i >= VALUE_STAGES)
        def _():
            plgpu.barrier_wait(bars["v_empty"].at[v_slot])

        for part in range(cfg.parts):
            source = ins["v"].at[b, rows, head, pl.ds(part * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, smem["v"].at[v_slot, part], bars["v_full"].at[v_slot])
        return None

    lax.fori_loop(0, cfg.chunks, step, None)
    drain(cfg.chunks, KEY_STAGES, [bars["empty"]])
    drain(cfg.chunks, VALUE_STAGES, [bars["v_empty"]])
    drain(cfg.chunks, GATE_STAGES, [bars["gates_empty"]])


def _scratch(cfg):
    """Shared memory of a thread block by name."""
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    outs = max(cfg.key // TILE, 1 + cfg.emit_residuals)
    return {
        "q": tile((KEY_STAGES, TILE, cfg.key)),
        "k": tile((KEY_STAGES, TILE, cfg.key)),
        "v": tile((VALUE_STAGES, cfg.parts, TILE, TILE)),
        "a": tile((SCORE_STAGES, TILE, TILE)),
        "t": tile((SCORE_STAGES, TILE, TILE)),
        "t_rest": tile((SCORE_STAGES, TILE, TILE)) if cfg.exact else None,
        "scratch": tile((SCRATCH, TILE, TILE)),
        "out": tile((cfg.parts, outs, TILE, TILE)),
        "g": plgpu.SMEM((GATE_STAGES, TILE, HEADS), F32) if cfg.decays else None,
        "beta": plgpu.SMEM((GATE_STAGES, TILE, HEADS), F32),
        "real": plgpu.SMEM((KEY_STAGES, TILE), F32) if cfg.segments else None,
        "numbers": plgpu.SMEM((SCORE_STAGES, NUMBERS, TILE), F32),
    }


def _barriers(cfg):
    return {
        "full": plgpu.Barrier(num_arrivals=2 + cfg.segments, num_barriers=KEY_STAGES),
        "empty": plgpu.Barrier(num_arrivals=1 + cfg.parts, num_barriers=KEY_STAGES),
        "v_full": plgpu.Barrier(num_arrivals=cfg.parts, num_barriers=VALUE_STAGES),
        "v_empty": plgpu.Barrier(num_arrivals=cfg.parts, num_barriers=VALUE_STAGES),
        "gates_full": plgpu.Barrier(num_arrivals=1 + cfg.decays, num_barriers=GATE_STAGES),
        "gates_empty": plgpu.Barrier(num_arrivals=1, num_barriers=GATE_STAGES),
        "t_full": plgpu.Barrier(num_arrivals=1, num_barriers=SCORE_STAGES),
        "t_empty": plgpu.Barrier(num_arrivals=cfg.parts, num_barriers=SCORE_STAGES),
    }


def _outputs(cfg):
    """Shapes of the outputs by name."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=cfg.dtype)
    tokens = (cfg.batch, cfg.tokens, cfg.heads, cfg.width)
    chunks = (cfg.batch, cfg.chunks, cfg.heads)
    named = {"y": shape(tokens)}
    if cfg.emit_final:
        named["final"] = jax.ShapeDtypeStruct((cfg.batch, cfg.heads, cfg.width, cfg.key), F32)
    if cfg.emit_residuals:
        named |= {
            "written": shape(tokens),
            "states": shape((*chunks, cfg.width, cfg.key)),
            "a": shape((*chunks, TILE, TILE)),
            "t": shape((*chunks, TILE, TILE)),
            **({"t_rest": shape((*chunks, TILE, TILE))} if cfg.exact else {}),
            "numbers": jax.ShapeDtypeStruct((*chunks, NUMBERS, TILE), F32),
        }
    return named


def _body(cfg, *refs):
    names = ["q", "k", "v"] + ["g"] * cfg.decays + ["beta"] + ["real"] * cfg.segments + ["init"] * cfg.has_init
    ins, outs = dict(zip(names, refs)), dict(zip(_outputs(cfg), refs[len(names) :]))
    wg, idx = lax.axis_index("wg"), (lax.axis_index("batch"), lax.axis_index("head"))
    most = cfg.registers

    def scoped(smem, bars):
        @pl.when(wg < cfg.parts)
        def _():
            plgpu.set_max_registers(most[0], action="increase")
            _states(cfg, idx, ins, outs, smem, bars, wg)

        @pl.when(wg == cfg.parts)
        def _():
            plgpu.set_max_registers(most[1], action="increase" if most[1] > 128 else "decrease")
            _scores(cfg, idx, outs, smem, bars)

        @pl.when(wg == cfg.parts + 1)
        def _():
            plgpu.set_max_registers(most[2], action="decrease")
            in_one_warp(lambda: _produce(cfg, idx, ins, smem, bars))

    pl.run_scoped(scoped, _scratch(cfg), _barriers(cfg), collective_axes="wg")


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def walk(cfg, q, k, v, g, beta, real, init):
    """Runs the walk; returns its outputs by name, see `_outputs`.

    q, k ``[B, T, G, N]``, v ``[B, T, H, P]``, g (or None) and beta float32 ``[B, T, H]`` with heads up to a multiple of
    HEADS, marks real ``[B, chunks, 64]`` or None, init ``[B, H, P, N]`` float32 or None.
    """
    out = _outputs(cfg)
    kernel = plgpu.kernel(
        named_body("gated_delta_rule_walk", _body, cfg),
        out_type=list(out.values()),
        grid=(cfg.batch, cfg.heads),
        grid_names=("batch", "head"),
        num_threads=cfg.parts + 2,
        thread_name="wg",
        compiler_params=LANE_PARAMS,
    )
    args = [q, k, v, g, beta, real if cfg.segments else None, init if cfg.has_init else None]
    return dict(zip(out, call_varying(kernel, *(a for a in args if a is not None))))
