# SPDX-License-Identifier: Apache-2.0
"""Weights at several depths: Zamba's shared transformer (Glorioso et al. 2024, "Zamba"; "The Zamba2 Suite").

At each depth of the block's symbol, `x + mixer(norm(x + link(shared(concat(x, embeddings)))))`: the transformer
`shared` (attention, then MLP, each behind a norm, no residuals) has one set of weights for all depths of the symbol;
the mixer, the linear map `link` and the low-rank adapters of the shared weights are each depth's own.

Axis letters: B batch, T tokens, D model, H heads, K key/value heads, P head width, F feed-forward, R low rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybridlm.errors import require, within
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import params
from hybridlm.layers.attention import Attention, AttentionMixer, cache_grows, init_cache
from hybridlm.layers.block import Block, Kept, Make, Mixer, Statistic, Tokens, passes, shares, split_of_parts
from hybridlm.layers.mamba2 import Mamba2
from hybridlm.layers.mixers import AnyMixer
from hybridlm.layers.mlp import MLP, FeedForward
from hybridlm.layers.norm import RMSNorm


@dataclass(frozen=True)
class Shared:
    """A mixer of its own at each depth, behind a transformer whose weights all depths of the symbol share."""

    mixer: AnyMixer = Mamba2()  # noqa: RUF009 (frozen)
    """Each depth's own mixer; the residual stream gets its output alone."""
    attention: Attention = Attention()  # noqa: RUF009 (frozen)
    """Shared; reads concat(x, embeddings), of width 2 D."""
    mlp: MLP = MLP(activation="geglu")  # noqa: RUF009 (frozen)
    """Shared; reads the attention's output."""
    mlp_adapter: int | None = None
    """Rank of each depth's addition to the MLP's first matrix; None: no addition."""
    attention_adapter: int | None = None
    """Rank of each depth's additions to the query, key and value matrices; None: no additions."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {}
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("mlp_adapter", "attention_adapter"))

    def parts(self) -> dict[str, Block]:
        """The blocks inside, by field name."""
        return {"mixer": self.mixer, "attention": self.attention, "mlp": self.mlp}

    def check(self, d_model: int) -> None:
        """Raises ConfigError where the mixer cannot be built at the model width."""
        require(not shares(self.mixer), f"mixer ({type(self.mixer).__name__}) shares weights over depths itself")
        require(
            not passes(self.mixer, d_model), f"mixer ({type(self.mixer).__name__}) hands on to depths: it cannot be"
        )
        with within("mixer."):
            self.mixer.check(d_model)

    def build(self, d_model: int, make: Make) -> Mixer:
        """Each depth's own mixer."""
        return self.mixer.build(d_model, make)

    def build_link(self, d_model: int, make: Make) -> "SharedLink":
        """Each depth's adapters and its way from the shared transformer to the mixer."""
        return make.mixer(SharedLink, self, d_model)

    def build_shared(self, d_model: int, make: Make) -> "SharedTransformer":
        """What all depths of the symbol share."""
        return make.mixer(SharedTransformer, self, d_model, norm_eps=make.norm_eps)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Those of the parts."""
        return split_of_parts(self, d_model)

    def flops(self, d_model: int, seq_len: int) -> float:
        """The parts; the attention's input is twice as wide; the link; adapters."""
        total = sum(part.flops(d_model, seq_len) for part in self.parts().values())
        d_qkv = (self.attention.n_heads + 2 * self.attention.kv_heads) * self.attention.d_head
        d_mlp = (2 if self.mlp.gated else 1) * self.mlp.d_ff
        total += 2.0 * d_model * d_qkv + 2.0 * d_model * d_model
        total += 2.0 * (self.attention_adapter or 0) * (6 * d_model + d_qkv)
        return total + 2.0 * (self.mlp_adapter or 0) * (d_model + d_mlp)

    def resolved(self, d_model: int) -> "Shared":
        """The parts resolved."""
        resolved: dict[str, Any] = {name: part.resolved(d_model) for name, part in self.parts().items()}
        return replace(self, **resolved)


class SharedTransformer(nnx.Module):
    """mlp(norm(attention(norm(concat(x, embeddings))))): what the depths share."""

    def __init__(self, config: Shared, d_model: int, *, norm_eps: float = 1e-5, **options: Any):
        """options: those of every mixer: rngs, init_std, out_std, dtype."""
        self.norm = RMSNorm(2 * d_model, norm_eps)
        self.attention = AttentionMixer(config.attention, 2 * d_model, d_out=d_model, **options)
        self.mlp_norm = RMSNorm(d_model, norm_eps)
        self.mlp = FeedForward(config.mlp, d_model, **options)


