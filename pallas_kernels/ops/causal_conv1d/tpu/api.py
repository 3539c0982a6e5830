# SPDX-License-Identifier: Apache-2.0
"""Pallas TPU (Mosaic) implementation of `causal_conv1d`: XLA's one pass forward, a kernel for the gradients.

Forward XLA moves no byte too many, and fuses what is around; of the gradients it makes several passes, and the kernel
of tpu_backward.py one.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.mosaic_tpu import F32, LANES
from pallas_kernels.ops.causal_conv1d import xla
from pallas_kernels.ops.causal_conv1d.documents import convolve_documents
from pallas_kernels.ops.causal_conv1d.tpu import backward as tpu_backward
from pallas_kernels.ops.causal_conv1d.tpu.backward import EDGE, Blocks

TAPS = range(2, EDGE + 1)
DTYPES = (jnp.bfloat16, jnp.float32)
BLOCK_TOKENS = 256
STRIP_TOKENS = 32
BLOCK_TILES = 36  # the most tiles of 128 channels a block: more does not fit VMEM in float32


def supports(x, w, *_, **__) -> str | None:
    """Why the TPU kernel cannot serve this call of `causal_conv1d`, or None if it can."""
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}, the kernel takes bfloat16 and float32"
    if w.shape[1] not in TAPS:
        return f"taps of w ({w.shape[1]}) not within {TAPS[0]} to {TAPS[-1]}"
    return None


def causal_conv1d_tpu(x_BTD, w_DW, b_D=None, *, interpret=False, **settings):
    """See `pallas_kernels.causal_conv1d`. interpret: run the kernel in Pallas' interpreter, on any platform.

    Raises NotImplementedError, naming argument and limit, where `supports` gives a reason.
    """
    if reason := supports(x_BTD, w_DW):
        raise NotImplementedError(reason)
    return convolve_documents(functools.partial(_from_start, interpret), x_BTD, w_DW, b_D, **settings)


def _from_start(interpret, x_BTD, w_DW, b_D, initial_state, seen_BT, activation):
    return _convolve((activation, interpret), x_BTD, w_DW, b_D, initial_state, seen_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(static, x_BTD, w_DW, b_D, initial_state, seen_BT):
    activation, _ = static
    return xla.convolve(x_BTD, w_DW, b_D, xla.start_state(x_BTD, w_DW, initial_state), seen_BT, activation)


def _forward_rule(static, *arrays):
    return _convolve(static, *arrays), arrays


def _backward_rule(static, residuals, dy_BTD):
    x_BTD, w_DW, b_D, initial_state, seen_BT = residuals
    n_tokens, width = x_BTD.shape[1:]
    blocks, n_columns = make_blocks(static, *residuals)
    factor = 0.5 if blocks.silu else 1.0
    rows = jnp.concatenate([w_DW.T.astype(F32), *([] if b_D is None else [b_D.astype(F32)[None]])]) * factor
    weights = jnp.pad(rows, ((0, 0), (0, n_columns * blocks.channels - width)))
    # An array must not be smaller than a block of it.
    missing = (max(0, blocks.tokens - n_tokens), -width % LANES if n_columns == 1 else 0)
    pad = lambda array: jnp.pad(array, ((0, 0), (0, missing[0]), (0, missing[1]))) if any(missing) else array
    if blocks.masked:
        seen_BT = jnp.full(x_BTD.shape[:2], blocks.taps, jnp.int32) if seen_BT is None else seen_BT
        seen_BT = jnp.pad(seen_BT, ((0, 0), (0, -n_tokens % blocks.tokens)))[:, None]
    state = None
    if blocks.initial:
        gap = EDGE - blocks.before
        state = jnp.pad(initial_state.astype(F32), ((0, 0), (gap, 0), (0, missing[1])))
    dx_BTD, sums, dstate = tpu_backward.backward(blocks, pad(x_BTD), pad(dy_BTD), weights, seen_BT, state)
    sums = sums.sum(axis=0)[:, :width] * factor
    if dstate is not None:
        dstate = dstate[:, EDGE - blocks.before :, :width].astype(initial_state.dtype)
    dw_DW = sums[: blocks.taps].T.astype(w_DW.dtype)
    db_D = None if b_D is None else sums[blocks.taps].astype(b_D.dtype)
    return dx_BTD[:, :n_tokens, :width], dw_DW, db_D, dstate, None


_convolve.defvjp(_forward_rule, _backward_rule)


def make_blocks(static, x_BTD, w_DW, b_D, initial_state, seen_BT) -> tuple[Blocks, int]:
    """Sizes by shape, and how many blocks of channels there are: one for each core if rows do not go round."""
    activation, interpret = static
    n_batch, n_tokens, width = x_BTD.shape
    n_tiles = -(-width // LANES)
    n_columns = -(-n_tiles // BLOCK_TILES)
    chip = platform.tpu_chip()
    cores = 1 if chip is None else chip.cores
    if n_batch % cores and n_tiles >= cores:
        n_columns = -(-n_columns // cores) * cores
    channels = -(-n_tiles // n_columns) * LANES
    tokens = min(BLOCK_TOKENS, -(-n_tokens // STRIP_TOKENS) * STRIP_TOKENS)
    blocks = Blocks(
        taps=w_DW.shape[1],
        tokens=tokens,
        strip=STRIP_TOKENS,
        channels=channels,
        bias=b_D is not None,
        silu=activation == "silu",
        masked=seen_BT is not None or n_tokens % tokens > 0,
        initial=initial_state is not None,
        interpret=interpret,
    )
    return blocks, -(-width // channels)
