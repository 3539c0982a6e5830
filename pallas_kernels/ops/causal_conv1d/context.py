# SPDX-License-Identifier: Apache-2.0
"""`causal_conv1d` with its tokens split over devices, on top of any implementation.

A device needs the last W - 1 real inputs before its tokens, which may stand on several devices where shards are short
or padding. Each sends the last inputs of its last document; see `pallas_kernels.context` for the exchange.

Axis letters beyond hybridlm's: K = W - 1 inputs, oldest first.
"""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.platform import platform
from pallas_kernels.segments import document_numbers
from pallas_kernels.varying import vary_alike


class _Window(typing.NamedTuple):
    """The last inputs of a run of tokens."""

    inputs_BKD: jax.Array  # of its last document, zeros where that has fewer
    count_B: jax.Array  # how many of them it has
    documents: context.Documents | None


def causal_conv1d_context(convolve: Callable, args: tuple, *, context_axis: str, **options):
    """`convolve(*args, **options)`, an implementation of causal_conv1d, on tokens split over the axis."""
    args, options = vary_alike((args, options))
    x_BTD, w_DW, bias_D = args
    n_before = w_DW.shape[1] - 1
    if n_before == 0:
        return convolve(*args, **options)
    segment_ids, initial_state = options["segment_ids"], options["initial_state"]
    x_BTD, inputs_BKD, count_B = _last_inputs(x_BTD, segment_ids, n_before)
    own = context.sent(_Window(inputs_BKD, count_B, context.describe(segment_ids)))
    if initial_state is None:
        initial_state = jnp.zeros_like(own.inputs_BKD)
    start = _Window(
        initial_state.astype(x_BTD.dtype), jnp.full_like(own.count_B, n_before), context.nothing(own.documents)
    )
    entering = context.before(_joined, start, own, context_axis)
    is_cut = context.is_cut(entering.documents, own.documents)
    options["initial_state"] = jnp.where(is_cut[..., None, None], 0, entering.inputs_BKD)
    out = convolve(x_BTD, w_DW, bias_D, **options)
    if not options["return_final_state"]:
        return out
    return out[0], context.from_last(out[1], context_axis)


def _joined(earlier: _Window, later: _Window) -> _Window:
    n_before = later.inputs_BKD.shape[1]
    ends_B = context.is_cut(earlier.documents, later.documents)
    if later.documents is not None:
        ends_B |= later.documents.starts_B != 0
    place_BK = later.count_B[:, None] + jnp.arange(n_before)[None]  # in the earlier inputs and then the later ones
    earlier_BKD = _rows(earlier.inputs_BKD, jnp.minimum(place_BK, n_before - 1))
    own_BK = (place_BK >= n_before)[:, :, None]
    inputs_BKD = jnp.where(own_BK, later.inputs_BKD, jnp.where(ends_B[..., None, None], 0, earlier_BKD))
    count_B = jnp.where(ends_B, later.count_B, jnp.minimum(earlier.count_B + later.count_B, n_before))
    return _Window(inputs_BKD, count_B, context.join(earlier.documents, later.documents))


def _last_inputs(x_BTD, segment_ids, n_before: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x_BTD, inputs_BKD, count_B) of one device's tokens: x to go on with, see `_tap`."""
    n_batch, n_tokens, _ = x_BTD.shape
    wanted_K = n_before - jnp.arange(n_before)
    if segment_ids is None:
        count_B = jnp.full((n_batch,), min(n_tokens, n_before), jnp.int32)
        index_BK = jnp.broadcast_to(n_tokens - wanted_K, (n_batch, n_before))
    else:
        document_BT = document_numbers(segment_ids)
        last_BT = (segment_ids != 0) & (document_BT == document_BT[:, -1:])
        rank_BT = jnp.where(
            last_BT, jax.lax.cumsum(last_BT.astype(jnp.int32), axis=1, reverse=True), 0
        )  # from 1, at the end
        count_B = jnp.minimum(last_BT.sum(axis=1, dtype=jnp.int32), n_before)
        index_BK = jnp.argmax(rank_BT[:, None, :] == wanted_K[None, :, None], axis=2)
    exists_BK = count_B[:, None] >= wanted_K[None]
    return *_tap(x_BTD, index_BK, exists_BK), count_B


@jax.custom_vjp
def _tap(x_BTD, index_BK, exists_BK):
    """(x, x[b, index[b, k]] where that exists, else 0). The gradient of the few is added to that of all in place on a
    GPU, where another way would be one more pass over all; elsewhere it is a sum, which XLA fuses."""
    return x_BTD, jnp.where(exists_BK[:, :, None], _rows(x_BTD, jnp.where(exists_BK, index_BK, 0)), 0)


def _tap_forward(x_BTD, index_BK, exists_BK):
    return _tap(x_BTD, index_BK, exists_BK), (index_BK, exists_BK)


def _tap_backward(saved, cotangents):
    (index_BK, exists_BK), (dx_BTD, d_BKD) = saved, cotangents
    n_tokens, n_before = dx_BTD.shape[1], index_BK.shape[1]
    if platform() != "gpu":
        d_BKD = jnp.where(exists_BK[:, :, None], d_BKD, 0)
        return dx_BTD + _sum_of_rows(index_BK, d_BKD, n_tokens), None, None
    nowhere_K = n_tokens + jnp.arange(n_before, dtype=index_BK.dtype)
    add = lambda dx_TD, at_K, d_KD: dx_TD.at[at_K].add(d_KD, mode="drop", unique_indices=True)
    return jax.vmap(add)(dx_BTD, jnp.where(exists_BK, index_BK, nowhere_K), d_BKD), None, None


_tap.defvjp(_tap_forward, _tap_backward)


@jax.custom_vjp
def _rows(x_BTD, index_BK):
    """x[b, index[b, k]]; the gradient is a sum over k that XLA fuses with what it is added to, and no scatter."""
    return _rows_forward(x_BTD, index_BK)[0]


def _rows_forward(x_BTD, index_BK):
    return jnp.take_along_axis(x_BTD, index_BK[:, :, None], axis=1), (index_BK, x_BTD[:, :, :0])


def _rows_backward(residuals, dout_BKD):
    index_BK, like_BT0 = residuals
    return _sum_of_rows(index_BK, dout_BKD, like_BT0.shape[1]), None


def _sum_of_rows(index_BK, rows_BKD, n_tokens: int):
    """[B, T, D]: the sum of each token's rows."""
    token_T = jnp.arange(n_tokens)
    parts = (
        jnp.where((index_BK[:, k, None] == token_T[None])[:, :, None], rows_BKD[:, k, None], 0)
        for k in range(index_BK.shape[1])
    )
    return sum(parts)


_rows.defvjp(_rows_forward, _rows_backward)
