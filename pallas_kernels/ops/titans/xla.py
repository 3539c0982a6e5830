# SPDX-License-Identifier: Apache-2.0
"""`titans` chunk by chunk where chunks are known beforehand, else token by token; memory linear in T.

A row of one document from its start has its chunks counted from the first token: their gradients are one each, of all
their tokens at once. Documents have them from where they begin, and a state may be in the midst of one; those go token
by token. In both only the states that enter slabs are kept, and a slab runs again for the backward pass.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import chunks
from pallas_kernels.by_token import scan_tokens
from pallas_kernels.ops.titans import memory
from pallas_kernels.ops.titans.reference import next_state, prepare
from pallas_kernels.varying import vary_alike

SLAB = 64


def titans_xla(q, k, v, rate, eta, alpha, g, W1, W2, *, store_every, refresh_every, segment_ids=None,
               initial_state=None, return_final_state=False):  # fmt: skip
    """See `pallas_kernels.titans`."""
    tokens, learned, sizes, state = prepare(q, k, v, rate, eta, alpha, g, W1, W2, initial_state)
    by_token = functools.partial(_by_token, learned, sizes, store_every, refresh_every)
    if segment_ids is not None or initial_state is not None:
        y, state = by_token(tokens, segment_ids, state)
    else:
        whole = v.shape[1] // store_every * store_every
        first, rest = (
            jax.tree.map(lambda a, part=part: a[:, part], tokens) for part in (slice(whole), slice(whole, None))
        )
        parts = []
        if whole:
            y, state = _by_chunk(learned, sizes, store_every, refresh_every, first, state)
            parts.append(y)
        if whole < v.shape[1]:
            y, state = by_token(rest, None, state)
            parts.append(y)
        y = jnp.concatenate(parts, axis=1)
    y = y.astype(v.dtype)
    return (y, state) if return_final_state else y


def _by_token(learned, sizes, store_every, refresh_every, tokens, segment_ids, state):
    step = functools.partial(next_state, learned, sizes, store_every, refresh_every)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens[3][:, :, 0], jnp.int32)

    def slab(tokens, marks, state):
        ids_BT = jnp.where(marks.real_BT, marks.document_BT + 1, 0)
        return scan_tokens(step, state, tokens, ids_BT, marks.entering_BT[:, 0] + 1)

    return chunks.scan_slabs(slab, tokens, segment_ids, state, chunk=1, longest=SLAB)


def _by_chunk(learned, sizes, store_every, refresh_every, tokens, state):
    """Of whole chunks from a document's start."""
    by_head = lambda function: jax.vmap(jax.vmap(functools.partial(function, sizes=sizes)))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, chunk):
        by_token = lambda array: jnp.swapaxes(array, 1, 2)  # [B, H, tokens, ...]
        q, k, v, rate, eta, alpha = jax.tree.map(by_token, chunk)
        s = memory.unpack(state, sizes)
        gradient = by_head(memory.surprise)(learned[None] + s.base, k, v, rate)
        s = s._replace(gradient=gradient, alpha=alpha.sum(axis=2)[..., None])
        s = s if eta is None else s._replace(eta=eta.sum(axis=2)[..., None])
        weights, momentum = memory.store(s, learned[None], store_every, eta is not None)
        count, base = jnp.zeros_like(s.count), s.base
        if refresh_every is not None:
            refreshes = jnp.round(s.count) + store_every >= refresh_every
            base = jnp.where(refreshes, weights, base)
            count = jnp.where(refreshes, 0, s.count + store_every)
        answer = by_head(memory.read)
        y = jnp.concatenate(  # the token that completes the chunk reads what it has stored
            [answer(learned[None] + s.weights, q[:, :, :-1]), answer(learned[None] + weights, q[:, :, -1:])], axis=2
        )
        nothing = (jnp.zeros_like(s.gradient), jnp.zeros_like(s.eta), jnp.zeros_like(s.alpha))
        return memory.pack(memory.State(weights, base, momentum, *nothing, count)), jnp.swapaxes(y, 1, 2)

    by_chunk = lambda array: jnp.moveaxis(array.reshape(array.shape[0], -1, store_every, *array.shape[2:]), 1, 0)
    state, y = jax.lax.scan(step, *vary_alike((state, jax.tree.map(by_chunk, tokens))))
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:]), state
