# SPDX-License-Identifier: Apache-2.0
"""The token before, for mixers that read each token mixed with it (RWKV): within the document, padding left out.

Axis letters: B batch, T tokens, D model.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import sharding
from hybridlm.layers import cache as caches
from hybridlm.layers import short_conv
from hybridlm.layers.block import Tokens

PAIR = ("batch", "tokens", None, None)
"""Logical axes of `with_previous`."""


def init_window(batch: int, d_model: int, dtype, layout: caches.Layout) -> jax.Array:
    """What a cache remembers, [B, 1, D]: zeros, nothing stands before the first token."""
    return layout.zeros((batch, 1, d_model), dtype)


def with_previous(x_BTD: jax.Array, tokens: Tokens, window: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Each token and the one before it, [B, T, 2, D], zeros before a document's first; the new window, or None."""
    x_BTD = sharding.constrain(x_BTD, "batch", "tokens", None)
    before_BTD, window = short_conv.shift(x_BTD, segment_ids=tokens.segment_ids, gaps=tokens.gaps, window=window)
    return jnp.stack([x_BTD, before_BTD], axis=2), window


def mixed(pair_BTcD: jax.Array, share: jax.Array) -> jax.Array:
    """x + share (before - x), [B, T, D]; share: [D], or [B, T, D]."""
    x_BTD, before_BTD = pair_BTcD[:, :, 0], pair_BTcD[:, :, 1]
    return x_BTD + (before_BTD - x_BTD) * (share[None, None] if share.ndim == 1 else share)


def ramp(d_model: int, power: float | np.ndarray) -> np.ndarray:
    """Shares of the token before that fall over channels, 1 - (i / D)^power, as RWKV starts."""
    return 1.0 - (np.arange(d_model) / d_model) ** power
