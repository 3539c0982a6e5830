# SPDX-License-Identifier: Apache-2.0
"""`mlstm` with its tokens split over devices, on top of any implementation.

But for its scale exp(m) a state goes through tokens by an affine map, C exp(m) -> decay C exp(m) + F exp(m_F), n with
it, and m -> max(log decay + m, m_F). A device finds F, its n and m_F by running the op from nothing, that is from zeros
with m at `NOTHING`. The maps of the devices before it, composed, give the state that enters its tokens; from there the
op runs again. A document that begins at a device's edge begins from zeros with m = 0.
"""

import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context
from pallas_kernels.by_token import rows_where, tokens_where
from pallas_kernels.segments import document_numbers

NOTHING = -1e30  # of m: less than any gate's logarithm, and still finite


class _Map(typing.NamedTuple):
    log_decay_BH: jax.Array  # -inf where a document starts behind the first real token
    c_BHNP: jax.Array
    n_BHN: jax.Array
    m_BH: jax.Array
    documents: context.Documents | None


def mlstm_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""
    _, k, v, _, f = args
    segment_ids = options["segment_ids"]
    dtype = jnp.result_type(*args, jnp.float32)
    shape = (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    zeros = tuple(jnp.zeros(shape[:rank], dtype) for rank in (4, 3, 2))

    def local(args):
        c, n, m = zeros
        from_nothing = {"initial_c": c, "initial_n": n, "initial_m": m + NOTHING, "return_final_state": True}
        return scan(*args, **options | from_nothing)[1:]

    state = jax.checkpoint(local, policy=jax.checkpoint_policies.nothing_saveable)(args)
    c, n, m = state
    own = _Map(_log_decay(f.astype(dtype), segment_ids), c, n, m, context.describe(segment_ids))
    names = ("initial_c", "initial_n", "initial_m")
    initial = tuple(options[name] for name in names)
    initial = zeros if initial[0] is None else tuple(array.astype(dtype) for array in initial)
    c, n, m = initial
    start = _Map(jnp.zeros_like(own.log_decay_BH), c, n, m, context.nothing(own.documents))
    entering = context.before(_join, start, own, context_axis)
    cut_B = context.is_cut(entering.documents, own.documents)
    options |= {name: context.keep_rows(~cut_B, array) for name, array in zip(names, entering[1:4])}
    out = scan(*args, **options)
    if not options["return_final_state"]:
        return out
    return out[0], *(context.from_last(array, context_axis) for array in out[1:])


def _log_decay(f_BTH, segment_ids):
    keep_BTH = jax.nn.log_sigmoid(f_BTH)
    if segment_ids is None:
        return keep_BTH.sum(axis=1)
    log_decay_BH = tokens_where(segment_ids != 0, keep_BTH).sum(axis=1)
    return rows_where(document_numbers(segment_ids)[:, -1] == 0, log_decay_BH, -jnp.inf)


def _join(earlier: _Map, later: _Map) -> _Map:
    cut_B = context.is_cut(earlier.documents, later.documents)
    c, n, m = (context.keep_rows(~cut_B, array) for array in earlier[1:4])
    left_m = jnp.maximum(later.log_decay_BH + m, later.m_BH)
    kept, added = jnp.exp(later.log_decay_BH + m - left_m), jnp.exp(later.m_BH - left_m)
    before = jnp.where(cut_B[..., None], -jnp.inf, earlier.log_decay_BH)
    return _Map(
        before + later.log_decay_BH,
        kept[..., None, None] * c + added[..., None, None] * later.c_BHNP,
        kept[..., None] * n + added[..., None] * later.n_BHN,
        left_m,
        context.join(earlier.documents, later.documents),
    )
