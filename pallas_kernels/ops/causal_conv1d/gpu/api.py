# SPDX-License-Identifier: Apache-2.0
"""Pallas Mosaic GPU (Hopper) implementation of `causal_conv1d`: argument checks, sizes and the hand-written gradient.

The kernels stand in gpu_kernels.py; around them are only arrays without a width, or without tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.mosaic_gpu import F32
from pallas_kernels.ops.causal_conv1d.documents import convolve_documents
from pallas_kernels.ops.causal_conv1d.gpu import kernels as gpu_kernels
from pallas_kernels.ops.causal_conv1d.gpu.kernels import CHANNELS, Plan

MOST_TAPS = 8
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
COPY_BYTES = 16  # rows of x must start at multiples of it
# Zeros in front of and behind the tokens, and what widths are padded to: only the tests' interpreter, which copies no
# tile that reaches outside of an array, needs any.
MARGIN, WIDTH_MULTIPLE = 0, 1
FEWEST_TOKENS = 64  # of a part of a row
# (tokens a stage, stages, thread blocks that a multiprocessor holds) by W - 1 up to 4 and above.
FORWARD = ((16, 4, 4), (16, 4, 4))
BACKWARD = ((8, 2, 4), (4, 6, 3))


def supports(x, w, *_, **__) -> str | None:
    """Why the GPU kernel cannot serve this call of `causal_conv1d`, or None if it can."""
    if x.dtype not in DTYPES:
        return f"x has dtype {x.dtype}, the kernel takes bfloat16, float16 and float32"
    if w.shape[1] > MOST_TAPS:
        return f"taps of w ({w.shape[1]}) above {MOST_TAPS}"
    if x.shape[2] * x.dtype.itemsize % COPY_BYTES:
        return f"bytes of a token of x ({x.shape[2] * x.dtype.itemsize}) no multiple of {COPY_BYTES}"
    return None


def causal_conv1d_gpu(x_BTD, w_DW, b_D=None, **settings):
    """See `pallas_kernels.causal_conv1d`.

    Raises NotImplementedError, naming argument and limit, where `supports` gives a reason.
    """
    if reason := supports(x_BTD, w_DW):
        raise NotImplementedError(reason)
    return convolve_documents(_from_start, x_BTD, w_DW, b_D, **settings)


def _from_start(x_BTD, w_DW, b_D, initial_state, seen_BT, activation):
    return _convolve(activation, x_BTD, w_DW, b_D, initial_state, seen_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation, x_BTD, w_DW, b_D, initial_state, seen_BT):
    plan = make_plan(FORWARD, activation, x_BTD, w_DW, b_D, initial_state, seen_BT)
    y_BTD = gpu_kernels.forward(plan, *_prepare(plan, (x_BTD,), w_DW, b_D, initial_state, seen_BT))
    return _cut(plan, y_BTD, x_BTD.shape[2])


def _forward_rule(activation, *arrays):
    return _convolve(activation, *arrays), arrays


def _backward_rule(activation, residuals, dy_BTD):
    x_BTD, w_DW, b_D, initial_state, _ = residuals
    plan = make_plan(BACKWARD, activation, *residuals)
    dx_BTD, parts, dstate = gpu_kernels.backward(plan, *_prepare(plan, (x_BTD, dy_BTD), *residuals[1:]))
    sums = parts.sum(axis=0)[:, : w_DW.shape[0]]
    n_taps = w_DW.shape[1]
    return (
        _cut(plan, dx_BTD, x_BTD.shape[2]),
        sums[:n_taps].T.astype(w_DW.dtype),
        None if b_D is None else sums[n_taps].astype(b_D.dtype),
        None if initial_state is None else _state_gradient(plan, dstate, x_BTD, initial_state),
        None,
    )


_convolve.defvjp(_forward_rule, _backward_rule)


def _state_gradient(plan, dstate, x_BTD, initial_state):
    if plan.before == 0:
        return jnp.zeros_like(initial_state)
    return dstate[:, :, : x_BTD.shape[2]].astype(initial_state.dtype)


def make_plan(sizes, activation, x_BTD, w_DW, b_D, initial_state, seen_BT) -> Plan:
    """Sizes by shape: parts of rows so that the last round of thread blocks is full, if tokens allow."""
    n_batch, n_tokens, width = x_BTD.shape
    n_before = w_DW.shape[1] - 1
    block, stages, resident = sizes[n_before > 4]
    plan = Plan(
        batch=n_batch,
        tokens=n_tokens,
        width=width + -width % WIDTH_MULTIPLE,
        before=n_before,
        block=block,
        stages=stages,
        part_blocks=1,
        bias=b_D is not None,
        silu=activation == "silu",
        segments=seen_BT is not None,
        initial=initial_state is not None and n_before > 0,
        dtype=jnp.dtype(x_BTD.dtype),
        margin=MARGIN,
    )
    places = platform.multiprocessors() * resident  # of thread blocks
    columns = n_batch * plan.padded_width // CHANNELS
    n_blocks = -(-n_tokens // block)

    def cost(part_blocks):  # tokens that a multiprocessor's place walks one after the other
        rounds = -(-columns * -(-n_blocks // part_blocks) // places)
        return rounds * (part_blocks * block + 2 * n_before + block)

    choices = range(min(n_blocks, FEWEST_TOKENS // block), n_blocks + 1)
    return dataclasses.replace(plan, part_blocks=min(choices, key=cost))


def _prepare(plan, inputs, w_DW, b_D, initial_state, seen_BT):
    """The kernel's arrays: `inputs` [B, T, D]; taps and bias as rows, padded to whole thread blocks; seen; state."""
    rows = jnp.concatenate([w_DW.T.astype(F32), *([] if b_D is None else [b_D.astype(F32)[None]])])
    weights = jnp.pad(rows, ((0, 0), (0, plan.padded_width - rows.shape[1])))
    initial_state = _pad_width(plan, initial_state.astype(plan.dtype)) if plan.initial else None
    if seen_BT is not None:
        seen_BT = _with_whole_blocks(plan, seen_BT)  # and rows start at multiples of 16 bytes
        seen_BT = jnp.pad(seen_BT, ((0, 0), (plan.margin, plan.margin + -plan.tokens % (COPY_BYTES // 4))))
    if plan.margin:
        inputs = [jnp.pad(_pad_width(plan, a), ((0, 0), (plan.margin, plan.margin), (0, 0))) for a in inputs]
    return *inputs, weights, seen_BT, initial_state


def _with_whole_blocks(plan, seen_BT):
    n_tokens, last = seen_BT.shape[1], plan.block - 1
    whole_BT = jnp.pad(seen_BT > plan.before, ((0, 0), (0, last)))
    ahead = (whole_BT[:, distance : distance + n_tokens] for distance in range(plan.block))
    return seen_BT + gpu_kernels.WHOLE * functools.reduce(jnp.logical_and, ahead)


def _pad_width(plan, array):
    missing = plan.width - array.shape[-1]
    return jnp.pad(array, ((0, 0), (0, 0), (0, missing))) if missing else array


def _cut(plan, array, width):
    if plan.out_tokens == plan.tokens and plan.width == width:
        return array
    return array[:, plan.margin : plan.margin + plan.tokens, :width]
