# SPDX-License-Identifier: Apache-2.0
"""What documents and padding mean to `causal_conv1d`, around any implementation of the convolution itself.

A tap counts if its token belongs to the document of the current one. That is decided by comparing ids as long as
padding does not stand between two tokens that see each other; where it does (rare, decided at run time unless the
caller excludes it), real tokens are first moved to the front of their rows and afterwards back.

A convolution is a function (x_BTD, w_DW, b_D, initial_state, seen_BT, activation) -> y_BTD with a gradient for the
first four; b_D, initial_state and seen_BT (see `count_taps`) may be None.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import segments


def convolve_documents(
    convolve: Callable,
    x_BTD,
    w_DW,
    b_D=None,
    *,
    activation=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    gaps=True,
):
    """`causal_conv1d` by the convolution."""
    n_before = w_DW.shape[1] - 1
    arrays = (x_BTD, w_DW, b_D, initial_state)
    if segment_ids is None:
        y_BTD = convolve(*arrays, None, activation)
        if not return_final_state:
            return y_BTD
        parts = [_start(x_BTD, initial_state, n_before), x_BTD[:, max(0, x_BTD.shape[1] - n_before) :]]
        before = jnp.concatenate(parts, axis=1)
        return y_BTD, before[:, before.shape[1] - n_before :]

    if n_before == 0 or not gaps:
        y_BTD, final_BWD = _as_is(convolve, arrays, segment_ids, activation)
    else:
        document_BT = segments.document_numbers(segment_ids)
        real_BT = segment_ids != 0
        resumed_BT = real_BT[:, 1:] & ~real_BT[:, :-1] & (document_BT[:, 1:] == document_BT[:, :-1])
        if initial_state is None:  # then what comes before a row's first token does not matter
            resumed_BT &= jnp.cumsum(real_BT, axis=1)[:, :-1] > 0
        y_BTD, final_BWD = _either_way(convolve, arrays, segment_ids, jnp.any(resumed_BT), activation)
    return (y_BTD, final_BWD) if return_final_state else y_BTD


def count_taps(ids_BT, n_before: int):
    """[B, T] int32: how many of its W taps, from the newest on, count for each token; 0 at padding.

    No padding may stand between tokens of a document, nor between what is before a row and its first token.
    """
    before_BT = jnp.pad(ids_BT, ((0, 0), (n_before, 0)), mode="edge")
    n_tokens = ids_BT.shape[1]
    counts_BT = ids_BT != 0
    total_BT = counts_BT.astype(jnp.int32)
    for distance in range(1, n_before + 1):
        counts_BT &= before_BT[:, n_before - distance :][:, :n_tokens] == ids_BT
        total_BT += counts_BT
    return total_BT


def _start(x_BTD, initial_state, n_before: int):
    if initial_state is None:
        return jnp.repeat(jnp.zeros_like(x_BTD[:, :1]), n_before, axis=1)  # of x, so that it is sharded like x
    return initial_state.astype(x_BTD.dtype)


def _as_is(convolve, arrays, ids_BT, activation):
    """(y, final state) where no padding stands between tokens that see each other."""
    x_BTD, w_DW, _, initial_state = arrays
    final_BWD = _final_state(x_BTD, _start(x_BTD, initial_state, w_DW.shape[1] - 1), ids_BT)
    return convolve(*arrays, count_taps(ids_BT, w_DW.shape[1] - 1), activation), final_BWD


def _real_first(convolve, arrays, ids_BT, activation):
    """The same with the real tokens of each row moved to its front, and back."""
    x_BTD, *others = arrays
    real_BT = ids_BT != 0
    order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
    place_BT = jnp.argsort(order_BT, axis=1)
    moved_BTD = jnp.take_along_axis(x_BTD, order_BT[:, :, None], axis=1)
    moved_ids_BT = jnp.take_along_axis(ids_BT, order_BT, axis=1)
    y_BTD, final_BWD = _as_is(convolve, (moved_BTD, *others), moved_ids_BT, activation)
    return jnp.take_along_axis(y_BTD, place_BT[:, :, None], axis=1), final_BWD


# A gradient of its own, so that the untaken way leaves nothing to keep for the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def _either_way(convolve, arrays, ids_BT, moves, activation):
    ways = (functools.partial(way, convolve, activation=activation) for way in (_real_first, _as_is))
    return jax.lax.cond(moves, *ways, arrays, ids_BT)


def _either_way_forward(convolve, arrays, ids_BT, moves, activation):
    return _either_way(convolve, arrays, ids_BT, moves, activation), (arrays, ids_BT, moves)


def _either_way_backward(convolve, activation, residuals, cotangents):
    arrays, ids_BT, moves = residuals

    def pull(way):
        return jax.vjp(lambda arrays: way(convolve, arrays, ids_BT, activation), arrays)[1](cotangents)[0]

    grads = jax.lax.cond(moves, lambda: pull(_real_first), lambda: pull(_as_is))
    return grads, None, None


_either_way.defvjp(_either_way_forward, _either_way_backward)


def _final_state(x_BTD, initial_state, ids_BT):
    """The last W - 1 raw inputs of the last document, whose real tokens stand together."""
    n_before = initial_state.shape[1]
    document_BT = segments.document_numbers(ids_BT)
    before_BTD = jnp.concatenate([initial_state, x_BTD], axis=1)
    document_BT_before = jnp.pad(document_BT, ((0, 0), (n_before, 0)))
    end_B = jnp.max(jnp.where(ids_BT != 0, jnp.arange(1, x_BTD.shape[1] + 1), 0), axis=1)
    index_BW = end_B[:, None] + jnp.arange(n_before)[None]
    final_BWD = jnp.take_along_axis(before_BTD, index_BW[:, :, None], axis=1)
    same_BW = jnp.take_along_axis(document_BT_before, index_BW, axis=1) == document_BT[:, -1:]
    return jnp.where(same_BW[:, :, None], final_BWD, 0)
