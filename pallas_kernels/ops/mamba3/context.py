# SPDX-License-Identifier: Apache-2.0
"""`mamba3` with its tokens split over devices, on top of any implementation.

What a device's tokens do to the state S is affine: S -> decay S + lag v k^T + F, where v and k are the last token's
before them, of which the first token here has its share, and F is the state that the op ends in from nothing. That F
and the last key here are turned from an angle of 0, so the angle that enters turns them on. The maps of the devices
before it, composed, give the states that enter a device's tokens; from there the op runs again (see
`pallas_kernels.context`).
"""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.by_token import rows_where, tokens_where
from pallas_kernels.ops.mamba3 import parts
from pallas_kernels.ops.mamba3.reference import STATES, empty_states
from pallas_kernels.segments import document_numbers


class _Map(typing.NamedTuple):
    decay_BH: jax.Array  # 0 where a document starts behind the first real token, lag too
    lag_BH: jax.Array
    state: tuple  # angle [B, H, S], ssm [B, H, P, N], k [B, H, R, N], v [B, H, R, P]
    real_B: jax.Array  # 1 where there is a real token
    documents: context.Documents | None


def mamba3_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""
    q, k, v, adt, dt, trap, angles = args
    empty = empty_states(q, k, v, angles)

    def local(args):
        from_nothing = dict(zip(STATES, empty)) | {"return_final_state": True}
        return scan(*args, **options | from_nothing)[1:]

    state = jax.checkpoint(local, policy=jax.checkpoint_policies.nothing_saveable)(args)
    documents = context.describe(options["segment_ids"])
    decay_BH, lag_BH = _sums(adt, dt, trap, options["segment_ids"])
    real_B = jnp.ones((v.shape[0],), jnp.int32) if documents is None else (documents.first_B != 0).astype(jnp.int32)
    own = _Map(decay_BH, lag_BH, state, real_B, documents)
    initial = tuple(options[name] for name in STATES)
    initial = empty if initial[0] is None else tuple(array.astype(e.dtype) for array, e in zip(initial, empty))
    start = _Map(jnp.zeros_like(decay_BH), jnp.zeros_like(lag_BH), initial, real_B, context.nothing(documents))
    join = lambda earlier, later: _join(earlier, later, options["rotary_pairs"])
    entering = context.before(join, start, own, context_axis)
    keep_B = ~context.is_cut(entering.documents, documents)
    options |= {name: context.keep_rows(keep_B, array) for name, array in zip(STATES, entering.state)}
    out = scan(*args, **options)
    if not options["return_final_state"]:
        return out
    return out[0], *(context.from_last(array, context_axis) for array in out[1:])


def _sums(adt_BTH, dt_BTH, trap_BTH, segment_ids):
    """(decay, lag) of one device's tokens."""
    lag_BTH = jax.nn.sigmoid(-trap_BTH.astype(dt_BTH.dtype)) * dt_BTH
    if segment_ids is None:
        decay_BH = jnp.exp(adt_BTH.sum(axis=1))
        return decay_BH, decay_BH * lag_BTH[:, 0]
    real_BT = segment_ids != 0
    decay_BH = jnp.exp(tokens_where(real_BT, adt_BTH).sum(axis=1))
    decay_BH = rows_where(document_numbers(segment_ids)[:, -1] == 0, decay_BH)
    is_first_BT = real_BT & (jnp.cumsum(real_BT, axis=1) == 1)
    return decay_BH, decay_BH * tokens_where(is_first_BT, lag_BTH).sum(axis=1)


def _join(earlier: _Map, later: _Map, pairs: str) -> _Map:
    cut_B = context.is_cut(earlier.documents, later.documents)
    lag_BH = rows_where(earlier.real_B != 0, later.decay_BH * earlier.lag_BH, later.lag_BH)
    return _Map(
        context.keep_rows(~cut_B, later.decay_BH * earlier.decay_BH),
        context.keep_rows(~cut_B, lag_BH),
        _through(later, tuple(context.keep_rows(~cut_B, array) for array in earlier.state), pairs),
        earlier.real_B | later.real_B,
        context.join(earlier.documents, later.documents),
    )


def _through(tokens: _Map, state: tuple, pairs: str) -> tuple:
    """The state behind tokens, of that before them."""
    angle_BHS, ssm_BHPN, k_BHRN, v_BHRP = state
    own_angle_BHS, own_ssm_BHPN, own_k_BHRN, own_v_BHRP = tokens.state
    if tokens.documents is not None:  # a document that starts in them has turned from 0
        angle_BHS = rows_where(tokens.documents.starts_B == 0, angle_BHS)
    turn = lambda array: parts.rotate(array, angle_BHS[:, :, None], pairs)
    written_BHPN = tokens.lag_BH[..., None, None] * jnp.einsum("bhrp,bhrn->bhpn", v_BHRP, k_BHRN)
    return (
        parts.wrapped(own_angle_BHS + angle_BHS),
        tokens.decay_BH[..., None, None] * ssm_BHPN + written_BHPN + turn(own_ssm_BHPN),
        rows_where(tokens.real_B != 0, turn(own_k_BHRN), k_BHRN),
        rows_where(tokens.real_B != 0, own_v_BHRP, v_BHRP),
    )
