# SPDX-License-Identifier: Apache-2.0
"""The recurrence of `titans`, token by token: the oracle of the others (float64 if the inputs are)."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import scan_tokens
from pallas_kernels.ops.titans import memory


def titans_reference(q, k, v, rate, eta, alpha, g, W1, W2, *, store_every, refresh_every, segment_ids=None,
                     initial_state=None, return_final_state=False):  # fmt: skip
    """See `pallas_kernels.titans`."""
    tokens, learned, sizes, state = prepare(q, k, v, rate, eta, alpha, g, W1, W2, initial_state)
    step = functools.partial(next_state, learned, sizes, store_every, refresh_every)
    y, state = scan_tokens(step, state, tokens, segment_ids)
    y = y.astype(v.dtype)
    return (y, state) if return_final_state else y


def prepare(q, k, v, rate, eta, alpha, g, W1, W2, initial_state) -> tuple:
    """(tokens, learned weights [H, M], sizes, state), in the dtype that all is computed in."""
    given = (q, k, v, rate, alpha, g, W1, W2)
    dtype = jnp.result_type(*given, *(() if eta is None else (eta,)), jnp.float32)
    sizes = memory.Sizes(*W1.shape[1:])
    learned = memory.join(*(array.astype(dtype) for array in (g, W1, W2)))
    tokens = tuple(None if array is None else array.astype(dtype) for array in (q, k, v, rate, eta, alpha))
    if initial_state is None:
        zeros = jnp.zeros_like(v[:, 0, :, :1], dtype)  # of v, so that it is sharded like it
        initial_state = jnp.repeat(zeros, sizes.state, axis=-1)
    return tokens, learned, sizes, initial_state.astype(dtype)


def next_state(learned, sizes, store_every, refresh_every, state, token):
    """(state [B, H, 4 M + 3], y [B, H, P]) behind one token."""
    q, k, v, rate, eta, alpha = token
    by_head = lambda function: jax.vmap(jax.vmap(functools.partial(function, sizes=sizes)))
    s = memory.unpack(state, sizes)
    gradient = s.gradient + by_head(memory.surprise)(learned[None] + s.base, k, v, rate)
    s = s._replace(gradient=gradient, alpha=s.alpha + alpha[..., None], count=s.count + 1)
    s = s if eta is None else s._replace(eta=s.eta + eta[..., None])
    weights, momentum = memory.store(s, learned[None], store_every, eta is not None)
    stores = jnp.round(s.count) % store_every == 0
    refreshes = stores if refresh_every is None else jnp.round(s.count) >= refresh_every
    s = memory.State(
        jnp.where(stores, weights, s.weights),
        s.base if refresh_every is None else jnp.where(refreshes, weights, s.base),
        jnp.where(stores, momentum, s.momentum),
        *(jnp.where(stores, 0, array) for array in (s.gradient, s.eta, s.alpha)),
        jnp.where(refreshes, 0, s.count),
    )
    return memory.pack(s), by_head(memory.read)(learned[None] + s.weights, q)
