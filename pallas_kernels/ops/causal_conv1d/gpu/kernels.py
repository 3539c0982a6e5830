# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of the causal convolution, forward and backward, one pass over memory each.

A thread block is one warpgroup that owns 256 channels, two a thread, and walks along a part of one row's tokens: rows
of channels come through a ring in shared memory, the last K = W - 1 inputs and all sums stay in registers in float32.

    s_t  = bias + sum_k w[K - k] x_{t-k}        y_t  = silu(s_t) or s_t
    ds_t = dy_t silu'(s_t)                       dx_t = sum_k w[K - k] ds_{t+k}      dw[K - k] = sum_t ds_t x_{t-k}

The backward reads K tokens ahead of what it writes, so that dx_t is whole when it is written; parts of a row each do
the K tokens between them anew. Sums over tokens (dw, the bias' gradient) are written by part and added up outside, so
that they do not depend on the order of thread blocks. `seen` [B, T] counts for each token how many of its K + 1 taps
count, 0 at padding, and has `WHOLE` more where a whole block of tokens from there on has all of them: documents cost
comparisons only, and those only where one begins or ends.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import F32, LANE_PARAMS, LOG2E, named_body
from pallas_kernels.varying import call_varying

CHANNELS = 256  # of a thread block; also the longest row that one bulk copy takes
VECTOR = 2  # channels of a thread
LAYOUT = plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=VECTOR)
SEEN = 32  # entries of `seen` that are copied at once: 128 bytes, the least
WHOLE = 256  # above any number of taps


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static description of one kernel."""

    batch: int
    tokens: int
    width: int  # channels
    before: int  # K
    block: int  # tokens a stage
    stages: int
    part_blocks: int  # blocks of tokens that a thread block walks
    bias: bool
    silu: bool
    segments: bool
    initial: bool
    dtype: jnp.dtype
    margin: int = 0  # zeros in front of and behind the tokens

    @property
    def parts(self) -> int:
        return -(-self.tokens // (self.block * self.part_blocks))

    @property
    def out_tokens(self) -> int:
        """Tokens of the arrays that are written: a copy of whole rows would go over the end of a batch element."""
        if self.width != CHANNELS or self.margin:
            return self.tokens + 2 * self.margin
        return -(-self.tokens // self.block) * self.block

    @property
    def overhang(self) -> bool:
        """Whether the backward's last block, K tokens ahead, begins behind the tokens."""
        return 0 < self.tokens % self.block <= self.before

    @property
    def padded_width(self) -> int:
        return -(-self.width // CHANNELS) * CHANNELS


def _silu_parts(s):
    """(sigmoid of s, s): by base-2 exponential and reciprocal square root, which are single instructions."""
    root = lax.rsqrt(1.0 + jnp.exp2(s * -LOG2E))
    return root * root


def _sum_of_taps(w, b, window):
    """Bias and products of taps with their tokens, oldest first."""
    total = b
    for tap, x in zip(w, window, strict=True):
        total = tap * x if total is None else total + tap * x
    return total


def _masked_window(plan, seen, older, x):
    """The K + 1 inputs of one token's taps, oldest first; those that do not count are zero, for later tokens too.

    seen: of the token; None where all of them count.
    """
    if seen is None:
        return [*older, x]
    zero = jnp.zeros_like(x)
    older = [_where(seen > plan.before - i, tap, zero) for i, tap in enumerate(older)]
    return [*older, _where(seen > 0, x, zero)]


def _where(condition, array, other):
    """`array` if the scalar condition holds, else `other`."""
    return lax.select(lax.broadcast_in_dim(condition, array.shape, ()), array, other)


def _by_block(plan, seen, work, carry):
    """`work(seen of tokens matters, *carry)` of a block of tokens whose first one's `seen` is given."""
    if not plan.segments:
        return work(False, *carry)
    of_whole, of_others = (functools.partial(work, matters) for matters in (False, True))
    return lax.cond(seen[()] >= WHOLE, of_whole, of_others, *carry)


def _load(ref):
    return plgpu.load(ref, layout=LAYOUT).astype(F32)


def _coordinates(plan):
    """(batch index, part, its first token, blocks in it, its channels)."""
    part = lax.axis_index("part")
    first = part * plan.part_blocks
    n_blocks = -(-plan.tokens // plan.block)
    steps = jnp.minimum(plan.part_blocks, n_blocks - first)
    channels = pl.ds(lax.axis_index("channels") * CHANNELS, CHANNELS)
    return lax.axis_index("batch"), part, first * plan.block, steps, channels


def _weights(plan, w_g, channels):
    """(taps, oldest first; bias or None) of the channels."""
    w = [plgpu.load(w_g.at[j, channels], layout=LAYOUT) for j in range(plan.before + 1)]
    b = plgpu.load(w_g.at[plan.before + 1, channels], layout=LAYOUT) if plan.bias else None
    return w, b


def _start_before(plan, x_g, state_g, halo, bar, where):
    """Starts the copy of the K inputs before a part: earlier tokens or the initial state, see `_older`."""
    b, part, begin, channels = where
    earlier = x_g.at[b, pl.ds(jnp.maximum(begin - plan.before, 0) + plan.margin, plan.before), channels]
    if not plan.initial:
        plgpu.copy_gmem_to_smem(earlier, halo, bar)
        return

    @pl.when(part > 0)
    def _():
        plgpu.copy_gmem_to_smem(earlier, halo, bar)

    @pl.when(part == 0)
    def _():
        plgpu.copy_gmem_to_smem(state_g.at[b, :, channels], halo, bar)


def _older(plan, halo, part):
    """The K inputs before a part, oldest first; zeros before a row without an initial state."""
    rows = [_load(halo.at[r]) for r in range(plan.before)]
    return rows if plan.initial else [_where(part > 0, row, jnp.zeros_like(row)) for row in rows]


def _fetch_seen(plan, seen_g, seen_s, bar, b, start):
    """Copies `seen` from a whole block's first token on: a copy starts at multiples of 16 bytes only."""
    plgpu.copy_gmem_to_smem(seen_g.at[b, pl.ds(start + plan.margin, SEEN)], seen_s, bar)


def _forward_body(plan, *refs):
    it = iter(refs)
    x_g, w_g = next(it), next(it)
    seen_g = next(it) if plan.segments else None
    state_g = next(it) if plan.initial else None
    y_g = next(it)
    b, part, begin, steps, channels = _coordinates(plan)
    block, stages = plan.block, plan.stages

    def scoped(x_s, seen_s, y_s, halo_s, full, ready):
        def fetch(i):
            slot = lax.rem(i, stages)
            start = begin + i * block + plan.margin
            plgpu.copy_gmem_to_smem(x_g.at[b, pl.ds(start, block), channels], x_s.at[slot], full.at[slot])
            if plan.segments:
                _fetch_seen(plan, seen_g, seen_s.at[slot], full.at[slot], b, begin + i * block)

        if plan.before:
            _start_before(plan, x_g, state_g, halo_s, ready, (b, part, begin, channels))
        for i in range(stages):
            pl.when(i < steps)(functools.partial(fetch, i))
        w, bias = _weights(plan, w_g, channels)
        older = ()
        if plan.before:
            plgpu.barrier_wait(ready)
            older = tuple(_older(plan, halo_s, part))

        def step(i, older):
            slot, out = lax.rem(i, stages), lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            plgpu.barrier_wait(full.at[slot])

            def tokens(masked, *older):
                for r in range(block):
                    seen = seen_s[slot, r] if masked else None
                    window = _masked_window(plan, seen, older, _load(x_s.at[slot, r]))
                    y = _sum_of_taps(w, bias, window)
                    if plan.silu:
                        y *= _silu_parts(y)
                    if masked:
                        y = _where(seen > 0, y, jnp.zeros_like(y))
                    y_s[out, r] = y.astype(plan.dtype)
                    older = window[1:]
                return tuple(older)

            older = _by_block(plan, seen_s.at[slot, 0] if plan.segments else None, tokens, older)
            plgpu.commit_smem()  # all have read the slot, too
            start = begin + i * block + plan.margin
            plgpu.copy_smem_to_gmem(y_s.at[out], y_g.at[b, pl.ds(start, block), channels])
            pl.when(i + stages < steps)(functools.partial(fetch, i + stages))
            return older

        lax.fori_loop(0, steps, step, older)
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scoped,
        plgpu.SMEM((stages, block, CHANNELS), plan.dtype),
        plgpu.SMEM((stages, SEEN), jnp.int32) if plan.segments else None,
        plgpu.SMEM((2, block, CHANNELS), plan.dtype),
        plgpu.SMEM((plan.before, CHANNELS), plan.dtype) if plan.before else None,
        plgpu.Barrier(num_arrivals=1 + plan.segments, num_barriers=stages),
        plgpu.Barrier(num_arrivals=1),
    )


@dataclasses.dataclass
class _Carry:
    """What the backward keeps from token to token, in registers."""

    older: list  # the K inputs before the next token, oldest first
    pending: list  # unfinished gradients of those inputs
    dw: list
    db: jax.Array | None

    def flat(self):
        return (*self.older, *self.pending, *self.dw, *([] if self.db is None else [self.db]))

    @classmethod
    def of(cls, plan, flat):
        k = plan.before
        rest = list(flat)
        return cls(rest[:k], rest[k : 2 * k], rest[2 * k : 3 * k + 1], rest[-1] if plan.bias else None)


def _backward_token(plan, weights, carry, x, dy, seen, counted=None):
    """One token; returns the gradient of the input K tokens before it, which is whole then.

    seen: as of `_masked_window`. counted: whether it counts in sums over tokens; None is yes.
    """
    w, bias = weights
    k = plan.before
    window = _masked_window(plan, seen, carry.older, x)
    ds = dy
    if plan.silu:
        s = _sum_of_taps(w, bias, window)
        gate = _silu_parts(s)
        ds = dy * (gate * (1.0 + s * (1.0 - gate)))
    if seen is not None:
        ds = _where(seen > 0, ds, jnp.zeros_like(ds))
    # Each of the K + 1 newest inputs gets its share; the newest has had none yet.
    shares = [*carry.pending, None]
    for i in range(k + 1):
        more = w[i] * ds
        if shares[i] is not None:
            more = shares[i] + more
            if seen is not None and i < k:
                more = _where(seen > k - i, more, shares[i])
        shares[i] = more
    summed = ds if counted is None else _where(counted, ds, jnp.zeros_like(ds))
    carry.dw = [total + summed * tap for total, tap in zip(carry.dw, window, strict=True)]
    if plan.bias:
        carry.db = carry.db + summed
    carry.older, carry.pending = window[1:], shares[1:]
    return shares[0]


def _backward_scratch(plan):
    """Rings of x, dy and `seen`, dx on its way out; the K inputs before the part, its first K x, dy and `seen`."""
    ring = plgpu.SMEM((plan.stages, plan.block, CHANNELS), plan.dtype)
    first = plgpu.SMEM((plan.before, CHANNELS), plan.dtype) if plan.before else None
    return (
        ring,
        ring,
        plgpu.SMEM((plan.stages, SEEN), jnp.int32) if plan.segments else None,
        plgpu.SMEM((2, plan.block, CHANNELS), plan.dtype),
        first,
        first,
        first,
        plgpu.SMEM((SEEN,), jnp.int32) if plan.segments and plan.before else None,
        plgpu.Barrier(num_arrivals=2 + plan.segments, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=3 + plan.segments),
    )


def _backward_body(plan, *refs):
    it = iter(refs)
    x_g, dy_g, w_g = next(it), next(it), next(it)
    seen_g = next(it) if plan.segments else None
    state_g = next(it) if plan.initial else None
    dx_g, dw_g = next(it), next(it)
    dstate_g = next(it) if plan.initial else None
    b, part, begin, steps, channels = _coordinates(plan)
    block, stages, k = plan.block, plan.stages, plan.before

    def scoped(x_s, dy_s, seen_s, dx_s, before_s, first_x_s, first_dy_s, first_seen_s, full, ready):
        def first_token(i):  # K tokens ahead of what is written
            start = begin + k + i * block
            return start, jnp.minimum(start, plan.tokens - 1) if plan.overhang else start

        def fetch(i):
            slot = lax.rem(i, stages)
            rows = pl.ds(first_token(i)[1] + plan.margin, block)
            plgpu.copy_gmem_to_smem(x_g.at[b, rows, channels], x_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(dy_g.at[b, rows, channels], dy_s.at[slot], full.at[slot])
            if plan.segments:
                _fetch_seen(plan, seen_g, seen_s.at[slot], full.at[slot], b, begin + i * block)

        if k:
            rows = pl.ds(begin + plan.margin, k)
            _start_before(plan, x_g, state_g, before_s, ready, (b, part, begin, channels))
            plgpu.copy_gmem_to_smem(x_g.at[b, rows, channels], first_x_s, ready)
            plgpu.copy_gmem_to_smem(dy_g.at[b, rows, channels], first_dy_s, ready)
            if plan.segments:
                _fetch_seen(plan, seen_g, first_seen_s, ready, b, begin)
        for i in range(stages):
            pl.when(i < steps)(functools.partial(fetch, i))
        weights = _weights(plan, w_g, channels)
        zero = plgpu.layout_cast(jnp.zeros((CHANNELS,), F32), LAYOUT)
        carry = _Carry([], [zero] * k, [zero] * (k + 1), zero if plan.bias else None)
        if k:
            plgpu.barrier_wait(ready)
            carry.older = _older(plan, before_s, part)
        for r in range(k):
            seen = first_seen_s[r] if plan.segments else None
            whole = _backward_token(
                plan, weights, carry, _load(first_x_s.at[r]), _load(first_dy_s.at[r]), seen, counted=part == 0
            )
            if plan.initial:

                @pl.when(part == 0)
                def _(whole=whole, r=r):
                    dstate_g[b, r, channels] = whole

        def step(i, flat):
            slot, out = lax.rem(i, stages), lax.rem(i, 2)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            plgpu.barrier_wait(full.at[slot])

            def tokens(masked, *flat):
                carry = _Carry.of(plan, flat)
                for r in range(block):
                    seen = seen_s[slot, k + r] if masked else None
                    x, dy = _load(x_s.at[slot, r]), _load(dy_s.at[slot, r])
                    if plan.overhang and r == 0:
                        start, taken = first_token(i)
                        dy = _where(start == taken, dy, jnp.zeros_like(dy))
                    dx = _backward_token(plan, weights, carry, x, dy, seen)
                    dx_s[out, r] = dx.astype(plan.dtype)
                return carry.flat()

            flat = _by_block(plan, seen_s.at[slot, k] if plan.segments else None, tokens, flat)
            plgpu.commit_smem()  # all have read the slot, too
            start = begin + i * block + plan.margin
            plgpu.copy_smem_to_gmem(dx_s.at[out], dx_g.at[b, pl.ds(start, block), channels])
            pl.when(i + stages < steps)(functools.partial(fetch, i + stages))
            return flat

        carry = _Carry.of(plan, lax.fori_loop(0, steps, step, carry.flat()))
        row = b * plan.parts + part
        for j, total in enumerate([*carry.dw, *([] if carry.db is None else [carry.db])]):
            dw_g[row, j, channels] = total
        plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(scoped, *_backward_scratch(plan))


def _call(plan, name, body, out, *arrays):
    """The kernel, under its name in profiles, on the arrays that are not None; under vmap one call after the other."""
    arrays = [array for array in arrays if array is not None]
    kernel = plgpu.kernel(
        named_body(name, body, plan),
        out_type=[jax.ShapeDtypeStruct(*shape_and_type) for shape_and_type in out],
        grid=(plan.batch, plan.parts, plan.padded_width // CHANNELS),
        grid_names=("batch", "part", "channels"),
        compiler_params=LANE_PARAMS,
    )
    return call_varying(jax.custom_batching.sequential_vmap(kernel), *arrays)


# Compiled by themselves, so that layers of one shape are traced and lowered once.
@functools.partial(jax.jit, static_argnums=(0,))
def forward(plan: Plan, x, w, seen, state):
    """y [B, plan.out_tokens, D] in plan.dtype.

    x [B, T, D]; w float32 [W, padded width], with a bias [W + 1, ...]; seen int32 [B, T or more] or None; state
    [B, K, D] in the type of x or None.
    """
    shape = (plan.batch, plan.out_tokens, plan.width)
    [y] = _call(plan, "causal_conv1d_forward", _forward_body, [(shape, plan.dtype)], x, w, seen, state)
    return y


@functools.partial(jax.jit, static_argnums=(0,))
def backward(plan: Plan, x, dy, w, seen, state):
    """(dx; dw float32 [B x parts, W (+ 1 with bias), padded width]; dstate float32 [B, K, padded width] or None)."""
    out = [
        ((plan.batch, plan.out_tokens, plan.width), plan.dtype),
        ((plan.batch * plan.parts, plan.before + 1 + plan.bias, plan.padded_width), F32),
    ]
    if plan.initial:
        out.append(((plan.batch, plan.before, plan.padded_width), F32))
    found = _call(plan, "causal_conv1d_backward", _backward_body, out, x, dy, w, seen, state)
    return tuple(found) if plan.initial else (*found, None)
