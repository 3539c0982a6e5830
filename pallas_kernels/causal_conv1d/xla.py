# SPDX-License-Identifier: Apache-2.0
"""`causal_conv1d` as shifts and adds, which XLA fuses into one pass over x; the hand-written backward is alike.

A tap counts if its token belongs to the document of the current one. That is exact as long as padding does not stand
between two tokens that see each other; where it does (rare, decided at run time unless the caller excludes it), real
tokens are first moved to the front of their rows and afterwards back.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, segments


def causal_conv1d_xla(
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
    """See `pallas_kernels.causal_conv1d`."""
    n_tokens = x_BTD.shape[1]
    n_before = w_DW.shape[1] - 1
    starts_from_zero = initial_state is None
    if starts_from_zero:
        # Of x, so that it is sharded like x.
        initial_state = jnp.repeat(jnp.zeros_like(x_BTD[:, :1]), n_before, axis=1)
    if segment_ids is None:
        y_BTD = _convolve(x_BTD, w_DW, b_D, initial_state, None, None, activation)
        before = jnp.concatenate([initial_state.astype(x_BTD.dtype), x_BTD[:, max(0, n_tokens - n_before) :]], axis=1)
        final_BWD = before[:, before.shape[1] - n_before :]
        return (y_BTD, final_BWD) if return_final_state else y_BTD

    real_BT = segment_ids != 0
    document_BT = segments.document_numbers(segment_ids)
    arrays = (x_BTD, w_DW, b_D, initial_state)
    if n_before == 0 or not gaps:
        y_BTD, final_BWD = _as_is(arrays, real_BT, document_BT, activation)
    else:
        resumed_BT = real_BT[:, 1:] & ~real_BT[:, :-1] & (document_BT[:, 1:] == document_BT[:, :-1])
        if starts_from_zero:  # then what comes before a row's first token does not matter
            resumed_BT &= jnp.cumsum(real_BT, axis=1)[:, :-1] > 0
        y_BTD, final_BWD = _either_way(arrays, real_BT, document_BT, jnp.any(resumed_BT), activation)
    return (y_BTD, final_BWD) if return_final_state else y_BTD


def _as_is(arrays, real_BT, document_BT, activation):
    """(y, final state) where no padding stands between tokens that see each other."""
    x_BTD, w_DW, b_D, initial_state = arrays
    y_BTD = _convolve(x_BTD, w_DW, b_D, initial_state, real_BT, document_BT, activation)
    return y_BTD, _final_state(x_BTD, initial_state, real_BT, document_BT)


def _real_first(arrays, real_BT, document_BT, activation):
    """The same with the real tokens of each row moved to its front, and back."""
    x_BTD, *others = arrays
    order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
    place_BT = jnp.argsort(order_BT, axis=1)
    moved_BTD = jnp.take_along_axis(x_BTD, order_BT[:, :, None], axis=1)
    moved_real_BT = jnp.take_along_axis(real_BT, order_BT, axis=1)
    moved_document_BT = jnp.take_along_axis(document_BT, order_BT, axis=1)
    moved_document_BT = jnp.where(moved_real_BT, moved_document_BT, document_BT[:, -1:])
    y_BTD, final_BWD = _as_is((moved_BTD, *others), moved_real_BT, moved_document_BT, activation)
    return jnp.take_along_axis(y_BTD, place_BT[:, :, None], axis=1), final_BWD


# A gradient of its own, so that the untaken way leaves nothing to keep for the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _either_way(arrays, real_BT, document_BT, moves, activation):
    ways = (functools.partial(way, activation=activation) for way in (_real_first, _as_is))
    return jax.lax.cond(moves, *ways, arrays, real_BT, document_BT)


def _either_way_forward(arrays, real_BT, document_BT, moves, activation):
    return _either_way(arrays, real_BT, document_BT, moves, activation), (arrays, real_BT, document_BT, moves)


def _either_way_backward(activation, residuals, cotangents):
    arrays, real_BT, document_BT, moves = residuals

    def pull(way):
        return jax.vjp(lambda arrays: way(arrays, real_BT, document_BT, activation), arrays)[1](cotangents)[0]

    grads = jax.lax.cond(moves, lambda: pull(_real_first), lambda: pull(_as_is))
    return grads, None, None, None


_either_way.defvjp(_either_way_forward, _either_way_backward)


def _final_state(x_BTD, initial_state, real_BT, document_BT):
    """The last W - 1 raw inputs of the last document, whose real tokens stand together."""
    n_before = initial_state.shape[1]
    n_tokens = x_BTD.shape[1]
    before_BTD = jnp.concatenate([initial_state.astype(x_BTD.dtype), x_BTD], axis=1)
    document_BT_before = jnp.pad(document_BT, ((0, 0), (n_before, 0)))
    end_B = jnp.max(jnp.where(real_BT, jnp.arange(1, n_tokens + 1), 0), axis=1)
    index_BW = end_B[:, None] + jnp.arange(n_before)
    final_BWD = jnp.take_along_axis(before_BTD, index_BW[:, :, None], axis=1)
    same_BW = jnp.take_along_axis(document_BT_before, index_BW, axis=1) == document_BT[:, -1:]
    return jnp.where(same_BW[:, :, None], final_BWD, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _convolve(x_BTD, w_DW, b_D, initial_state, real_BT, document_BT, activation):
    return _convolve_forward(x_BTD, w_DW, b_D, initial_state, real_BT, document_BT, activation)[0]


def _convolve_forward(x_BTD, w_DW, b_D, initial_state, real_BT, document_BT, activation):
    sums_BTD = _sums(x_BTD, w_DW, b_D, initial_state, real_BT, document_BT)
    y_BTD = jax.nn.silu(sums_BTD) if activation == "silu" else sums_BTD
    if real_BT is not None:
        y_BTD = jnp.where(real_BT[:, :, None], y_BTD, 0)
    return y_BTD.astype(x_BTD.dtype), (x_BTD, w_DW, b_D, initial_state, real_BT, document_BT)


def _taps(x_BTD, initial_state, real_BT, document_BT):
    """Yields for each tap j (array [B, T, D] that meets w[:, j], mask [B, T, 1] of where it counts or None).

    Where a tap does not count it may hold anything.
    """
    n_tokens = x_BTD.shape[1]
    n_before = initial_state.shape[1]
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    before_BTD = jnp.concatenate([initial_state.astype(x_BTD.dtype), x_BTD], axis=1)
    # Padding is of no document; masking x itself instead would cost another pass over it.
    documents = None if document_BT is None else jnp.pad(jnp.where(real_BT, document_BT, -1), ((0, 0), (n_before, 0)))
    for j in range(n_before + 1):
        counts = None
        if document_BT is not None:
            counts = (real_BT & (documents[:, j : j + n_tokens] == document_BT))[:, :, None]
        yield before_BTD[:, j : j + n_tokens].astype(dtype), counts


def _sums(x_BTD, w_DW, b_D, initial_state, real_BT, document_BT):
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    total_BTD = 0 if b_D is None else b_D.astype(dtype)
    for j, (tap_BTD, counts) in enumerate(_taps(x_BTD, initial_state, real_BT, document_BT)):
        term_BTD = tap_BTD * w_DW[:, j].astype(dtype)
        total_BTD += term_BTD if counts is None else jnp.where(counts, term_BTD, 0)
    return total_BTD


def _convolve_backward(activation, residuals, dy_BTD):
    x_BTD, w_DW, b_D, initial_state, real_BT, document_BT = residuals
    n_before = initial_state.shape[1]
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    dsums_BTD = dy_BTD.astype(dtype)
    if activation == "silu":
        sums_BTD = _sums(*residuals)
        gate_BTD = jax.nn.sigmoid(sums_BTD)
        dsums_BTD *= gate_BTD * (1 + sums_BTD * (1 - gate_BTD))
    if real_BT is not None:
        dsums_BTD = jnp.where(real_BT[:, :, None], dsums_BTD, 0)
    if dispatch.platform() == "gpu":
        dsums_BTD, dwb_WD = _weight_gradients_at_once(dsums_BTD, x_BTD, initial_state, real_BT, document_BT)
        dw_WD, db_D = dwb_WD[:-1], dwb_WD[-1]
    else:
        dw_WD = []
        for tap_BTD, counts in _taps(x_BTD, initial_state, real_BT, document_BT):
            dterm_BTD = dsums_BTD * tap_BTD
            dw_WD.append(jnp.sum(dterm_BTD if counts is None else jnp.where(counts, dterm_BTD, 0), axis=(0, 1)))
        dw_WD, db_D = jnp.stack(dw_WD), jnp.sum(dsums_BTD, axis=(0, 1))
    dbefore_BTD = _spread(dsums_BTD, w_DW.astype(dtype), document_BT)
    dx_BTD = dbefore_BTD[:, n_before:]
    if real_BT is not None:
        dx_BTD = jnp.where(real_BT[:, :, None], dx_BTD, 0)
    return (
        dx_BTD.astype(x_BTD.dtype),
        dw_WD.T.astype(w_DW.dtype),
        None if b_D is None else db_D.astype(b_D.dtype),
        dbefore_BTD[:, :n_before].astype(initial_state.dtype),
        None,
        None,
    )


def _weight_gradients_at_once(dsums_BTD, x_BTD, initial_state, real_BT, document_BT):
    """(dsums as they are kept, gradients of taps and bias [W + 1, D]).

    XLA for GPUs makes a pass over memory for every two reductions, and each would read dsums in float32. Kept once in
    the type of x and reduced together, all of it is three quarters of the traffic. (For TPUs it is several times more.)
    """
    kept_BTD = jax.lax.optimization_barrier(dsums_BTD.astype(x_BTD.dtype)).astype(dsums_BTD.dtype)
    taps = [
        tap_BTD if counts is None else jnp.where(counts, tap_BTD, 0)
        for tap_BTD, counts in _taps(x_BTD, initial_state, real_BT, document_BT)
    ]
    taps_BTWD = jnp.stack([*taps, jnp.ones_like(kept_BTD)], axis=2)
    return kept_BTD, jnp.sum(kept_BTD[:, :, None] * taps_BTWD, axis=(0, 1))


def _spread(dsums_BTD, w_DW, document_BT):
    """[B, W - 1 + T, D]: gradient of state and inputs, each of which meets tap j of the sum W - 1 - j tokens later."""
    n_before = w_DW.shape[1] - 1
    width = dsums_BTD.shape[1] + n_before
    later_BTD = jnp.pad(dsums_BTD, ((0, 0), (n_before, n_before), (0, 0)))
    if document_BT is not None:
        own = jnp.pad(document_BT, ((0, 0), (n_before, 0)))
        later = jnp.pad(document_BT, ((0, 0), (n_before, n_before)))
    total_BTD = 0
    for j in range(n_before + 1):
        place = slice(n_before - j, n_before - j + width)
        term_BTD = later_BTD[:, place] * w_DW[:, j]
        if document_BT is not None:
            term_BTD = jnp.where((own == later[:, place])[:, :, None], term_BTD, 0)
        total_BTD += term_BTD
    return total_BTD


_convolve.defvjp(_convolve_forward, _convolve_backward)
