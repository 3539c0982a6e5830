# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels that walk the chunks of the gated delta rule whose key channels decay by themselves.

What needs no state comes from `channel_chunks`: A, T and the weighed queries and keys. A thread block owns one head of
one row: a producer streams chunks, one warpgroup per 64 value channels keeps the state, or its gradient, in registers,
transposed as in `forward`. With the names of `channel_chunks`, forwards

    U = T (v - from_k state)      y = from_q state + A beta U      state = diag(exp2(a_end)) state + to_state^T beta U

and in reverse, with R the gradient of the state that leaves a chunk,

    dV = T^T diag(beta) (A^T dy + to_state R)        the gradient of v
    R of the chunk before = diag(exp2(a_end)) R + from_q^T dy - from_k^T dV
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
    F32,
    TILE,
    WGMMA,
    accumulate,
    cols_of,
    drain,
    in_one_warp,
    named_body,
    sums_of,
    zeros,
)
from pallas_kernels.ops.gated_delta_rule.gpu import threads
from pallas_kernels.ops.gated_delta_rule.gpu.forward import LANE_PARAMS, Walk, clear_padding, terms_of, vector
from pallas_kernels.varying import call_varying

STAGES = 2
WEIGHED = ("from_q", "from_k", "to_state")
NUMBERS = ("ends", "beta")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Static description of a walk; `reverse` with its gradient of the final state, if there is one."""

    walk: Walk
    reverse: bool = False
    has_final: bool = False

    @property
    def values(self) -> str:
        """What comes with the chunks by value channel."""
        return "dy" if self.reverse else "v"

    @property
    def starts(self) -> str | None:
        """The input that a walk starts from, if not from zeros."""
        if self.reverse:
            return "final" if self.has_final else None
        return "init" if self.walk.has_init else None

    @property
    def inputs(self) -> list[str]:
        """Names of the arrays that it takes."""
        starts = [self.starts] if self.starts else []
        return [*WEIGHED, *self.pairs, *NUMBERS, self.values] + ["real"] * self.walk.segments + starts

    @property
    def pairs(self) -> list[str]:
        """Names of those that are of pairs of a chunk's tokens."""
        return ["a", "t"] + ["t_rest"] * self.walk.exact


def _columns(cfg):
    return [pl.ds(n, TILE) for n in range(0, cfg.key, TILE)]


