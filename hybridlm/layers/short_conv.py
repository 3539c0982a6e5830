# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution in front of a recurrence: parameters, all tokens at once, one token, its cache.

Channels may have several axes; a weight is [*channels, W], oldest tap first. The cache, a window, is [B, W - 1,
*channels]: the inputs that the convolution reads before the next token.

Axis letters: B batch, T tokens, W convolution window.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import sharding
from hybridlm.layers import cache as caches
from hybridlm.layers import ops, params
from hybridlm.layers.mlp import ACTIVATIONS


def make(uniform: jax.Array, axes: tuple[str | None, ...], bias: bool) -> tuple[nnx.Param, nnx.Param | None]:
    """Weight and bias (None without `bias`), uniform up to +-1 / sqrt(W), the fan-in, as published.

    uniform: drawn from [0, 1), [*channels, W + 1]. axes: the channels' logical names.
    """
    width = uniform.shape[-1] - 1
    uniform = (2 * uniform - 1) / math.sqrt(width)
    weight = params.make(uniform[..., :width], (*axes, "conv"), "conv")
    return weight, params.make(uniform[..., width], axes, "bias") if bias else None


def init_window(weight: nnx.Param, batch: int, dtype, layout: caches.Layout) -> jax.Array:
    """Zeros: nothing stands before the first token."""
    axes = weight.get_metadata()["axes"]
    *channels, width = weight.shape[-len(axes) :]
    return layout.zeros((batch, width - 1, *channels), dtype, ("batch", None, *axes[:-1]))


def convolve(
    x_BT: jax.Array, weight: nnx.Param, bias: nnx.Param | None, activation: str | None, *, segment_ids, gaps: bool,
    window=None, rows: sharding.Axis = "batch",
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Convolution and activation (None: none) of x [B, T, *channels], and from `window` (None: from nothing) the new
    window.

    gaps: whether padding may stand between a document's tokens. The op knows silu; another activation comes behind it.
    rows: what splits B of x.
    """
    fused = activation if activation == "silu" else None
    y_BT, window = ops.causal_conv1d(
        x_BT, weight[...], None if bias is None else bias[...], channels=weight.get_metadata()["axes"][:-1],
        activation=fused, segment_ids=segment_ids, initial_state=window, gaps=gaps, rows=rows,
    )  # fmt: skip
    return (y_BT if fused else _activated(y_BT, activation)), window


def step(
    x_BT: jax.Array, weight: nnx.Param, bias: nnx.Param | None, activation: str | None, window: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same for one token, x [B, 1, *channels]: the result [B, *channels], and the new window."""
    window = jnp.concatenate([window, x_BT.astype(window.dtype)], axis=1)
    y_B = (window.astype(jnp.float32) * jnp.moveaxis(weight[...], -1, 0)[None]).sum(1)
    y_B = y_B if bias is None else y_B + bias[...][None]
    return _activated(y_B, activation).astype(x_BT.dtype), window[:, 1:]


def _activated(y: jax.Array, activation: str | None) -> jax.Array:
    return y if activation is None else ACTIVATIONS[activation](y)


def shift(x_BTD: jax.Array, *, segment_ids, gaps: bool, window=None) -> tuple[jax.Array, jax.Array | None]:
    """The token before, [B, T, D], zeros before a document's first: the convolution of window 2 with taps 1 and 0, so
    the op keeps documents apart, leaves padding out, and hands over what stands on the device before.

    window: [B, 1, D], the token before the first; None: zeros, and no new window is made.
    """
    taps_DW = jnp.broadcast_to(jnp.array([1.0, 0.0], jnp.float32), (x_BTD.shape[-1], 2))
    return ops.causal_conv1d(
        x_BTD,
        taps_DW,
        None,
        channels=(None,),
        activation=None,
        segment_ids=segment_ids,
        initial_state=window,
        gaps=gaps,
    )
