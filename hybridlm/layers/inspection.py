# SPDX-License-Identifier: Apache-2.0
"""What several mixers say of themselves in `inspect`: see `block.Mixer`. Float32 scalars, padding left out.

Axis letters: B batch, T tokens, S keys, H query heads, K key/value heads, P head width, N state size.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm.layers.block import Tokens
from hybridlm.layers.segments import positions_within

QUERIES = 64
"""Queries of a row whose attention is looked at, evenly spaced, the last one among them."""
AT_ONCE = 16
"""Of these, how many have all their scores in memory at the same time."""


def span(name: str, values_BT: jax.Array, segment_ids_BT: jax.Array | None) -> dict[str, jax.Array]:
    """{name_min, name_mean, name_max} of values [B, T, ...] of real tokens."""
    values_BT = values_BT.astype(jnp.float32)
    if segment_ids_BT is None:
        return {f"{name}_min": values_BT.min(), f"{name}_mean": values_BT.mean(), f"{name}_max": values_BT.max()}
    real_BT = jnp.expand_dims(segment_ids_BT != 0, tuple(range(2, values_BT.ndim)))
    real_BT = jnp.broadcast_to(real_BT, values_BT.shape)
    return {
        f"{name}_min": jnp.min(values_BT, initial=jnp.inf, where=real_BT),
        f"{name}_mean": jnp.mean(values_BT, where=real_BT),
        f"{name}_max": jnp.max(values_BT, initial=-jnp.inf, where=real_BT),
    }


def steps(dt_BT: jax.Array, A: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
    """Of a state space model: its step sizes dt [B, T, ...], and what a token leaves of the state, exp(-dt A).

    A: [N, ...]. One N after the other, so that of the decays no more is in memory than of dt.
    """
    ids = tokens.segment_ids
    parts = jax.lax.map(lambda A: span("decay", jnp.exp(-dt_BT * A[None, None]), ids), A)
    low, mean, high = (parts[f"decay_{end}"] for end in ("min", "mean", "max"))
    return span("dt", dt_BT, ids) | {"decay_min": low.min(), "decay_mean": mean.mean(), "decay_max": high.max()}


def decays(g_BT: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
    """What a token leaves of the state, from its logarithm [B, T, ...]."""
    return span("decay", jnp.exp(g_BT), tokens.segment_ids)


def state_norms(state_B: jax.Array, weight_B: jax.Array | None = None) -> dict[str, jax.Array]:
    """The norm of what each row ends with, [B, ...].

    weight_B: of a sum with weights the sum of these, 0 where nothing was added: the state is their mean.
    """
    state_B = state_B.astype(jnp.float32)
    if weight_B is not None:
        state_B = jnp.where(weight_B == 0, 0.0, state_B / jnp.where(weight_B == 0, 1.0, weight_B))
    norm_B = jnp.sqrt(jnp.sum(jnp.square(state_B), axis=tuple(range(1, state_B.ndim))))
    return {"state_norm_mean": norm_B.mean(), "state_norm_max": norm_B.max()}


def attention(
    q_BTHP: jax.Array, k_BTKP: jax.Array, sinks_H: jax.Array | None, segment_ids_BT: jax.Array | None,
    places_BT: jax.Array | None, *, window: int | None, scale: float | None, softcap: float | None,
    causal: bool = True, every: int = 1, terms: tuple[jax.Array, jax.Array] | None = None,
) -> dict[str, jax.Array]:  # fmt: skip
    """How attention spreads, over QUERIES queries a row: the entropy in nats of what a query attends to, a sink
    included, and the share that the first token of its document gets.

    {entropy_mean, first_token_mean} over queries and heads; {entropy_min, first_token_max} of the heads' means, the
    lowest and the highest. places_BT: positions that a window counts; None: those in the row. every: of so many
    tokens each the last one alone is a query. terms: shares [B, T, H, R] of profiles [R, E] by distance in places, as
    `pallas_kernels.relative_attention` adds them. See `pallas_kernels.attention` for the rest.
    """
    B, T, H, P = q_BTHP.shape
    K = k_BTKP.shape[2]
    ids_BT = jnp.ones((B, T), jnp.int32) if segment_ids_BT is None else segment_ids_BT
    first_BT = positions_within(segment_ids_BT, (B, T)) == 0
    places_BT = jnp.broadcast_to(jnp.arange(T), (B, T)) if places_BT is None else places_BT
    n = min(T // every, QUERIES)
    chosen = np.arange(1, n + 1) * (T // every) // n * every - 1
    sinks_H = jnp.full(H, -jnp.inf) if sinks_H is None else sinks_H.astype(jnp.float32)
    keys_BSKP = k_BTKP.astype(jnp.float32)
    r_BTHR, profiles_RE = (jnp.zeros((B, T, H, 0)), jnp.zeros((0, 1))) if terms is None else terms

    def of_query(query):
        q_BHP, r_BHR, id_B, place_B, index = query
        q_BKRP = q_BHP.astype(jnp.float32).reshape(B, K, H // K, P)
        scores_BHS = jnp.einsum("BKRP,BSKP->BKRS", q_BKRP, keys_BSKP).reshape(B, H, T)
        scores_BHS *= P**-0.5 if scale is None else scale
        scores_BHS = scores_BHS if softcap is None else softcap * jnp.tanh(scores_BHS / softcap)
        behind_BS = place_B[:, None] - places_BT
        if terms is not None:
            terms_BHE = jnp.einsum("BHR,RE->BHE", r_BHR.astype(jnp.float32), profiles_RE)
            at_BHS = jnp.broadcast_to(jnp.clip(behind_BS, 0, terms_BHE.shape[-1] - 1)[:, None], scores_BHS.shape)
            near_BS = behind_BS < terms_BHE.shape[-1]
            scores_BHS += jnp.where(near_BS[:, None], jnp.take_along_axis(terms_BHE, at_BHS, axis=-1), 0.0)
        seen_BS = (id_B[:, None] == ids_BT) & (id_B != 0)[:, None]
        seen_BS = seen_BS & (jnp.arange(T)[None] <= index) if causal else seen_BS
        seen_BS = seen_BS if window is None else seen_BS & (behind_BS < window)
        logits = jnp.where(seen_BS[:, None], scores_BHS, -jnp.inf)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks_H[None, :, None], (B, H, 1))], axis=-1)
        p = jax.nn.softmax(jnp.where((id_B != 0)[:, None, None], logits, 0.0), axis=-1)
        entropy_BH = -jnp.sum(jax.scipy.special.xlogy(p, p), axis=-1)
        first_BH = jnp.sum(jnp.where((seen_BS & first_BT)[:, None], p[..., :-1], 0.0), axis=-1)
        real_B1 = (id_B != 0)[:, None]
        return jnp.where(real_B1, entropy_BH, 0.0), jnp.where(real_B1, first_BH, 0.0)

    by_query = partial(jnp.moveaxis, source=1, destination=0)
    queries = (
        by_query(q_BTHP[:, chosen]),
        by_query(r_BTHR[:, chosen]),
        by_query(ids_BT[:, chosen]),
        by_query(places_BT[:, chosen]),
        jnp.asarray(chosen),
    )
    entropy_QBH, first_QBH = jax.lax.map(of_query, queries, batch_size=AT_ONCE)
    n_real = jnp.maximum(jnp.sum(ids_BT[:, chosen] != 0), 1).astype(jnp.float32)
    entropy_H, first_H = (values.sum(axis=(0, 1)) / n_real for values in (entropy_QBH, first_QBH))
    return {
        "entropy_mean": entropy_H.mean(), "entropy_min": entropy_H.min(),
        "first_token_mean": first_H.mean(), "first_token_max": first_H.max(),
    }  # fmt: skip
