# SPDX-License-Identifier: Apache-2.0
"""One token of Mamba-2 between its projections on an NVIDIA GPU: convolutions, step size, state and readout in a
kernel that reads the state once and writes it where it lies.

As the mixer's own step has it (Dao & Gu 2024, equation 2, discretised with dt as in section 7), in the same types. A
program of Triton has some channels of one head of one row. It runs interpreted on a CPU.

Axis letters: B batch, H heads, P head width, G state groups, N state size, W convolution window, c two of a kind.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import platform, triton

WARPS = 4
PROGRAMS = 2
"""For each multiprocessor at least, where channels of a head can be cut so often."""
LEAST = 8
"""Channels of a program at least."""


class Weights(NamedTuple):
    """Parameters of a mixer that the step reads, float32."""

    conv_x: jax.Array
    """[H, P, W]."""
    conv_x_bias: jax.Array | None
    """[H, P]."""
    conv_BC: jax.Array
    """[2, G, N, W]."""
    conv_BC_bias: jax.Array | None
    """[2, G, N]."""
    dt_bias: jax.Array
    """[H]."""
    A_log: jax.Array
    """[H]."""
    D: jax.Array
    """[H]."""


def serves(dtype: DTypeLike, state: jax.Array) -> str | None:
    """Why the kernel cannot serve activations of a type and a state, see `mamba2_step`; None where it can."""
    if reason := triton.why_not(dtype, *state.shape):
        return reason
    for name, n in (("head width", state.shape[2]), ("state size", state.shape[3])):
        if n & (n - 1) or not LEAST <= n <= 256:
            return f"{name} ({n}) is no power of two from {LEAST} to 256"
    return None


def mamba2_step(
    zx: jax.Array, BC: jax.Array, dt: jax.Array, window_x: jax.Array, window_BC: jax.Array, state: jax.Array,
    weights: Weights, *, dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(y [B, H, P] in the type of zx, the windows behind the token, the state behind it).

    zx [B, 2, H, P], of which the second is x; BC [B, 2, G, N]; dt [B, H] before bias and softplus; window_x
    [B, W - 1, H, P], window_BC [B, W - 1, 2, G, N]; state [B, H, P, N], float32. window_x and state are given back in
    the same memory where the caller does not need them.
    """
    n_batch, n_heads, width = state.shape[:3]
    per_group, taps = n_heads // BC.shape[2], weights.conv_x.shape[-1]
    channels = _channels(n_batch * n_heads, width)
    given = [a for a in weights if a is not None]

    def kernel(zx_ref, BC_ref, dt_ref, window_x_ref, window_BC_ref, state_ref, *refs):
        ins, (y_ref, new_x_ref, new_BC_ref, new_state_ref) = list(refs[: len(given)]), refs[len(given) :]
        of = Weights(*(None if a is None else ins.pop(0) for a in weights))
        b, h, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * channels
        g, at = h // per_group, pl.ds(first, channels)

        def tap(ref, *index):
            return [ref[(*index, j)].astype(jnp.float32) for j in range(taps)]

        # all that is read of windows is read before anything is written: x's is the same memory
        x_old = [window_x_ref[b, j, h, at] for j in range(taps - 1)]
        x_new = zx_ref[b, 1, h, at]
        bias = None if of.conv_x_bias is None else of.conv_x_bias[h, at]
        x = _convolved([*x_old, x_new], tap(of.conv_x, h, at), bias)
        both = []
        for i in range(2):
            old = [window_BC_ref[b, j, i, g, :] for j in range(taps - 1)]
            new = BC_ref[b, i, g, :]
            bias = None if of.conv_BC_bias is None else of.conv_BC_bias[i, g, :]
            both.append(_convolved([*old, new], tap(of.conv_BC, i, g, slice(None)), bias))

            @pl.when((h % per_group == 0) & (first == 0))
            def _(old=old, new=new, i=i):
                for j, a in enumerate([*old[1:], new]):
                    new_BC_ref[b, j, i, g, :] = a

        B, C = both
        dt = _softplus(dt_ref[b, h].astype(jnp.float32) + of.dt_bias[h])
        if dt_limit != (0.0, math.inf):
            dt = jnp.clip(dt, *dt_limit)
        decay = jnp.exp(-dt * jnp.exp(of.A_log[h]))
        state = decay * state_ref[b, h, at, :] + (dt * x)[:, None] * B[None]
        y_ref[b, h, at] = ((state * C[None]).sum(axis=1) + of.D[h] * x).astype(y_ref.dtype)
        new_state_ref[b, h, at, :] = state
        for j, a in enumerate([*x_old[1:], x_new]):
            new_x_ref[b, j, h, at] = a

    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    out: Any = [jax.ShapeDtypeStruct(state.shape[:3], zx.dtype), like(window_x), like(window_BC), like(state)]
    grid, aliases = (n_batch, n_heads, width // channels), {3: 1, 5: 3}
    call = triton.call(kernel, grid, out, "mamba2_step", WARPS, aliases=aliases)
    return tuple(call(zx, BC, dt, window_x, window_BC, state, *given))


def _channels(heads: int, width: int) -> int:
    """Of a program: so many that every multiprocessor has some programs."""
    channels = width
    while channels > LEAST and heads * (width // channels) < PROGRAMS * platform.multiprocessors():
        channels //= 2
    return channels


def _convolved(inputs: list, taps: list, bias) -> jax.Array:
    """silu of the sum of inputs times taps, float32, rounded as the inputs are."""
    y = sum(a.astype(jnp.float32) * tap for a, tap in zip(inputs, taps, strict=True))
    y = y if bias is None else y + bias
    return (y / (1 + jnp.exp(-y))).astype(inputs[-1].dtype).astype(jnp.float32)


def _softplus(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
