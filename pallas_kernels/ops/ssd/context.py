# SPDX-License-Identifier: Apache-2.0
"""`ssd` with its tokens split over devices, on top of any implementation.

What a device's tokens do to a state is affine: S -> decay S + state, with one decay a head. The device needs no scan to
know its own map: the final state from zero is one matrix product of dt x, weighed by the decay to the last token, with
B. The maps of the devices before it, composed, give the state that enters its tokens; from there the op runs as always.
Of activations nothing is sent, of states [B, H, P, N] one each exchange (see `pallas_kernels.context`).

The backward goes the same way from the last device to the first. What a device's own results give to the gradient of
the state before its tokens is one matrix product, too: dy, weighed by the decay since the first token, with C. So the
gradient of the state behind its tokens is known before the op's own backward, which runs once, from there.

The weights are exp(sums of log decays of one sign), not differences of sums: as exact in gradients as in values.

Axis letters beyond hybridlm's: R heads of a group.
"""

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.segments import document_numbers
from pallas_kernels.varying import vary_alike


class _Arrays(typing.NamedTuple):
    """The arguments that have gradients, but for the state."""

    x_BTHP: jax.Array
    dt_BTH: jax.Array
    A_H: jax.Array | None
    B_BTGN: jax.Array
    C_BTGN: jax.Array
    D: jax.Array | None
    decay_BTH: jax.Array | None


class _Call(typing.NamedTuple):
    """What is known as the call is traced."""

    scan: Callable  # an implementation of ssd
    ends: Callable  # as `_ends`
    context_axis: str
    options: tuple  # further arguments of the scan, by name