def _store_state(cfg, state, out):
    """The state in bfloat16 to shared memory, as the left operand of products."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier of the warpgroup, too
    for n in range(cfg.key // TILE):
        out[n] = state[:, n * TILE : (n + 1) * TILE].astype(cfg.dtype)
    plgpu.commit_smem()


def _chunk_of(cfg, smem, step, part):
    slot = lax.rem(step, STAGES)
    tiles = {name: smem[name].at[slot] for name in (*WEIGHED, *cfg.pairs, *NUMBERS)}
    return slot, tiles, smem[cfg.values].at[slot, part], smem["out"].at[part + threads.hidden_zero()]


def _forward_step(steps, state, idx, outs, smem, bars, i, part):
    """One chunk of 64 value channels: returns the state that leaves."""
    cfg, (b, head) = steps.walk, idx
    slot, tiles, v, out = _chunk_of(steps, smem, i, part)
    rows, channels = pl.ds(i * TILE, TILE), pl.ds(part * TILE, TILE)
    _store_state(cfg, state, out)
    if cfg.emit_residuals:
        for n, cut in enumerate(_columns(cfg)):
            plgpu.copy_smem_to_gmem(out.at[n], outs["states"].at[b, i, head, channels, cut])
    plgpu.barrier_wait(bars["full"].at[slot])
    clear_padding(cfg, smem, slot, v)

    def read(acc):
        for n, cut in enumerate(_columns(cfg)):
            plgpu.wgmma(acc, out.at[n], tiles["from_k"].at[:, cut].T)
        values = plgpu.load(v.T, layout=WGMMA)
        return terms_of(cfg, values.astype(F32) - sums_of(acc))

    errors = accumulate(read, TILE)

    def write(solved, y):
        if cfg.exact:
            plgpu.wgmma(solved, errors[0], tiles["t_rest"].T)
        for term in errors[::-1]:
            plgpu.wgmma(solved, term, tiles["t"].T)
        for n, cut in enumerate(_columns(cfg)):
            plgpu.wgmma(y, out.at[n], tiles["from_q"].at[:, cut].T)
        written = sums_of(solved, cfg.key // TILE)
        corrections = terms_of(cfg, written * cols_of(vector(tiles["beta"])))
        plgpu.wgmma(y, corrections[0], tiles["a"].T)
        return written.astype(cfg.dtype), corrections, sums_of(y).astype(cfg.dtype)

    written, corrections, y = accumulate(write, TILE, TILE)

    def onward(acc):
        acc[...] = state * cols_of(jnp.exp2(vector(tiles["ends"])))
        for term in corrections[::-1]:
            plgpu.wgmma(acc, term, tiles["to_state"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier of the warpgroup: all have read the state
        out.at[0].T[...] = y
        if cfg.emit_residuals:
            out.at[1].T[...] = written
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out.at[0], outs["y"].at[b, rows, head, channels])
        if cfg.emit_residuals:
            plgpu.copy_smem_to_gmem(out.at[1], outs["written"].at[b, rows, head, channels])
        return sums_of(acc)

    state = accumulate(onward, cfg.key)
    plgpu.barrier_arrive(bars["empty"].at[slot])
    return state


def _reverse_step(steps, grad, idx, outs, smem, bars, step, part):
    """One chunk of 64 value channels: returns the gradient of the state that enters it."""
    cfg, (b, head), i = steps.walk, idx, steps.walk.chunks - 1 - step
    slot, tiles, dy, out = _chunk_of(steps, smem, step, part)
    rows, channels = pl.ds(i * TILE, TILE), pl.ds(part * TILE, TILE)
    _store_state(cfg, grad, out)
    for n, cut in enumerate(_columns(cfg)):
        plgpu.copy_smem_to_gmem(out.at[n], outs["grads"].at[b, i, head, channels, cut])
    plgpu.barrier_wait(bars["full"].at[slot])
    clear_padding(cfg, smem, slot, dy)

    def written(acc):
        for n, cut in enumerate(_columns(cfg)):
            plgpu.wgmma(acc, out.at[n], tiles["to_state"].at[:, cut].T)
        given = plgpu.load(dy.T, layout=WGMMA)
        plgpu.wgmma(acc, given, tiles["a"])
        return given, terms_of(cfg, sums_of(acc) * cols_of(vector(tiles["beta"])))

    given, weighted = accumulate(written, TILE)

    def solved(acc):
        if cfg.exact:
            plgpu.wgmma(acc, weighted[0], tiles["t_rest"])
        for term in weighted[::-1]:
            plgpu.wgmma(acc, term, tiles["t"])
        return sums_of(acc)

    d_v = accumulate(solved, TILE)
    read = terms_of(cfg, -d_v)

    def onward(acc):
        acc[...] = grad * cols_of(jnp.exp2(vector(tiles["ends"])))
        plgpu.wgmma(acc, given, tiles["from_q"])
        for term in read[::-1]:
            plgpu.wgmma(acc, term, tiles["from_k"])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a barrier of the warpgroup: all have read the gradient
        out.at[0].T[...] = d_v.astype(cfg.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out.at[0], outs["dv"].at[b, rows, head, channels])
        return sums_of(acc)

    grad = accumulate(onward, cfg.key)
    plgpu.barrier_arrive(bars["empty"].at[slot])
    return grad


def _states(steps, idx, ins, outs, smem, bars, part):
    """Work of a warpgroup of the state."""
    (b, head), channels = idx, pl.ds(part * TILE, TILE)
    state = zeros(steps.walk.key)
    if steps.starts:
        state = plgpu.load(ins[steps.starts].at[b, head, channels], layout=WGMMA, optimized=False)
    work = functools.partial(_reverse_step if steps.reverse else _forward_step, steps)
    state = lax.fori_loop(0, steps.walk.chunks, lambda i, state: work(state, idx, outs, smem, bars, i, part), state)
    if "end" in outs:
        outs["end"][b, head, channels] = state
    plgpu.wait_smem_to_gmem(0)


def _produce(steps, idx, ins, smem, bars):
    cfg, (b, head) = steps.walk, idx

    def step(i, _):
        slot, chunk = lax.rem(i, STAGES), cfg.chunks - 1 - i if steps.reverse else i
        rows, bar = pl.ds(chunk * TILE, TILE), bars["full"].at[slot]

        @pl.when(i >= STAGES)
        def _():
            plgpu.barrier_wait(bars["empty"].at[slot])

        for name in WEIGHED:
            plgpu.copy_gmem_to_smem(ins[name].at[b, rows, head], smem[name].at[slot], bar)
        for part in range(cfg.parts):
            source = ins[steps.values].at[b, rows, head, pl.ds(part * TILE, TILE)]
            plgpu.copy_gmem_to_smem(source, smem[steps.values].at[slot, part], bar)
        for name in (*steps.pairs, *NUMBERS):
            plgpu.copy_gmem_to_smem(ins[name].at[b, chunk, head], smem[name].at[slot], bar)
        if cfg.segments:
            plgpu.copy_gmem_to_smem(ins["real"].at[b, chunk], smem["real"].at[slot], bar)
        return None

    lax.fori_loop(0, cfg.chunks, step, None)
    drain(cfg.chunks, STAGES, [bars["empty"]])


def _scratch(steps):
    """Shared memory of a thread block by name."""
    cfg = steps.walk
    tile = functools.partial(plgpu.SMEM, dtype=cfg.dtype, transforms=BF16_TRANSFORMS)
    outs = max(cfg.key // TILE, 1 + cfg.emit_residuals)
    return {
        **{name: tile((STAGES, TILE, cfg.key)) for name in WEIGHED},
        **{name: tile((STAGES, TILE, TILE)) for name in steps.pairs},
        steps.values: tile((STAGES, cfg.parts, TILE, TILE)),
        "out": tile((cfg.parts, outs, TILE, TILE)),
        "ends": plgpu.SMEM((STAGES, cfg.key), F32),
        "beta": plgpu.SMEM((STAGES, TILE), F32),
        "real": plgpu.SMEM((STAGES, TILE), F32) if cfg.segments else None,
    }


def _outputs(steps):
    """Shapes of the outputs by name."""
    cfg = steps.walk
    tokens = jax.ShapeDtypeStruct((cfg.batch, cfg.tokens, cfg.heads, cfg.width), cfg.dtype)
    states = jax.ShapeDtypeStruct((cfg.batch, cfg.chunks, cfg.heads, cfg.width, cfg.key), cfg.dtype)
    if steps.reverse:
        named = {"dv": tokens, "grads": states}
    else:
        named = {"y": tokens} | ({"written": tokens, "states": states} if cfg.emit_residuals else {})
    if cfg.has_init if steps.reverse else cfg.emit_final:
        named["end"] = jax.ShapeDtypeStruct((cfg.batch, cfg.heads, cfg.width, cfg.key), F32)
    return named


def _body(steps, *refs):
    cfg, names = steps.walk, steps.inputs
    ins, outs = dict(zip(names, refs)), dict(zip(_outputs(steps), refs[len(names) :]))
    wg, idx = lax.axis_index("wg"), (lax.axis_index("batch"), lax.axis_index("head"))
    barriers = {
        "full": plgpu.Barrier(num_arrivals=len(steps.inputs) - bool(steps.starts) - 1 + cfg.parts, num_barriers=STAGES),
        "empty": plgpu.Barrier(num_arrivals=cfg.parts, num_barriers=STAGES),
    }

    def scoped(smem, bars):
        @pl.when(wg < cfg.parts)
        def _():
            plgpu.set_max_registers(232, action="increase")
            _states(steps, idx, ins, outs, smem, bars, wg)

        @pl.when(wg == cfg.parts)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            in_one_warp(lambda: _produce(steps, idx, ins, smem, bars))

    pl.run_scoped(scoped, _scratch(steps), barriers, collective_axes="wg")


@functools.partial(jax.jit, static_argnums=0)  # so that calls alike are traced and lowered once
def walk(steps, arrays):
    """Runs a walk on arrays by name; returns its outputs by name, see `_outputs`.

    ``end`` is the final state, in reverse the gradient of the initial one, float32 ``[B, H, P, N]``; ``grads`` are the
    gradients of the states that leave the chunks.
    """
    out = _outputs(steps)
    kernel = plgpu.kernel(
        named_body(f"gated_delta_rule_channel_{'reverse_' * steps.reverse}walk", _body, steps),
        out_type=list(out.values()),
        grid=(steps.walk.batch, steps.walk.heads),
        grid_names=("batch", "head"),
        num_threads=steps.walk.parts + 1,
        thread_name="wg",
        compiler_params=LANE_PARAMS,
    )
    return dict(zip(out, call_varying(kernel, *(arrays[name] for name in steps.inputs))))
