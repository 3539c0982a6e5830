# SPDX-License-Identifier: Apache-2.0
"""Feature maps of `linear_attention`: weights of pairs that are polynomials of q . k, and the features behind them."""

import jax.numpy as jnp

FEATURE_MAPS = (None, "taylor")


def n_features(feature_map: str | None, d_key: int) -> int:
    """Rows of the state."""
    return d_key if feature_map is None else 1 + d_key + d_key**2


def weights(feature_map: str | None, scores):
    """Of pairs, from q . k."""
    return scores if feature_map is None else 1 + scores + scores**2 / 2


def of_keys(feature_map: str | None, k):
    """Features [..., features] of keys [..., N]: 1, k, k k^T."""
    if feature_map is None:
        return k
    squares = k[..., :, None] * k[..., None, :]
    return jnp.concatenate([jnp.ones_like(k[..., :1]), k, squares.reshape(*k.shape[:-1], -1)], axis=-1)


def of_queries(feature_map: str | None, q):
    """Features of queries whose products with those of keys are `weights`."""
    if feature_map is None:
        return q
    squares = q[..., :, None] * q[..., None, :] / 2
    return jnp.concatenate([jnp.ones_like(q[..., :1]), q, squares.reshape(*q.shape[:-1], -1)], axis=-1)
