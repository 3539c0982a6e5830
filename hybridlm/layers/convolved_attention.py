# SPDX-License-Identifier: Apache-2.0
"""Compressed convolutional attention (Figliolia et al. 2025, arXiv:2510.04476), as in ZAYA1.

Axis letters: B batch, T tokens, D model, H query heads, K key/value heads, P head width, W taps of the convolution of
each channel, U taps of that within a head, c now and before.
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
from hybridlm.layers import attention, inspection, ops, params
from hybridlm.layers import cache as caches
from hybridlm.layers.attention import mean_visible
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, on_arrays
from hybridlm.layers.rope import Rope, rotate

NORM_EPS = 2.0**-23
"""Least length of a query or key, float32's epsilon as published."""


@dataclass(frozen=True)
class ConvolvedAttention:
    """Causal attention whose queries and keys are convolved over tokens, and half of whose values are a token late."""

    n_heads: int = 8
    """Query heads H."""
    n_kv_heads: int = 2
    """Key/value heads K."""
    d_head: int = 128
    """Head width P."""
    d_conv: int = 2
    """Taps W of the first convolution, channel by channel."""
    d_conv_heads: int = 2
    """Taps U of the second one, which mixes the channels of a head."""
    rope: Rope = Rope(fraction=0.5)  # noqa: RUF009 (frozen)
    """Rotary embedding, behind the norm of queries and keys."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: all before it."""
    bias: bool = False
    """Bias of the projections; the convolutions always have one."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "attention_in": Kept("convolved attention: projections, before the convolutions", kernels=True),
        "attention_q": Kept("convolved attention: queries, normed and rotated", kernels=True),
        "attention_k": Kept("convolved attention: keys, normed and rotated", kernels=True),
        "attention_v": Kept("convolved attention: values", kernels=True),
        "attention_out": Kept("convolved attention: input of the output projection", kernels=True),
        "attention_kept": Kept(
            "convolved attention: log-sum-exp, and output, from which its backward starts", kernels=True
        ),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_heads", "n_kv_heads", "d_head", "d_conv", "d_conv_heads", "window"))
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_heads ({self.n_heads}) not divisible by n_kv_heads ({self.n_kv_heads})",
        )
        width = self.n_kv_heads * self.d_head
        require(width % 2 == 0, f"n_kv_heads * d_head ({width}) must be even: half of the values are a token late")
        self.rope.d_rotated(self.d_head)

    def check(self, d_model: int) -> None:
        """It fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "ConvolvedAttentionMixer":
        """The mixer of one sublayer."""
        return make.mixer(ConvolvedAttentionMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Query heads; key/value heads need not divide."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, convolutions, and the scores and sums of the visible keys."""
        d_queries, d_keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        projections = 2.0 * d_model * (2 * d_queries + 2 * d_keys)
        convolutions = 2.0 * (d_queries + d_keys) * (self.d_conv + self.d_conv_heads * self.d_head)
        return projections + convolutions + 4.0 * d_queries * mean_visible(seq_len, self.window)

    def resolved(self, d_model: int) -> "ConvolvedAttention":
        """Nothing is derived."""
        return replace(self)


class ConvolvedAttentionMixer(nnx.Module):
    """Queries and keys: two convolutions of their projections, plus the mean of a query's and its key's projection;
    brought to length sqrt(P), keys times a learned factor; rotated. Values: half of the token, half of the one before.
    """

    __call__ = on_arrays

    def __init__(
        self,
        config: ConvolvedAttention,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input projections and of the output one (None: init_std).
        Convolutions start uniform up to +-1 / sqrt(fan-in)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, K, P, bias = d_model, config.n_heads, config.n_kv_heads, config.d_head, config.bias
        query, key, late = ("heads", "d_head"), ("kv_heads", "d_head"), K * P // 2
        self.w_q = params.matrix(rngs, (D, H, P), ("d_model", *query), init_std)
        self.w_k = params.matrix(rngs, (D, K, P), ("d_model", *key), init_std)
        self.w_v = params.matrix(rngs, (D, 2, late), ("d_model", None, None), init_std, fused_axes=(1,))
        self.b_q = params.zeros((H, P), query, "bias") if bias else None
        self.b_k = params.zeros((K, P), key, "bias") if bias else None
        self.b_v = params.zeros((2, late), (None, None), "bias") if bias else None
        self.conv_q, self.conv_q_bias, self.heads_q, self.heads_q_bias = self._convolutions(rngs, query, H)
        self.conv_k, self.conv_k_bias, self.heads_k, self.heads_k_bias = self._convolutions(rngs, key, K)
        self.key_scale = params.ones((K,), key[:1], "norm")
        self.w_o = params.matrix(rngs, (H, P, D), (*query, "d_model"), init_std if out_std is None else out_std, n_in=2)
        self.b_o = params.zeros((D,), ("d_model",), "bias") if bias else None

    def _convolutions(self, rngs: nnx.Rngs, axes: tuple[str, str], n_heads: int) -> tuple[nnx.Param, ...]:
        """Weights and biases of both: [n_heads, P, W] and [P in, U, n_heads, P out], taps oldest first."""
        P, W, U = self.config.d_head, self.config.d_conv, self.config.d_conv_heads
        conv, heads = params.uniforms(rngs, (n_heads, P, W), (P, U, n_heads, P))
        return (
            params.make((2 * conv - 1) / W**0.5, (*axes, "conv"), "conv"),
            params.zeros((n_heads, P), axes, "bias"),
            params.make((2 * heads - 1) / (P * U) ** 0.5, (axes[1], None, *axes), "matrix", n_in=1, fused_axes=(1, 2)),
            params.zeros((n_heads, P), axes, "bias"),
        )

    @property
    def cache_grows(self) -> bool:
        """The cache grows with the number of tokens."""
        return self.config.window is None

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D] -> [B, T, D] in `dtype`."""
        ids, positions, places = attention.stand(x_BTD, tokens, self.config.window)
        q, k, v, _ = self._project(x_BTD, positions, tokens, None)
        y_BTHP = self._attend(q, k, v, segment_ids=(ids, ids), positions=(places, places), split_tokens=True)
        return Output(self._output(y_BTHP))

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Entropy of the attention, and its share on the first token; see `inspection.attention`."""
        ids, positions, places = attention.stand(x_BTD, tokens, self.config.window)
        q, k, _, _ = self._project(x_BTD, positions, tokens, None)
        options = {"window": self.config.window, "scale": self.config.d_head**-0.5, "softcap": None}
        return inspection.attention(q, k, None, ids, places, **options)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Keys and values as of `Attention`, and of both convolutions and the late values the tokens before."""
        c, late = self.config, self.w_v.shape[-1]
        slots = max_len if c.window is None else min(max_len, c.window)
        kept = {name: layout.keys((batch, slots, c.n_kv_heads, c.d_head), self.dtype) for name in ("k", "v")}
        for name, n_heads, axis in (("q", c.n_heads, "heads"), ("k", c.n_kv_heads, "kv_heads")):
            for conv, width in (("conv", c.d_conv), ("heads", c.d_conv_heads)):
                shape = (batch, width - 1, n_heads, c.d_head)
                kept[f"{conv}_{name}"] = layout.zeros(shape, self.dtype, ("batch", None, axis))
        return kept | {"late": layout.zeros((batch, 1, late), self.dtype)}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the cache after them; see `block.Mixer`."""
        to = caches.Next.tokens(x_BTD, length_B, real_BT, gaps)
        ids = None if real_BT is None else real_BT.astype(jnp.int32)
        old = {name: caches.read(a, layer) for name, a in cache.items() if name not in ("k", "v")}
        q, k, v, windows = self._project(x_BTD, to.position_BT, Tokens(ids, gaps=gaps), old)
        k, v, new, places = to.store(self.config, cache, layer, k, v)
        new |= {name: caches.write(cache[name], layer, a) for name, a in windows.items()}
        return self._output(self._attend(q, k, v, **places)), new

    def _project(self, x_BTD, positions_BT, tokens: Tokens, old: dict | None) -> tuple[Any, Any, Any, dict]:
        """Queries [B, T, H, P], keys and values [B, T, K, P], and from the cache's windows `old` the new ones."""
        with jax.named_scope("project"):
            pairs = (self.w_q, self.b_q), (self.w_k, self.b_k), (self.w_v, None)
            q, k, v_BTcX = params.projections(x_BTD.astype(self.dtype), *pairs)
            q, v_BTcX = (checkpoint_name(a, "attention_in") for a in (q, v_BTcX))
            q = sharding.constrain(q, "batch", "tokens", "heads", None)
            k = checkpoint_name(sharding.constrain(k, "batch", "tokens", "kv_heads", None), "attention_in")
        with jax.named_scope("convolve"):
            shared_q, shared_k = _means(q, k)
            q, of_q = self._convolve("q", q, tokens, old)
            k, of_k = self._convolve("k", k, tokens, old)
            v, late = self._values(v_BTcX, tokens, old)
        with jax.named_scope("norm_heads"):
            q = rotate(_unit(q + shared_q), positions_BT, self.config.rope)
            k = _unit(k + shared_k) * self.key_scale[...][None, None, :, None].astype(self.dtype)
            k = rotate(k, positions_BT, self.config.rope)
        q, k, v = (checkpoint_name(a, f"attention_{name}") for name, a in (("q", q), ("k", k), ("v", v)))
        return q, k, v, {**of_q, **of_k, "late": late}

    def _convolve(self, name: str, x_BTHP, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """Both convolutions of queries or keys. In front of a document's first token stand zeros, which leave the first
        convolution as its bias: so that bias goes through all taps of the second, whatever stands there."""
        conv, bias, heads, heads_bias = (getattr(self, part.format(name)) for part in PARTS)
        names, U = conv.get_metadata()["axes"][:2], self.config.d_conv_heads
        x_BTHP, before = _filtered(x_BTHP, conv[...], names, tokens, old and old[f"conv_{name}"])
        w_PUHP = params.use(heads, self.dtype)
        y_BTHP, after = jnp.einsum("BTHQ,QHP->BTHP", x_BTHP, w_PUHP[:, U - 1]), old and old[f"heads_{name}"]
        for tap in range(U - 1):
            one = jnp.zeros((*conv.shape[-3:-1], U)).at[..., tap].set(1.0)
            earlier, after = _filtered(x_BTHP, one, names, tokens, old and old[f"heads_{name}"])
            y_BTHP += jnp.einsum("BTHQ,QHP->BTHP", earlier, w_PUHP[:, tap])
        through = jnp.einsum("HQ,QHP->HP", bias[...].astype(self.dtype), w_PUHP.sum(1))
        y_BTHP += (through + heads_bias[...].astype(self.dtype))[None, None]
        y_BTHP = sharding.constrain(y_BTHP, "batch", "tokens", names[0], None)
        return y_BTHP, {f"conv_{name}": before, f"heads_{name}": after}

    def _values(self, v_BTcX, tokens: Tokens, old: dict | None) -> tuple[jax.Array, jax.Array | None]:
        """Values [B, T, K, P]: of the token the first half, of the one before the second."""
        now, late = (sharding.constrain(v_BTcX[:, :, c], "batch", "tokens", None) for c in range(2))
        one = jnp.broadcast_to(jnp.array([1.0, 0.0]), (late.shape[-1], 2))
        late, window = _filtered(late, one, (None,), tokens, old and old["late"])
        v_BTX = jnp.concatenate([now, late], axis=-1)
        if self.b_v is not None:
            v_BTX += self.b_v[...].reshape(-1).astype(v_BTX.dtype)[None, None]
        v_BTKP = v_BTX.reshape(*v_BTX.shape[:2], self.config.n_kv_heads, self.config.d_head)
        return sharding.constrain(v_BTKP, "batch", "tokens", "kv_heads", None), window

    @jax.named_scope("attend")
    def _attend(self, q, k, v, **places) -> jax.Array:
        """The attention op; places: where queries and keys stand, as `ops.attention` takes it."""
        options = {"window": self.config.window, "scale": self.config.d_head**-0.5, "softcap": None}
        return checkpoint_name(ops.attention(q, k, v, None, None, **places, **options), "attention_out")

    @jax.named_scope("output")
    def _output(self, y_BTHP: jax.Array) -> jax.Array:
        y_BTHP = sharding.constrain(y_BTHP, "batch", "tokens", "heads", None)
        return params.leave(y_BTHP, self.w_o, self.b_o)


PARTS = ("conv_{}", "conv_{}_bias", "heads_{}", "heads_{}_bias")
"""Parameters of the convolutions of queries and of keys."""


def _filtered(x_BT, taps, channels: tuple, tokens: Tokens, window) -> tuple[jax.Array, jax.Array | None]:
    """The convolution of each channel, zeros in front of a document, and the new window (None: from nothing, none)."""
    return ops.causal_conv1d(
        x_BT, taps, None, channels=channels, activation=None, segment_ids=tokens.segment_ids, initial_state=window,
        gaps=tokens.gaps,
    )  # fmt: skip


def _means(q_BTHP: jax.Array, k_BTKP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each query the mean of it and its key; of each key that of these means."""
    (*rows, n_heads, width), n_keys = q_BTHP.shape, k_BTKP.shape[2]
    both = 0.5 * (q_BTHP.reshape(*rows, n_keys, n_heads // n_keys, width) + k_BTKP[:, :, :, None])
    return both.reshape(q_BTHP.shape), both.mean(axis=3)


def _unit(x_BTHP: jax.Array) -> jax.Array:
    """Each head's vector brought to length sqrt(P), in float32; the type of the input."""
    x = x_BTHP.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return (x * x.shape[-1] ** 0.5 * jax.lax.rsqrt(jnp.maximum(square, NORM_EPS**2))).astype(x_BTHP.dtype)
