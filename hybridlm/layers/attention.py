# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention with an optional sigmoid output gate (Qiu et al. 2025, "Gated Attention for LLMs").

Axis letters: B batch, T tokens, S keys, D model, H query heads, K key/value heads, P head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, one_row, ops, params, qk_norm
from hybridlm.layers.block import (
    LEFT_TO_RIGHT,
    Direction,
    Kept,
    Make,
    Output,
    Statistic,
    Tokens,
    on_arrays,
    refuse_cache,
)
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.quantized import Joined
from hybridlm.layers.rope import Rope, rotate
from hybridlm.layers.segments import positions_within
from pallas_kernels.segments import document_ids


@dataclass(frozen=True)
class Attention:
    """Attention: MHA, GQA or MQA; rotary, windowed, capped, with sinks, gated; causal, or in both directions."""

    n_heads: int = 16
    """Query heads H."""
    n_kv_heads: int | None = None
    """Key/value heads K; None: n_heads (MHA); 1 is MQA."""
    d_head: int = 64
    """Head width P."""
    rope: Rope | None = Rope()  # noqa: RUF009 (frozen)
    """Rotary embedding; None: no positions (NoPE)."""
    qk_norm: bool = False
    """RMS norm of each query and key head."""
    qk_norm_eps: float = 1e-6
    """Added to the mean square in qk_norm."""
    qk_norm_over: Literal["head", "all"] = "head"
    """qk_norm is taken of each head by itself, or of all heads together (OLMo)."""
    qk_norm_offset: float = 0.0
    """Added to the weights of qk_norm (1: Qwen3-Next)."""
    qk_norm_rotated: bool = False
    """qk_norm comes behind the rotation, not before it (Hunyuan)."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None: all before it."""
    scale: float | None = None
    """Multiplier of the scores; None: d_head ** -0.5."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap)."""
    sinks: bool = False
    """A learned logit per head in the softmax denominator."""
    gate: Literal["elementwise", "head"] | None = None
    """Sigmoid output gate from the layer's input: per element of a head, per head, or none."""
    gate_bias: bool = False
    """Bias of the gate's projection."""
    qkv_bias: bool = False
    """Bias of the query, key and value projections."""
    out_bias: bool = False
    """Bias of the output projection."""
    key_multiplier: float = 1.0
    """Multiplies the keys before the rotation."""
    direction: Direction = LEFT_TO_RIGHT
    """A token sees itself and those before it in its document, or all of it."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "attention_q": Kept("attention: queries, rotated; before their norm where they have one", kernels=True),
        "attention_k": Kept("attention: keys, rotated; before their norm where they have one", kernels=True),
        "attention_v": Kept("attention: values", kernels=True),
        "attention_rotated": Kept("attention: queries and keys, normed and rotated, where they have a norm"),
        "attention_gate": Kept("attention: pre-activation of the output gate", kernels=True),
        "attention_out": Kept("attention: input of the output projection", kernels=True),
        "attention_kept": Kept(
            "attention: output before the gate, and log-sum-exp, from which its backward starts", kernels=True
        ),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_heads", "d_head", "n_kv_heads", "window", "softcap", "scale"))
        require(
            self.n_heads % self.kv_heads == 0, f"n_heads ({self.n_heads}) not divisible by n_kv_heads ({self.kv_heads})"
        )
        require(
            self.direction == LEFT_TO_RIGHT or self.window is None,
            f"window ({self.window}) must be None where direction is {self.direction}: it counts tokens before a token",
        )
        require(not self.gate_bias or self.gate is not None, "gate_bias needs a gate")
        if self.rope is not None:
            self.rope.d_rotated(self.d_head)

    @property
    def kv_heads(self) -> int:
        """Key/value heads K."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def check(self, d_model: int) -> None:
        """Attention fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "AttentionMixer":
        """The mixer of one sublayer."""
        return make.mixer(AttentionMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Query heads; key/value heads need not divide."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, and the scores and sums of the visible keys."""
        d_queries, d_keys = self.n_heads * self.d_head, self.kv_heads * self.d_head
        gate = {"elementwise": d_queries, "head": self.n_heads, None: 0}[self.gate]
        projections = 2.0 * d_model * (2 * d_queries + 2 * d_keys + gate)
        seen = mean_visible(seq_len, self.window) if self.direction == LEFT_TO_RIGHT else seq_len
        return projections + 4.0 * d_queries * seen

    @property
    def score_scale(self) -> float:
        """Multiplier of the scores."""
        return self.d_head**-0.5 if self.scale is None else self.scale

    def resolved(self, d_model: int) -> "Attention":
        """With the number of key/value heads and the scale; without qk_norm its options are those of none, eps 1."""
        norm: dict[str, Any] = {"qk_norm_rotated": self.qk_norm_rotated and self.rope is not None}
        if not self.qk_norm:
            norm = {"qk_norm_eps": 1.0, "qk_norm_over": "head", "qk_norm_offset": 0.0, "qk_norm_rotated": False}
        return replace(self, n_kv_heads=self.kv_heads, scale=self.score_scale, **norm)