def ssd_context(scan: Callable, args: tuple, *, context_axis: str, by_walk: bool, **options):
    """`scan(*args, **options)`, an implementation of ssd, on tokens of which each device of the axis has a share.

    by_walk: whether the Hopper kernels serve the call, of which one finds the states.
    """
    segment_ids, initial = options["segment_ids"], options["initial_state"]
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN = args
    arrays = _Arrays(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, options["D"], options["decay"])
    dtype = jnp.result_type(arrays.x_BTHP, arrays.dt_BTH, jnp.float32)
    if initial is None:
        n_batch, _, n_heads, d_head = arrays.x_BTHP.shape
        initial = jnp.zeros((n_batch, n_heads, d_head, arrays.B_BTGN.shape[3]), dtype)
    more = tuple((name, options[name]) for name in ("chunk", "states"))
    static = _Call(scan, _walked_ends() if by_walk else _ends, context_axis, more)
    y_BTHP, final_BHPN = _split(static, *vary_alike((arrays, segment_ids, initial.astype(dtype))))
    if not options["return_final_state"]:
        return y_BTHP
    return y_BTHP, context.from_last(final_BHPN, context_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split(static: _Call, arrays: _Arrays, segment_ids, initial_BHPN):
    """(y_BTHP, the state behind this device's tokens)."""
    return _forward(static, arrays, segment_ids, initial_BHPN)[0]


def _forward(static: _Call, arrays: _Arrays, segment_ids, initial_BHPN):
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, _, decay_BTH = arrays
    total_BH, state_BHPN = static.ends(x_BTHP, dt_BTH, A_H, B_BTGN, decay_BTH, segment_ids)
    own = context.sent(
        context.StateMap(
            total_BH[:, :, None, None], state_BHPN.astype(initial_BHPN.dtype), context.describe(segment_ids)
        )
    )
    entering_BHPN, goes_on_B = context.entering_state(own, initial_BHPN, static.context_axis)

    def scan(arrays: _Arrays, state_BHPN):
        *args, D, decay = arrays
        return static.scan(
            *args, D=D, decay=decay, segment_ids=segment_ids, initial_state=state_BHPN, return_final_state=True,
            **dict(static.options),
        )  # fmt: skip

    results, pull = jax.vjp(scan, arrays, entering_BHPN)
    return results, (pull, dt_BTH, A_H, C_BTGN, decay_BTH, segment_ids, own.decay, goes_on_B)


def _backward(static: _Call, saved, cotangents):
    pull, dt_BTH, A_H, C_BTGN, decay_BTH, segment_ids, total_BH11, goes_on_B = saved
    dy_BTHP, dfinal_BHPN = cotangents
    _, own_BHPN = static.ends(dy_BTHP, dt_BTH, A_H, C_BTGN, decay_BTH, segment_ids, reverse=True)
    entering_BHPN = own_BHPN.astype(dfinal_BHPN.dtype) + total_BH11 * dfinal_BHPN
    decay_BH11, entering_BHPN = (context.keep_rows(goes_on_B, array) for array in (total_BH11, entering_BHPN))
    dfinal_BHPN += context.leaving_gradient(decay_BH11, entering_BHPN, static.context_axis)
    d_arrays, dinitial_BHPN = pull((dy_BTHP, dfinal_BHPN))
    is_first = jax.lax.axis_index(static.context_axis) == 0
    return d_arrays, None, jnp.where(is_first, dinitial_BHPN, 0)


_split.defvjp(_forward, _backward)


def _walked_ends() -> Callable:
    """`_ends` by a kernel, which reads v once and writes states alone."""
    from pallas_kernels.ops.ssd.gpu.api import ends

    return ends


def _ends(v_BTHP, dt_BTH, A_H, maps_BTGN, decay, segment_ids, *, reverse: bool = False):
    """(decay_BH, state_BHPN) of one device's tokens: of a state before them what is left behind them, and the state
    behind them that v = x and the maps B make of none. reverse: the gradient of the state before them instead, that
    v = dy and the maps C make."""
    n_batch, n_tokens, n_heads, d_head = v_BTHP.shape
    n_groups = maps_BTGN.shape[2]
    dtype = jnp.result_type(v_BTHP, dt_BTH, jnp.float32)
    product_dtype = jnp.result_type(v_BTHP, maps_BTGN)
    starts_B = None
    dt_BTH = dt_BTH.astype(dtype)
    if segment_ids is not None:
        document_BT = document_numbers(segment_ids)
        real_BT = segment_ids != 0
        near_BT = real_BT & (document_BT == (0 if reverse else document_BT[:, -1:]))
        starts_B = document_BT[:, -1] > 0
        dt_BTH = jnp.where(real_BT[:, :, None], dt_BTH, 0)
        decay = None if decay is None else jnp.where(real_BT[:, :, None], decay, 0)
        v_BTHP, maps_BTGN = (jnp.where(near_BT[:, :, None, None], array, 0) for array in (v_BTHP, maps_BTGN))
    log_BTH = dt_BTH * A_H.astype(dtype)[None, None] if decay is None else decay.astype(dtype)
    sums_BTH = jax.lax.cumsum(log_BTH, axis=1, reverse=not reverse)
    if reverse:
        weights_BTH, total_BH = jnp.exp(sums_BTH), sums_BTH[:, -1]
    else:
        after_BTH = jnp.pad(sums_BTH[:, 1:], ((0, 0), (0, 1), (0, 0)))
        weights_BTH, total_BH = jnp.exp(after_BTH) * dt_BTH, sums_BTH[:, 0]
    weighed_BTHP = (v_BTHP * weights_BTH[..., None]).astype(product_dtype)
    state_BGRPN = jnp.einsum(
        "btgrp,btgn->bgrpn",
        weighed_BTHP.reshape(n_batch, n_tokens, n_groups, n_heads // n_groups, d_head),
        maps_BTGN.astype(product_dtype),
        preferred_element_type=dtype,
    )
    decay_BH = jnp.exp(total_BH)
    if starts_B is not None:
        decay_BH = context.keep_rows(~starts_B, decay_BH)
    return decay_BH, state_BGRPN.reshape(n_batch, n_heads, d_head, -1)
