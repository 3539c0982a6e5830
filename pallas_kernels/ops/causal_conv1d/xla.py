# SPDX-License-Identifier: Apache-2.0
"""`causal_conv1d` as shifts and adds, which XLA fuses into one pass over x; the hand-written backward is alike."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.ops.causal_conv1d.documents import convolve_documents


def causal_conv1d_xla(x_BTD, w_DW, b_D=None, **settings):
    """See `pallas_kernels.causal_conv1d`."""
    return convolve_documents(_from_start, x_BTD, w_DW, b_D, **settings)


def _from_start(x_BTD, w_DW, b_D, initial_state, seen_BT, activation):
    return _convolve(x_BTD, w_DW, b_D, start_state(x_BTD, w_DW, initial_state), seen_BT, activation)


def start_state(x_BTD, w_DW, initial_state):
    """The initial state, or zeros, of x so that they are sharded like x."""
    if initial_state is not None:
        return initial_state
    return jnp.repeat(jnp.zeros_like(x_BTD[:, :1]), w_DW.shape[1] - 1, axis=1)


def convolve(x_BTD, w_DW, b_D, initial_state, seen_BT, activation):
    """The convolution of `documents.convolve_documents` with an initial state, without a gradient of its own."""
    sums_BTD = _sums(x_BTD, w_DW, b_D, initial_state, seen_BT)
    y_BTD = jax.nn.silu(sums_BTD) if activation == "silu" else sums_BTD
    if seen_BT is not None:
        y_BTD = jnp.where((seen_BT != 0)[:, :, None], y_BTD, 0)
    return y_BTD.astype(x_BTD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _convolve(x_BTD, w_DW, b_D, initial_state, seen_BT, activation):
    return convolve(x_BTD, w_DW, b_D, initial_state, seen_BT, activation)


def _convolve_forward(x_BTD, w_DW, b_D, initial_state, seen_BT, activation):
    arrays = (x_BTD, w_DW, b_D, initial_state, seen_BT)
    return convolve(*arrays, activation), arrays


def _taps(x_BTD, initial_state, seen_BT):
    """Yields for each tap j (array [B, T, D] that meets w[:, j], mask [B, T, 1] of where it counts or None).

    Where a tap does not count it may hold anything.
    """
    n_tokens = x_BTD.shape[1]
    n_before = initial_state.shape[1]
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    before_BTD = jnp.concatenate([initial_state.astype(x_BTD.dtype), x_BTD], axis=1)
    for j in range(n_before + 1):
        # Masking x itself instead would cost another pass over it.
        counts = None if seen_BT is None else (seen_BT > n_before - j)[:, :, None]
        yield before_BTD[:, j : j + n_tokens].astype(dtype), counts


def _sums(x_BTD, w_DW, b_D, initial_state, seen_BT):
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    total_BTD = 0 if b_D is None else b_D.astype(dtype)[None, None]
    for j, (tap_BTD, counts) in enumerate(_taps(x_BTD, initial_state, seen_BT)):
        term_BTD = tap_BTD * w_DW[:, j].astype(dtype)[None, None]
        total_BTD += term_BTD if counts is None else jnp.where(counts, term_BTD, 0)
    return total_BTD


def _convolve_backward(activation, residuals, dy_BTD):
    x_BTD, w_DW, b_D, initial_state, seen_BT = residuals
    n_before = initial_state.shape[1]
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    dsums_BTD = dy_BTD.astype(dtype)
    if activation == "silu":
        sums_BTD = _sums(*residuals)
        gate_BTD = jax.nn.sigmoid(sums_BTD)
        dsums_BTD *= gate_BTD * (1 + sums_BTD * (1 - gate_BTD))
    if seen_BT is not None:
        dsums_BTD = jnp.where((seen_BT != 0)[:, :, None], dsums_BTD, 0)
    dw_WD = []
    for tap_BTD, counts in _taps(x_BTD, initial_state, seen_BT):
        dterm_BTD = dsums_BTD * tap_BTD
        dw_WD.append(jnp.sum(dterm_BTD if counts is None else jnp.where(counts, dterm_BTD, 0), axis=(0, 1)))
    dw_WD, db_D = jnp.stack(dw_WD), jnp.sum(dsums_BTD, axis=(0, 1))
    dbefore_BTD = _spread(dsums_BTD, w_DW.astype(dtype), seen_BT)
    dx_BTD = dbefore_BTD[:, n_before:]
    if seen_BT is not None:
        dx_BTD = jnp.where((seen_BT != 0)[:, :, None], dx_BTD, 0)
    return (
        dx_BTD.astype(x_BTD.dtype),
        dw_WD.T.astype(w_DW.dtype),
        None if b_D is None else db_D.astype(b_D.dtype),
        dbefore_BTD[:, :n_before].astype(initial_state.dtype),
        None,
    )


def _spread(dsums_BTD, w_DW, seen_BT):
    """[B, W - 1 + T, D]: gradient of state and inputs, each of which meets tap j of the sum W - 1 - j tokens later."""
    n_before = w_DW.shape[1] - 1
    width = dsums_BTD.shape[1] + n_before
    later_BTD = jnp.pad(dsums_BTD, ((0, 0), (n_before, n_before), (0, 0)))
    if seen_BT is not None:
        seen_BT = jnp.pad(seen_BT, ((0, 0), (n_before, n_before)))
    total_BTD = 0
    for j in range(n_before + 1):
        place = slice(n_before - j, n_before - j + width)
        term_BTD = later_BTD[:, place] * w_DW[:, j][None, None]
        if seen_BT is not None:
            term_BTD = jnp.where((seen_BT[:, place] > n_before - j)[:, :, None], term_BTD, 0)
        total_BTD += term_BTD
    return total_BTD


_convolve.defvjp(_convolve_forward, _convolve_backward)