class SharedLink(nnx.Module):
    """A depth's own part: its adapters of the shared weights, and the linear map behind them."""

    def __init__(
        self,
        config: Shared,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std: standard deviation of the linear map; adapters start at zero (their second matrix does); out_std is
        that of mixers, of which a link is none."""
        self.dtype, self.attention = dtype, config.attention
        D, c = d_model, config.attention
        heads, kv_heads = ("heads", "d_head"), ("kv_heads", "d_head")
        outputs = {"q": ((c.n_heads, c.d_head), heads)}
        outputs |= {name: ((c.kv_heads, c.d_head), kv_heads) for name in "kv"}
        rank = config.attention_adapter
        adapters = {} if rank is None else {name: Adapter(rngs, 2 * D, rank, *outputs[name]) for name in "qkv"}
        if config.mlp_adapter is not None:
            F = config.mlp.d_ff
            out = ((2, F), (None, "d_ff")) if config.mlp.gated else ((F,), ("d_ff",))
            adapters["mlp"] = Adapter(rngs, D, config.mlp_adapter, *out)
        self.adapters = nnx.Dict(adapters)
        self.linear = params.matrix(rngs, (D, D), ("d_model", None), init_std)

    @property
    def cache_grows(self) -> bool:
        """Whether the shared attention's cache grows with the number of tokens."""
        return cache_grows(self.attention)

    def __call__(self, x_BTD: jax.Array, tokens: Tokens) -> jax.Array:
        """What is added to the mixer's input, [B, T, D]."""
        shared = tokens.shared
        u_BTE = shared.norm(_beside(x_BTD, tokens))
        y_BTD = shared.attention.mix(u_BTE, tokens, self._qkv(u_BTE)).y_BTD
        return self._rest(shared, y_BTD)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What the shared attention says of itself at this depth."""
        u_BTE = tokens.shared.norm(_beside(x_BTD, tokens))
        return tokens.shared.attention.inspect(u_BTE, tokens, self._qkv(u_BTE))

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """That of the shared attention, at this depth."""
        return init_cache(self.attention, batch, max_len, self.dtype, layout)

    def extend(self, x_BTD: jax.Array, cache: dict, length_B, real_BT, layer, tokens: Tokens) -> tuple[jax.Array, dict]:
        """The same for the next T tokens, and the attention's cache after them."""
        shared = tokens.shared
        u_BTE = shared.norm(_beside(x_BTD, tokens))
        added = self._qkv(u_BTE)
        y_BTD, cache = shared.attention.extend(u_BTE, cache, length_B, real_BT, layer, added, gaps=tokens.gaps)
        return self._rest(shared, y_BTD), cache

    def _qkv(self, u_BTE) -> list[jax.Array] | None:
        return [self.adapters[name](u_BTE) for name in "qkv"] if "q" in self.adapters else None

    def _rest(self, shared: SharedTransformer, y_BTD) -> jax.Array:
        y_BTD = shared.mlp_norm(y_BTD)
        added = self.adapters["mlp"](y_BTD) if "mlp" in self.adapters else None
        y_BTD = shared.mlp.mix(y_BTD, Tokens(), added).y_BTD
        return params.project(y_BTD.astype(self.dtype), self.linear)


def _beside(x_BTD: jax.Array, tokens: Tokens) -> jax.Array:
    """[B, T, 2 D]: the residual stream, and the model's embedded tokens."""
    embedded_BTD: Any = tokens.embedded_BTD
    return jnp.concatenate([x_BTD, embedded_BTD], axis=-1)


class Adapter(nnx.Module):
    """x -> x a b: what a depth adds to a shared matrix, of low rank (Hu et al. 2021, "LoRA", without its scale)."""

    def __init__(self, rngs: nnx.Rngs, d_in: int, rank: int, shape: tuple[int, ...], axes: tuple):
        """shape, axes: of the output, with their logical names."""
        self.a = params.matrix(rngs, (d_in, rank), ("d_model", None), 1 / math.sqrt(d_in))
        self.b = params.make(jnp.zeros((rank, *shape)), (None, *axes), "matrix", n_in=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, d_in] -> [B, T, *shape], in the input's type."""
        return params.project(params.project(x, self.a), self.b)