def mean_visible(seq_len: int, window: int | None) -> float:
    """Keys that a query sees, itself included, averaged over a row of seq_len tokens."""
    window = min(seq_len, seq_len if window is None else window)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def stand(x_BTD: jax.Array, tokens: Tokens, window: int | None) -> tuple:
    """Ids of documents, positions for rotations, and positions for the window where those in the row do not do."""
    ids, positions, places = tokens.segment_ids, tokens.positions, None
    if positions is None:
        positions = positions_within(ids, x_BTD.shape[:2])
    if tokens.gaps and ids is not None:
        if window is not None:  # counts tokens of the document, not padding between them
            places = positions_within(ids, ids.shape)
        ids = document_ids(ids)
    return ids, positions, places


class AttentionMixer(nnx.Module):
    """Projections, norm and rotation of queries and keys, causal attention with the output gate, output projection."""

    def __init__(
        self,
        config: Attention,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        d_out: int | None = None,
    ):
        """init_std, out_std: standard deviations of the input projections and of the output one (None: init_std).
        d_out: width of the output (None: d_model)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, K, P = d_model, config.n_heads, config.kv_heads, config.d_head
        d_out = d_model if d_out is None else d_out
        query, key = ("heads", "d_head"), ("kv_heads", "d_head")
        self.w_q = params.matrix(rngs, (D, H, P), ("d_model", *query), init_std)
        self.w_k = params.matrix(rngs, (D, K, P), ("d_model", *key), init_std, joined=True)
        self.w_v = params.matrix(rngs, (D, K, P), ("d_model", *key), init_std, joined=True)
        self.b_q = params.zeros((H, P), query, "bias") if config.qkv_bias else None
        self.b_k = params.zeros((K, P), key, "bias") if config.qkv_bias else None
        self.b_v = params.zeros((K, P), key, "bias") if config.qkv_bias else None
        gate_shape = {None: None, "elementwise": (H, P), "head": (H,)}[config.gate]
        if gate_shape is None:
            self.w_gate = self.b_gate = None
        else:
            gate_axes = query[: len(gate_shape)]
            self.w_gate = params.matrix(rngs, (D, *gate_shape), ("d_model", *gate_axes), init_std)
            self.b_gate = params.zeros(gate_shape, gate_axes, "bias") if config.gate_bias else None
        self.q_norm = _qk_norm(config, H, query) if config.qk_norm else None
        self.k_norm = _qk_norm(config, K, key) if config.qk_norm else None
        self.sinks = params.zeros((H,), ("heads",), "sink") if config.sinks else None
        out_std = init_std if out_std is None else out_std
        self.w_o = params.matrix(rngs, (H, P, d_out), (*query, "d_model"), out_std, n_in=2)
        self.b_o = params.zeros((d_out,), ("d_model",), "bias") if config.out_bias else None

    @property
    def cache_grows(self) -> bool:
        """The cache grows with the number of tokens."""
        return cache_grows(self.config)

    __call__ = on_arrays

    def mix(self, x_BTD: jax.Array, tokens: Tokens, added: list[jax.Array] | None = None) -> Output:
        """[B, T, D] -> [B, T, D] in `dtype`.

        added: [B, T, H or K, P] each, added to the projections of queries, keys and values.
        """
        ids, positions, places = stand(x_BTD, tokens, self.config.window)
        q, k, v, gate = self._project(x_BTD, positions, added, learns=self._in_one_pass)
        how: dict[str, Any] = {"scale": 1.0} if self._in_one_pass else {}
        where = {"segment_ids": (ids, ids), "positions": (places, places), "split_tokens": True}
        y_BTHP = self._attend(q, k, v, gate, **where, **how)
        return Output(self._output(y_BTHP))

    def inspect(
        self, x_BTD: jax.Array, tokens: Tokens, added: list[jax.Array] | None = None, every: int = 1
    ) -> dict[str, jax.Array]:
        """Entropy of the attention, and its share on the first token. added: as in mix; every: as in
        `inspection.attention`."""
        ids, positions, places = stand(x_BTD, tokens, self.config.window)
        q, k, _, _ = self._project(x_BTD, positions, added)
        sinks = None if self.sinks is None else self.sinks[...]
        return inspection.attention(q, k, sinks, ids, places, every=every, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        """Of the op."""
        c = self.config
        return {"window": c.window, "scale": c.scale, "softcap": c.softcap, "causal": c.direction == LEFT_TO_RIGHT}

    @property
    def _in_one_pass(self) -> bool:
        """Norm and rotation of heads are one function."""
        c = self.config
        own = c.qk_norm and c.qk_norm_over == "head" and not c.qk_norm_rotated
        return own and qk_norm.is_faster(c.rope, c.d_head)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Keys and values, see `init_cache` below."""
        if self.config.direction != LEFT_TO_RIGHT:
            refuse_cache()
        return init_cache(self.config, batch, max_len, self.dtype, layout)

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, added: list[jax.Array] | None = None,
        *, gaps: bool = True,
    ) -> tuple[jax.Array, dict]:  # fmt: skip
        """Outputs of the next T tokens and the cache after them; see `block.Mixer`.

        Position p is stored in slot p mod S. added: as in `mix`.
        """
        to = caches.Next.tokens(x_BTD, length_B, real_BT, gaps)
        q, k, v, gate = self._project(x_BTD, to.position_BT, added)
        k, v, new, places = to.store(self.config, cache, layer, k, v)
        return self._output(self._attend(q, k, v, gate, **places)), new

    def extend_row(self, row: one_row.Row, cache: dict, length_B, layer) -> tuple[jax.Array, dict] | None:
        """See `layers.one_row`."""
        pairs = self._projections
        if any(bias is not None for bias in (self.b_o, *(bias for _, bias in pairs))):
            return None
        weights = [weight for weight, _ in pairs]
        if self.w_o.shape[-1] != self.d_model or not one_row.takes(*weights) or not one_row.takes(self.w_o, n_in=2):
            return None
        to = caches.Next.tokens(row.x_BTD, length_B, None, False)
        with jax.named_scope("project"):
            parts = [a[:, None] for a in one_row.products(row, *weights)]
            q, k, v, gate = self._apart(parts, to.position_BT, None)
        k, v, new, places = to.store(self.config, cache, layer, k, v)
        y_BTHP = self._attend(q, k, v, gate, **places)
        with jax.named_scope("output"):
            return one_row.add(row, "plain", [y_BTHP], self.w_o), new

    @property
    def _projections(self) -> list[tuple[nnx.Param, nnx.Param | None]]:
        """Matrix and bias of queries, keys, values and, where there is one, the gate."""
        pairs = [(self.w_q, self.b_q), (self.w_k, self.b_k), (self.w_v, self.b_v)]
        return pairs if self.w_gate is None else [*pairs, (self.w_gate, self.b_gate)]

    @property
    def readers(self) -> int:
        """Products of the input."""
        return len(self._projections)

    @jax.named_scope("project")
    def _project(
        self, x_BTD: jax.Array, positions_BT: jax.Array, added: list[jax.Array] | None, learns: bool = False
    ) -> tuple:
        """Queries [B, T, H, P], keys and values [B, T, K, P], gate pre-activation ([B, T, H, P], [B, T, H] or None).

        learns: queries times the scale of their scores, as a pair, of them and the same in float32, to which
        `ops.attention` can hand back a gradient that it neither scales nor rounds."""
        return self._apart(
            params.projections(x_BTD.astype(self.dtype), *self._projections), positions_BT, added, learns
        )

    def _apart(
        self, parts: list[jax.Array], positions_BT: jax.Array, added: list | None, learns: bool = False
    ) -> tuple:
        """The same of results of the projections."""
        q, k, v, *gate = parts
        if added is not None:
            q, k, v = (a + more for a, more in zip((q, k, v), added, strict=True))
        k = k if self.config.key_multiplier == 1 else k * self.config.key_multiplier
        q = sharding.constrain(q, "batch", "tokens", "heads", None)
        k, v = (sharding.constrain(a, "batch", "tokens", "kv_heads", None) for a in (k, v))
        q = self._placed(q, self.q_norm, positions_BT, "q", learns)
        kept = checkpoint_name(gate[0], "attention_gate") if gate else None
        if learns and added is None and self._are_one_product and qk_norm.serves_beside(k):
            return q, *self._beside(k, v, positions_BT), kept
        k = self._placed(k, self.k_norm, positions_BT, "k")
        return q, k, checkpoint_name(v, "attention_v"), kept

    @property
    def _are_one_product(self) -> bool:
        """Whether keys and values lie side by side in memory."""
        plain = self.b_k is None and self.b_v is None and self.config.key_multiplier == 1
        return plain and isinstance(self.w_k[...], Joined)

    def _beside(self, k, v, positions_BT: jax.Array) -> tuple:
        """Keys, and values with what `ops.attention` reads them of: the array that both were cut out of is used as a
        whole, so that compilers cut nothing."""
        rows, norm, K = k.shape[:2], self.k_norm, k.shape[2]
        assert norm is not None
        kv = jax.lax.concatenate([a.reshape(*rows, -1) for a in (k, v)], 2).reshape(*rows, 2 * K, -1)
        kv = checkpoint_name(checkpoint_name(kv, "attention_k"), "attention_v")
        weight = norm.offset + norm.weight[...]
        k, kv = qk_norm.keys_beside_values(kv, weight, positions_BT, self.config.rope, norm.eps)
        return k, (kv[:, :, K:], kv)

    def _placed(
        self, heads, norm: RMSNorm | None, positions_BT: jax.Array, side: Literal["q", "k"], learns=False
    ) -> Any:
        """Queries or keys, normed and rotated; what a backward pass starts from has a name."""
        c, name = self.config, f"attention_{side}"
        if norm is None:
            return checkpoint_name(heads if c.rope is None else rotate(heads, positions_BT, c.rope), name)
        heads = checkpoint_name(heads, name)  # not what is normed of it, for which the product would be made again
        if self._in_one_pass:
            weight, axis = norm.offset + norm.weight[...], {"q": "heads", "k": "kv_heads"}[side]
            how: dict[str, Any] = {"factor": c.score_scale, "wide": True} if learns else {}
            return qk_norm.normed_and_rotated(heads, weight, positions_BT, c.rope, norm.eps, name, axis, **how)
        heads = heads if c.qk_norm_rotated else norm(heads)
        heads = heads if c.rope is None else rotate(heads, positions_BT, c.rope)
        return checkpoint_name(norm(heads) if c.qk_norm_rotated else heads, qk_norm.ROTATED)

    @jax.named_scope("attend")
    def _attend(self, q, k, v, gate, **places) -> jax.Array:
        """The attention op; places: where queries and keys stand, as `ops.attention` takes it, and other options."""
        sinks = None if self.sinks is None else self.sinks[...]
        return checkpoint_name(ops.attention(q, k, v, gate, sinks, **{**self._options, **places}), "attention_out")

    @jax.named_scope("output")
    def _output(self, y_BTHP: jax.Array) -> jax.Array:
        y_BTHP = sharding.constrain(y_BTHP, "batch", "tokens", "heads", None)
        return params.leave(y_BTHP, self.w_o, self.b_o)


def _qk_norm(config: Attention, n_heads: int, axes: tuple[str, str]) -> RMSNorm:
    """Of queries or keys [B, T, n_heads, P]."""
    width, axis = (config.d_head, axes[1]) if config.qk_norm_over == "head" else ((n_heads, config.d_head), axes)
    return RMSNorm(width, config.qk_norm_eps, axis=axis, offset=config.qk_norm_offset)


def cache_grows(config: Attention) -> bool:
    """Whether the cache grows with the number of tokens."""
    return config.window is None


def init_cache(config: Attention, batch: int, max_len: int, dtype, layout: caches.Layout) -> dict[str, Any]:
    """Keys and values [B, S, K, P]: S is max_len, or the window where that is smaller (a ring)."""
    slots = max_len if config.window is None else min(max_len, config.window)
    shape = (batch, slots, config.kv_heads, config.d_head)
    return {name: layout.keys(shape, dtype) for name in ("k", "v")}
