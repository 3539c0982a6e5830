# SPDX-License-Identifier: Apache-2.0
"""`rwkv4` with its tokens split over devices, on top of any implementation.

A device finds the map of its tokens by running the op from nothing; its log decay is g times their number. The maps of
the devices before it, composed, give the state that enters its tokens (see `pallas_kernels.context`).
"""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.by_token import rows_where
from pallas_kernels.ops.rwkv4.reference import STATES, level, start_of
from pallas_kernels.ops.rwkv4.xla import join
from pallas_kernels.segments import document_numbers


class _Map(typing.NamedTuple):
    parts: tuple  # log decay (-inf where a document starts behind the first real token), a, b, m; [B, D] each
    documents: context.Documents | None


def rwkv4_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""
    k_BTD, _, g_D, _ = args
    segment_ids = options["segment_ids"]

    def local(args):
        return scan(*args, **options | dict.fromkeys(STATES) | {"return_final_state": True})[1:]

    state = jax.checkpoint(local, policy=jax.checkpoint_policies.nothing_saveable)(args)
    own = _map(_log_decay(g_D.astype(state[0].dtype), k_BTD, segment_ids), state, context.describe(segment_ids))
    k, v, g, bonus = args
    initial = start_of(k, v, g, bonus, options)
    start = _map(jnp.zeros_like(own.parts[0]), initial, context.nothing(own.documents))
    entering = context.before(_join, start, own, context_axis)
    keep_B = ~context.is_cut(entering.documents, own.documents)
    options |= {name: context.keep_rows(keep_B, array) for name, array in zip(STATES, entering.parts[1:])}
    out = scan(*args, **options)
    if not options["return_final_state"]:
        return out
    return out[0], *(context.from_last(array, context_axis) for array in out[1:])


def _map(log_decay_BD, state: tuple, documents) -> _Map:
    a_BD, b_BD, m_BD = state
    return _Map((log_decay_BD, a_BD, b_BD, level(b_BD, m_BD)), documents)


def _log_decay(g_D, k_BTD, segment_ids):
    if segment_ids is None:
        return jnp.broadcast_to(k_BTD.shape[1] * g_D, (k_BTD.shape[0], *g_D.shape))
    log_decay_BD = jnp.sum(segment_ids != 0, axis=1).astype(g_D.dtype)[:, None] * g_D[None]
    return rows_where(document_numbers(segment_ids)[:, -1] == 0, log_decay_BD, -jnp.inf)


def _join(earlier: _Map, later: _Map) -> _Map:
    cut_B = context.is_cut(earlier.documents, later.documents)
    decay, a, b, m = earlier.parts
    decay = jnp.where(cut_B[..., None], -jnp.inf, decay)
    a, b = (context.keep_rows(~cut_B, array) for array in (a, b))
    return _Map(join((decay, a, b, level(b, m)), later.parts), context.join(earlier.documents, later.documents))
