# SPDX-License-Identifier: Apache-2.0
"""`selective_scan` on TPUs: what the kernels serve, blocks, layouts and the custom gradient."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic_tpu import F32, LANES, SUBLANES, round_up
from pallas_kernels.ops.selective_scan.tpu import kernels
from pallas_kernels.ops.selective_scan.tpu.kernels import CHUNK, Blocks
from pallas_kernels.segments import document_starts

DTYPES = (jnp.bfloat16, jnp.float32)
MOST_STATES = 64
MOST_CHANNELS = 2**15  # whose states stay in VMEM
BLOCK = 512  # channels of a block at most: more of them spill
# What a token tells the kernels: it is padding, or begins a document, or neither (0). The latter is added to its log
# decays, and nothing is left of a state.
PADDING = 1.0
BETWEEN_DOCUMENTS = -1e9


def supports(x, dt, A, B, C, **options) -> str | None:
    """Why the TPU kernels cannot serve this call of `selective_scan`, or None if they can."""
    del C, options
    for name, array in (("x_BTD", x), ("dt_BTD", dt), ("B_BTN", B)):
        if array.dtype not in DTYPES:
            return f"dtype of {name} ({array.dtype}) is neither bfloat16 nor float32"
    if A.dtype != F32:
        return f"dtype of A_DN ({A.dtype}) is not float32"
    if A.shape[1] > MOST_STATES:
        return f"state size of A_DN ({A.shape[1]}) above {MOST_STATES}"
    if x.shape[2] > MOST_CHANNELS:
        return f"channels of x_BTD ({x.shape[2]}) above {MOST_CHANNELS}"
    return None


def selective_scan_tpu(
    x_BTD,
    dt_BTD,
    A_DN,
    B_BTGN,
    C_BTGN,
    *,
    D=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
    interpret=False,
):
    """See `pallas_kernels.selective_scan`; chunks are 128 tokens, `chunk` is a hint not followed. Padding may hold
    anything. interpret: run the kernels in Pallas' interpreter, on any platform.

    Tokens, channels of a group and states are padded with zeros, which change nothing.
    Raises NotImplementedError, naming argument and limit, where `supports` gives a reason.
    """
    del chunk
    if reason := supports(x_BTD, dt_BTD, A_DN, B_BTGN, C_BTGN):
        raise NotImplementedError(reason)
    (n_batch, n_tokens, n_channels), (n_groups, d_state) = x_BTD.shape, B_BTGN.shape[2:]
    in_group = n_channels // n_groups
    lanes = min(BLOCK, round_up(in_group, LANES))
    wide, states, tokens = round_up(in_group, lanes), round_up(d_state, SUBLANES), round_up(n_tokens, CHUNK)
    blocks = Blocks(
        lanes=lanes,
        blocks=n_groups * wide // lanes,
        per_group=wide // lanes,
        states=states,
        dtype=str(x_BTD.dtype),
        skip=D is not None,
        segments=segment_ids is not None,
        initial=initial_state is not None,
        final=return_final_state,
    )

    def channels(array):
        """[..., D] with each group's channels in whole blocks."""
        if wide == in_group:
            return array
        array = array.reshape(*array.shape[:-1], n_groups, in_group)
        array = jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, wide - in_group)])
        return array.reshape(*array.shape[:-2], -1)

    def cut(array):
        """The inverse of `channels`."""
        array = array.reshape(*array.shape[:-1], n_groups, wide)[..., :in_group]
        return array.reshape(*array.shape[:-2], n_channels)

    def by_token(array):
        return channels(jnp.pad(array, ((0, 0), (0, tokens - n_tokens), (0, 0))))

    marks, maps = _marks(segment_ids), []
    for array in (B_BTGN, C_BTGN):
        array = array.astype(F32)
        array = array if marks is None else jnp.where((marks <= 0.0)[:, :, None, None], array, 0.0)
        array = jnp.pad(array, ((0, 0), (0, tokens - n_tokens), (0, 0), (0, states - d_state)))
        maps.append(array.transpose(0, 2, 3, 1))
    if marks is not None:
        marks = jnp.pad(marks, ((0, 0), (0, tokens - n_tokens)))
        marks = jnp.broadcast_to(marks[:, :, None], (n_batch, tokens, LANES))
    by_state = lambda array: channels(jnp.pad(array.swapaxes(-1, -2), [(0, 0)] * (array.ndim - 2) + [
        (0, states - d_state), (0, 0)]))  # fmt: skip
    skip = None if D is None else channels(D.astype(F32)[None])
    initial = None if initial_state is None else by_state(initial_state.astype(F32))
    x, dt = by_token(x_BTD), by_token(dt_BTD.astype(F32))
    y, last = _scan((blocks, interpret), x, dt, by_state(A_DN), *maps, skip, marks, initial)
    y = cut(y[:, :n_tokens])
    return (y, cut(last)[:, :d_state].swapaxes(1, 2)) if return_final_state else y


def _marks(segment_ids):
    """What each token tells the kernels, float32 [B, T], None without segment ids."""
    if segment_ids is None:
        return None
    return jnp.where(segment_ids != 0, jnp.where(document_starts(segment_ids), BETWEEN_DOCUMENTS, 0.0), PADDING)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(static, x, dt, A, B, C, skip, marks, initial):
    """(y [B, T, D], last [B, N, D] or None) of whole chunks, blocks of channels and registers of states."""
    out = _forward(static, x, dt, A, B, C, skip, marks, initial, keep=False)
    return out["y"], out.get("last")


def _inputs(x, dt, A, B, C, skip, marks) -> dict:
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": skip, "marks": marks}
    return {name: array for name, array in inputs.items() if array is not None}


def _forward(static, *arrays, keep: bool) -> dict:
    blocks, interpret = static
    inputs = _inputs(*arrays[:-1]) | ({} if arrays[-1] is None else {"initial": arrays[-1]})
    return kernels.forward(inputs, blocks, keep=keep, interpret=interpret)


def _forward_rule(static, *arrays):
    out = _forward(static, *arrays, keep=True)
    return (out["y"], out.get("last")), (arrays[:-1], out["states"])


def _backward_rule(static, residuals, cotangents):
    blocks, interpret = static
    arrays, states = residuals
    dy, dlast = cotangents
    inputs = _inputs(*arrays) | {"states": states, "dy": dy} | ({"dlast": dlast} if blocks.final else {})
    grads = kernels.backward(inputs, blocks, interpret=interpret)
    x, B = arrays[0], arrays[3]
    dmaps = []
    for name in ("dB", "dC"):
        by_token = grads[name].reshape(*B.shape[:2], x.shape[1], blocks.states)
        dmaps.append(by_token.swapaxes(2, 3))
    dskip = grads["dD"].sum((0, 1))[None] if blocks.skip else None
    return grads["dx"], grads["ddt"], grads["dA"].sum(0), *dmaps, dskip, None, grads.get("dinitial")


_scan.defvjp(_forward_rule, _backward_rule)
