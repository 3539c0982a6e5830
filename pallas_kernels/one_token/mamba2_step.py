# SPDX-License-Identifier: Apache-2.0
"""One token of Mamba-2 between its projections on an NVIDIA GPU: convolutions, step size, state and readout in a
kernel that reads the state once and writes it where it lies.

As the mixer's own step has it (Dao & Gu 2024, equation 2, discretised with dt as in section 7), in the same types. A
kernel of Pallas Mosaic GPU for Hopper, whose thread block has TILE channels of one head of one row.

Axis letters: B batch, H heads, P head width, G state groups, N state size, W convolution window, c two of a kind.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import COL, F32, LOG2E, PARAMS, ROW, TILE, WGMMA, cols_of, named_body, rows_of
from pallas_kernels.one_token.limits import Weights


@dataclass(frozen=True)
class _Config:
    batch: int
    heads: int
    width: int
    groups: int
    n_state: int
    taps: int
    biased: tuple[bool, bool]
    dt_limit: tuple[float, float]


def mamba2_step(
    zx: jax.Array, BC: jax.Array, dt: jax.Array, window_x: jax.Array, window_BC: jax.Array, state: jax.Array,
    weights: Weights, *, dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """(y [B, H, P] in the type of zx, the windows behind the token, the state behind it).

    zx [B, 2, H, P], of which the second is x; BC [B, 2, G, N]; dt [B, H] before bias and softplus; window_x
    [B, W - 1, H, P], window_BC [B, W - 1, 2, G, N]; state [B, H, P, N], float32. window_x and state are given back in
    the same memory where the caller does not need them.
    """
    w = weights._replace(conv_x=jnp.moveaxis(weights.conv_x, -1, 0), conv_BC=jnp.moveaxis(weights.conv_BC, -1, 0))
    biased = w.conv_x_bias is not None, w.conv_BC_bias is not None
    n_batch, n_heads, width, n_state = state.shape
    cfg = _Config(n_batch, n_heads, width, BC.shape[2], n_state, w.conv_x.shape[0], biased, dt_limit)
    given = [a for a in w if a is not None]
    return tuple(_call(cfg, zx, BC, dt, window_x, window_BC, state, *given))


@functools.partial(jax.jit, static_argnums=0)
def _call(cfg: _Config, zx, BC, dt, window_x, window_BC, state, *given):
    in_place = jax.new_ref(window_x), jax.new_ref(state)
    kernel = pl.kernel(
        named_body("mamba2_step", _body, cfg),
        out_type=[
            jax.ShapeDtypeStruct(state.shape[:3], zx.dtype),
            jax.ShapeDtypeStruct(window_BC.shape, window_BC.dtype),
        ],
        mesh=plgpu.Mesh(grid=(cfg.batch, cfg.heads, cfg.width // TILE), grid_names=("row", "head", "channels")),
        compiler_params=PARAMS,
        name="mamba2_step",
    )
    y, new_BC = kernel(zx, BC, dt, window_BC, *in_place, *given)
    new_x, new_state = (jax.freeze(ref) for ref in in_place)
    return y, new_x, new_BC, new_state


def _body(cfg: _Config, *refs):
    pl.run_scoped(functools.partial(_run, cfg, *refs), plgpu.MemorySpace.SMEM((2, cfg.n_state), F32))


def _run(cfg, zx, BC, dt, window_BC, window_x, state, *refs):
    names = [name for name in Weights._fields if cfg.biased[0] or name != "conv_x_bias"]
    names = [name for name in names if cfg.biased[1] or name != "conv_BC_bias"]
    of = dict(zip(names, refs))
    y, new_BC, both_s = refs[len(names) :]
    b, h, channels = (lax.axis_index(name) for name in ("row", "head", "channels"))
    rows = pl.ds(channels * TILE, TILE)
    group = h // (cfg.heads // cfg.groups)

    def row(ref, *index):
        return plgpu.load(ref.at[(*index, rows)], layout=ROW, optimized=False)

    def states(ref, *index):
        layout = plgpu.Layout.WG_STRIDED((cfg.n_state,), vec_size=1)
        return plgpu.load(ref.at[index], layout=layout, optimized=False)

    old_state = plgpu.load(state.at[b, h, rows], layout=WGMMA, optimized=False)
    old_x = [row(window_x, b, j, h) for j in range(cfg.taps - 1)]
    x_taps = [row(of["conv_x"], j, h) for j in range(cfg.taps)]
    x_bias = row(of["conv_x_bias"], h) if cfg.biased[0] else None
    for i in range(2):
        old = [states(window_BC, b, j, i, group) for j in range(cfg.taps - 1)]
        taps = [states(of["conv_BC"], j, i, group) for j in range(cfg.taps)]
        bias = states(of["conv_BC_bias"], i, group) if cfg.biased[1] else None
        new = states(BC, b, i, group)
        both_s[i] = _convolved([*old, new], taps, bias)

        @pl.when((h % (cfg.heads // cfg.groups) == 0) & (channels == 0))
        def _(old=old, new=new, i=i):
            for j, a in enumerate([*old[1:], new]):
                new_BC[b, j, i, group] = a

    x_new = row(zx, b, 1, h)
    x = _convolved([*old_x, x_new], x_taps, x_bias)
    step = _softplus(dt[b, h].astype(F32) + of["dt_bias"][h])
    low, high = cfg.dt_limit
    step = step if low == 0 else jnp.maximum(step, low)
    step = step if high == math.inf else jnp.minimum(step, high)
    decay = jnp.exp2(-LOG2E * step * jnp.exp2(LOG2E * of["A_log"][h]))
    plgpu.commit_smem()  # both_s is read by other threads; and all that is read of windows is read before it is written
    B, C = (plgpu.load(both_s.at[i], layout=COL) for i in range(2))
    new = decay * old_state + rows_of(step * x, cfg.n_state) * cols_of(B)
    y_row = jnp.sum(new * cols_of(C), axis=1) + of["D"][h] * x
    y[b, h, rows] = y_row.astype(y.dtype)
    state[b, h, rows] = new
    for j, a in enumerate([*old_x[1:], x_new]):
        window_x[b, j, h, rows] = a


def _convolved(inputs: list, taps: list, bias) -> jax.Array:
    """silu of the sum of inputs times taps, float32, rounded as the inputs are."""
    y = sum(a.astype(F32) * tap for a, tap in zip(inputs, taps, strict=True))
    y = y if bias is None else y + bias
    return (y / (1 + jnp.exp2(-LOG2E * y))).astype(inputs[-1].dtype).astype(F32)


def _softplus(x: jax.Array) -> jax.Array:
    """max(x, 0) + log(1 + exp(-|x|)), the latter as 2 artanh of a third at most, by its series: as exact for small
    step sizes as for large ones."""
    e = jnp.exp2(-LOG2E * jnp.abs(x))
    t = e / (2 + e)
    square, total = t * t, t * t * (1 / 13)
    for n in (11, 9, 7, 5, 3):
        total = (total + 1 / n) * square
    return jnp.maximum(x, 0.0) + 2 * t * (1 + total)
