# SPDX-License-Identifier: Apache-2.0
"""Attention without rotations, as in Inkling (Thinking Machines 2026): each query adds to its scores what it makes of
the distance, from a few profiles that all heads of the layer share; keys and values are convolved over tokens.

Axis letters: B batch, T tokens, S keys, D model, H query heads, K key/value heads, P head width, R profiles, E
distances, W convolution window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import attention, inspection, ops, params, short_conv
from hybridlm.layers import cache as caches
from hybridlm.layers.attention import mean_visible
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, on_arrays
from hybridlm.layers.norm import RMSNorm


@dataclass(frozen=True)
class RelativeAttention:
    """Causal attention with learned terms by distance, normed queries and keys, convolved keys and values."""

    n_heads: int = 64
    """Query heads H."""
    n_kv_heads: int = 8
    """Key/value heads K."""
    d_head: int = 128
    """Head width P; scores are divided by it, as queries and keys are normed."""
    n_profiles: int = 16
    """Profiles R, of which each query takes so much of each."""
    extent: int = 1024
    """Distances E, the query's own position among them, from which on nothing is added."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: all before it."""
    d_conv: int = 4
    """Window W of the convolutions of keys and values, which are added to what they read."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms of queries and keys."""
    log_floor: int | None = None
    """From this position on scores grow by 1 + log_scale log((position + 1) / log_floor); None: they do not."""
    log_scale: float = 0.1
    """See log_floor."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "attention_in": Kept("relative attention: projections, before the convolutions", kernels=True),
        "attention_out": Kept("relative attention: input of the output projection", kernels=True),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        sizes = ("n_heads", "n_kv_heads", "d_head", "n_profiles", "extent", "window", "d_conv", "norm_eps", "log_floor")
        check_positive(self, sizes)
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads ({self.n_heads}) not divisible by n_kv_heads ({self.n_kv_heads})",
        )

    def check(self, d_model: int) -> None:
        """It fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "RelativeAttentionMixer":
        """The mixer of one sublayer."""
        return make.mixer(RelativeAttentionMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Query heads; key/value heads need not divide."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, convolutions, profiles, and the scores and sums of the visible keys."""
        d_queries, d_keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        projections = 2.0 * d_model * (2 * d_queries + 2 * d_keys + self.n_heads * self.n_profiles)
        profiles = 2.0 * self.n_heads * self.n_profiles * self.extent
        seen = mean_visible(seq_len, self.window)
        return projections + profiles + 4.0 * d_keys * self.d_conv + 4.0 * d_queries * seen

    def resolved(self, d_model: int) -> "RelativeAttention":
        """Without a floor the scale is that of none, 0."""
        scale = 0.0 if self.log_floor is None else self.log_scale
        return replace(self, log_scale=scale)


class RelativeAttentionMixer(nnx.Module):
    """Queries; keys and values, each plus its convolution; norms of queries and keys; attention; output projection."""

    __call__ = on_arrays

    def __init__(
        self,
        config: RelativeAttention,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input projections and profiles, and of the output projection
        (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, K, P, W = d_model, config.n_heads, config.n_kv_heads, config.d_head, config.d_conv
        query, key = ("heads", "d_head"), ("kv_heads", "d_head")
        self.w_q = params.matrix(rngs, (D, H, P), ("d_model", *query), init_std)
        self.w_k = params.matrix(rngs, (D, K, P), ("d_model", *key), init_std)
        self.w_v = params.matrix(rngs, (D, K, P), ("d_model", *key), init_std)
        self.w_r = params.matrix(rngs, (D, H, config.n_profiles), ("d_model", "heads", None), init_std)
        draw_k, draw_v = params.uniforms(rngs, (K, P, W + 1), (K, P, W + 1))
        self.conv_k, _ = short_conv.make(draw_k, key, bias=False)
        self.conv_v, _ = short_conv.make(draw_v, key, bias=False)
        self.q_norm = RMSNorm(P, config.norm_eps, axis="d_head")
        self.k_norm = RMSNorm(P, config.norm_eps, axis="d_head")
        self.profiles = params.matrix(rngs, (config.n_profiles, config.extent), (None, None), init_std, exact=True)
        out_std = init_std if out_std is None else out_std
        self.w_o = params.matrix(rngs, (H, P, D), (*query, "d_model"), out_std, n_in=2)

    @property
    def cache_grows(self) -> bool:
        """The cache grows with the number of tokens."""
        return self.config.window is None

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D] -> [B, T, D] in `dtype`."""
        ids, positions, places = attention.stand(x_BTD, tokens, self.config.extent)
        q, k, v, r, _ = self._project(x_BTD, positions, tokens, None)
        y_BTHP = self._attend(q, k, v, r, segment_ids=(ids, ids), positions=(places, places), split_tokens=True)
        return Output(self._output(y_BTHP))

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Entropy of the attention, and its share on the first token; see `inspection.attention`."""
        ids, positions, places = attention.stand(x_BTD, tokens, self.config.extent)
        q, k, _, r, _ = self._project(x_BTD, positions, tokens, None)
        options: dict[str, Any] = {"window": self.config.window, "scale": 1.0 / self.config.d_head, "softcap": None}
        return inspection.attention(q, k, None, ids, places, terms=(r, self.profiles[...]), **options)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, Any]:
        """Keys and values as of `Attention`, and the windows of their convolutions."""
        c = self.config
        slots = max_len if c.window is None else min(max_len, c.window)
        kept = {name: layout.keys((batch, slots, c.n_kv_heads, c.d_head), self.dtype) for name in ("k", "v")}
        windows = {"conv_k": self.conv_k, "conv_v": self.conv_v}
        return kept | {n: short_conv.init_window(w, batch, self.dtype, layout) for n, w in windows.items()}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the cache after them; see `block.Mixer`."""
        to = caches.Next.tokens(x_BTD, length_B, real_BT, gaps)
        ids = None if real_BT is None else real_BT.astype(jnp.int32)
        old = {name: caches.read(cache[name], layer) for name in ("conv_k", "conv_v")}
        q, k, v, r, windows = self._project(x_BTD, to.position_BT, Tokens(ids, gaps=gaps), old)
        k, v, new, places = to.store(self.config, cache, layer, k, v)
        new |= {name: caches.write(cache[name], layer, a) for name, a in windows.items()}
        return self._output(self._attend(q, k, v, r, **places)), new

    def _project(self, x_BTD, positions_BT, tokens: Tokens, old: dict | None) -> tuple[Any, Any, Any, Any, dict]:
        """Queries [B, T, H, P], keys and values [B, T, K, P], shares of profiles [B, T, H, R], and from the cache's
        windows `old` the new ones."""
        with jax.named_scope("project"):
            pairs = ((w, None) for w in (self.w_q, self.w_k, self.w_v, self.w_r))
            q, k, v, r = params.projections(x_BTD.astype(self.dtype), *pairs)
            q, r = (sharding.constrain(a, "batch", "tokens", "heads", None) for a in (q, r))
            k, v = (sharding.constrain(a, "batch", "tokens", "kv_heads", None) for a in (k, v))
            q, k, v, r = (checkpoint_name(a, "attention_in") for a in (q, k, v, r))
        with jax.named_scope("convolve"):
            k, of_k = self._convolved(k, self.conv_k, tokens, old and old["conv_k"])
            v, of_v = self._convolved(v, self.conv_v, tokens, old and old["conv_v"])
        with jax.named_scope("norm_heads"):
            q, k = self.q_norm(q), self.k_norm(k)
        if (floor := self.config.log_floor) is not None:
            factor_BT = 1.0 + self.config.log_scale * jnp.log(
                jnp.maximum((positions_BT + 1).astype(jnp.float32) / floor, 1.0)
            )
            q, r = (_times(a, factor_BT) for a in (q, r))
        return q, k, v, r, {"conv_k": of_k, "conv_v": of_v}

    def _convolved(self, x_BTKP, weight: nnx.Param, tokens: Tokens, window) -> tuple[jax.Array, jax.Array | None]:
        """Keys or values plus their convolution, and the new window (None: from nothing, none)."""
        y_BTKP, window = short_conv.convolve(
            x_BTKP, weight, None, None, segment_ids=tokens.segment_ids, gaps=tokens.gaps, window=window
        )
        return x_BTKP + y_BTKP, window

    @jax.named_scope("attend")
    def _attend(self, q, k, v, r, **places) -> jax.Array:
        """The op; places: where queries and keys stand, as `ops.relative_attention` takes it."""
        options: dict[str, Any] = {"window": self.config.window, "scale": 1.0 / self.config.d_head}
        y_BTHP = ops.relative_attention(q, k, v, r, self.profiles[...], **places, **options)
        return checkpoint_name(y_BTHP, "attention_out")

    @jax.named_scope("output")
    def _output(self, y_BTHP: jax.Array) -> jax.Array:
        return params.leave(sharding.constrain(y_BTHP, "batch", "tokens", "heads", None), self.w_o)


def _times(x_BTHP: jax.Array, factor_BT: jax.Array) -> jax.Array:
    """In float32; the type of x."""
    return (x_BTHP.astype(jnp.float32) * factor_BT[:, :, None, None]).astype(x_BTHP.dtype)
