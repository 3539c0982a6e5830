# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention with an optional sigmoid output gate (Qiu et al. 2025, "Gated Attention for LLMs").

Axis letters: B batch, T tokens, S keys, D model, H query heads, K key/value heads, P head width.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.layers import cache as caches
from hybridlm.layers import params
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.rope import Rope, rotate
from hybridlm.layers.segments import positions_within
from pallas_kernels import attention


@dataclass(frozen=True)
class Attention:
    """Causal attention: MHA, GQA or MQA; rotary, windowed, capped, with sinks, gated."""

    n_heads: int = 16
    """Query heads H."""
    n_kv_heads: int | None = None
    """Key/value heads K; None: n_heads (MHA); 1 is MQA."""
    d_head: int = 64
    """Head width P."""
    rope: Rope | None = Rope()  # noqa: RUF009 (frozen)
    """Rotary embedding; None: no positions (NoPE)."""
    qk_norm: bool = False
    """RMS norm of each query and key head before the rotation."""
    qk_norm_eps: float = 1e-6
    """Added to the mean square in qk_norm."""
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
    qkv_bias: bool = False
    """Bias of the query, key and value projections."""
    out_bias: bool = False
    """Bias of the output projection."""
    key_multiplier: float = 1.0
    """Multiplies the keys before the rotation."""

    def __post_init__(self):
        for name in ("n_heads", "d_head", "n_kv_heads", "window", "softcap", "scale"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} ({value}) must be positive")
        require(
            self.n_heads % self.kv_heads == 0, f"n_heads ({self.n_heads}) not divisible by n_kv_heads ({self.kv_heads})"
        )
        if self.rope is not None:
            self.rope.d_rotated(self.d_head)

    @property
    def kv_heads(self) -> int:
        """Key/value heads K."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    def check(self, d_model: int) -> None:
        """Attention fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")


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
        dtype: str = "bfloat16",
        d_out: int | None = None,
    ):
        """init_std, out_std: standard deviations of the input projections and of the output one (None: init_std).
        d_out: width of the output (None: d_model)."""
        self.config, self.dtype = config, dtype
        D, H, K, P = d_model, config.n_heads, config.kv_heads, config.d_head
        d_out = d_model if d_out is None else d_out
        query, key = ("heads", "d_head"), ("kv_heads", "d_head")
        self.w_q = params.matrix(rngs, (D, H, P), ("d_model", *query), init_std)
        self.w_k = params.matrix(rngs, (D, K, P), ("d_model", *key), init_std)
        self.w_v = params.matrix(rngs, (D, K, P), ("d_model", *key), init_std)
        self.b_q = params.zeros((H, P), query, "bias") if config.qkv_bias else None
        self.b_k = params.zeros((K, P), key, "bias") if config.qkv_bias else None
        self.b_v = params.zeros((K, P), key, "bias") if config.qkv_bias else None
        gate_shape = {None: None, "elementwise": (H, P), "head": (H,)}[config.gate]
        if gate_shape is None:
            self.w_gate = None
        else:
            self.w_gate = params.matrix(rngs, (D, *gate_shape), ("d_model", *query[: len(gate_shape)]), init_std)
        self.q_norm = RMSNorm(P, config.qk_norm_eps, axis="d_head") if config.qk_norm else None
        self.k_norm = RMSNorm(P, config.qk_norm_eps, axis="d_head") if config.qk_norm else None
        self.sinks = params.zeros((H,), ("heads",), "sink") if config.sinks else None
        out_std = init_std if out_std is None else out_std
        self.w_o = params.matrix(rngs, (H, P, d_out), (*query, "d_model"), out_std, n_in=2)
        self.b_o = params.zeros((d_out,), ("d_model",), "bias") if config.out_bias else None

    @property
    def keeps_all(self) -> bool:
        """The cache grows with the number of tokens."""
        return self.config.window is None

    def __call__(
        self,
        x_BTD: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        added: list[jax.Array] | None = None,
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D] in `dtype`.

        segment_ids: int32 [B, T], 0 is padding, a number of its own for each document of a row. positions: int32
        [B, T], for the rotation; None: the index within the document. added: [B, T, H or K, P] each, added to the
        projections of queries, keys and values. The causal mask and the window go by the tokens'
        order in the row: padding inside a document counts (HybridLM moves such padding away).
        """
        if positions is None:
            positions = positions_within(segment_ids, x_BTD.shape[:2])
        q, k, v, gate = self._project(x_BTD, positions, added)
        ids = (segment_ids, segment_ids)
        return self._output(self._attend(q, k, v, gate, segment_ids=ids, split_tokens=True))

    def init_cache(self, batch: int, max_len: int) -> dict[str, jax.Array]:
        """Keys and values [B, S, K, P]: S is max_len, or the window where that is smaller (a ring)."""
        slots = max_len if self.config.window is None else min(max_len, self.config.window)
        shape = (batch, slots, self.config.kv_heads, self.config.d_head)
        return {"k": jnp.zeros(shape, self.dtype), "v": jnp.zeros(shape, self.dtype)}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, added: list[jax.Array] | None = None
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the cache after them.

        length_B: tokens already in the cache. real_BT: bool, False for padding, on the right, which is not stored;
        None: all real. layer: index of the entries in stacked caches. Position p is stored in slot p mod S. added: as
        in `__call__`.
        """
        batch, tokens, _ = x_BTD.shape
        slots = cache["k"].shape[-3]
        real_BT = jnp.ones((batch, tokens), bool) if real_BT is None else real_BT
        position_BT = length_B[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        end_B = length_B + real_BT.sum(axis=1, dtype=jnp.int32)
        q, k, v, gate = self._project(x_BTD, position_BT, added)
        ring = self.config.window is not None
        stored_BT = real_BT & (position_BT >= end_B[:, None] - slots) if ring else real_BT
        slot_BT = jnp.where(stored_BT, position_BT % slots if ring else position_BT, slots)
        new = {name: caches.write_slots(cache[name], layer, slot_BT, a) for name, a in (("k", k), ("v", v))}
        if not ring:
            real_BS = jnp.arange(slots) < end_B[:, None]
            places = {"q_offset": length_B, "layer": layer}
            k, v = new["k"], new["v"]
        elif tokens == 1:
            position_BS, real_BS = _ring_positions(end_B, slots)
            places = {"positions": (position_BT, position_BS), "layer": layer}
            k, v = new["k"], new["v"]
        else:  # the first queries see keys whose slots the last tokens take: the old ring and the new tokens, apart
            position_BS, real_BS = _ring_positions(length_B, slots)
            places = {"positions": (position_BT, jnp.concatenate([position_BS, position_BT], axis=1))}
            real_BS = jnp.concatenate([real_BS, real_BT], axis=1)
            k, v = (jnp.concatenate([caches.read(cache[n], layer), a], axis=1) for n, a in (("k", k), ("v", v)))
        ids = (real_BT.astype(jnp.int32), real_BS.astype(jnp.int32))
        return self._output(self._attend(q, k, v, gate, segment_ids=ids, **places)), new

    def _project(self, x_BTD: jax.Array, positions_BT: jax.Array, added: list[jax.Array] | None) -> tuple:
        """Queries [B, T, H, P], keys and values [B, T, K, P], gate pre-activation ([B, T, H, P], [B, T, H] or None)."""
        x_BTD = x_BTD.astype(self.dtype)
        pairs = ((self.w_q, self.b_q), (self.w_k, self.b_k), (self.w_v, self.b_v))
        q, k, v = (params.project(x_BTD, weight, bias) for weight, bias in pairs)
        if added is not None:
            q, k, v = (a + more for a, more in zip((q, k, v), added, strict=True))
        k = k if self.config.key_multiplier == 1 else k * self.config.key_multiplier
        q = sharding.constrain(q, "batch", "tokens", "heads", None)
        k, v = (sharding.constrain(a, "batch", "tokens", "kv_heads", None) for a in (k, v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope is not None:
            q, k = rotate(q, positions_BT, self.config.rope), rotate(k, positions_BT, self.config.rope)
        gate = None
        if self.w_gate is not None:
            gate = checkpoint_name(params.project(x_BTD, self.w_gate), "attention_gate")
        q, k, v = (checkpoint_name(a, f"attention_{name}") for name, a in (("q", q), ("k", k), ("v", v)))
        return q, k, v, gate

    def _attend(
        self, q, k, v, gate, *, segment_ids: tuple, positions: tuple = (None, None), q_offset=None, layer=None,
        split_tokens=False,
    ) -> jax.Array:  # fmt: skip
        """The attention op, each device on its rows and heads. segment_ids, positions: of queries and of keys.

        layer: of stacked caches k and v, which the op reads.
        """
        c = self.config
        if layer is not None and c.kv_heads % sharding.axis_size("tensor"):
            k, v, layer = caches.read(k, layer), caches.read(v, layer), None
        if layer is None:
            k, v = (sharding.repeat_for_heads(a, 2, c.n_heads) for a in (k, v))

        def run(q, k, v, gate, sinks, q_ids, k_ids, q_positions, k_positions, q_offset, layer, context_axis=None):
            return attention(
                q, k, v, gate=gate, causal=True, window=c.window, scale=c.scale, softcap=c.softcap, sinks=sinks,
                segment_ids=None if q_ids is None else (q_ids, k_ids),
                positions=None if q_positions is None else (q_positions, k_positions),
                q_offset=0 if q_offset is None else q_offset,
                layer=layer,
                context_axis=context_axis,
            )  # fmt: skip

        rows = ("batch", "tokens")
        heads, kv_heads = (*rows, "heads", None), (*rows, "kv_heads", None)
        sinks = None if self.sinks is None else self.sinks[...]
        kv_heads = kv_heads if layer is None else (None, *kv_heads)
        arrays = (q, k, v, gate, sinks, *segment_ids, *positions, q_offset, layer)
        names = (heads, kv_heads, kv_heads, heads, ("heads",), rows, rows, rows, rows, ("batch",), ())
        out_BTHP = sharding.per_device(run, arrays, names, heads, split_tokens=split_tokens)
        return checkpoint_name(out_BTHP, "attention_out")

    def _output(self, y_BTHP: jax.Array) -> jax.Array:
        y_BTHP = sharding.constrain(y_BTHP, "batch", "tokens", "heads", None)
        out_BTD = jnp.tensordot(y_BTHP, params.use(self.w_o, y_BTHP.dtype), 2)
        return out_BTD if self.b_o is None else out_BTD + params.use(self.b_o, out_BTD.dtype)


def _ring_positions(length_B: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
    """Position [B, S] that each slot of a ring holds after `length_B` tokens, and whether it holds one."""
    slot_S = jnp.arange(slots, dtype=jnp.int32)
    last_B1 = length_B[:, None] - 1
    position_BS = last_B1 - (last_B1 - slot_S) % slots
    return position_BS, position_BS >= 0
