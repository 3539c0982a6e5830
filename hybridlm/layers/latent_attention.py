# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1): keys and values of one latent a token.

Axis letters: B batch, T tokens, S keys, D model, H heads, N key width without rotation, P rotated key width, V value
width, R latent width.
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
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, ops, params
from hybridlm.layers.attention import mean_visible, stand
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, on_arrays
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.rope import Rope, rotate


@dataclass(frozen=True)
class LatentAttention:
    """Causal attention whose keys and values are projections of one latent vector a token, which the cache holds."""

    n_heads: int = 32
    """Heads H."""
    d_nope: int = 128
    """Width N of a head's queries and keys that is never rotated."""
    d_rope: int = 64
    """Width P of the rest, whose keys all heads share."""
    d_value: int = 128
    """Width V of a head's values."""
    kv_rank: int = 512
    """Width R of the latent of keys and values."""
    q_rank: int | None = None
    """Width of the latent of queries; None: they are projected at once."""
    rope: Rope | None = Rope(interleaved=True)  # noqa: RUF009 (frozen)
    """Rotary embedding of the shared part; None: no positions (Kimi Linear)."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms of the latents."""
    scale: float | None = None
    """Multiplier of the scores; None: (d_nope + d_rope) ** -0.5."""
    head_gate: bool = False
    """Sigmoid output gate for each head from the layer's input (Ling 3)."""
    bias: bool = False
    """Bias of the projections to the latents and of the output projection."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "latent_q": Kept("latent attention: queries, rotated", kernels=True),
        "latent_kv": Kept("latent attention: normed latent and rotated shared keys", kernels=True),
        "attention_gate": Kept("latent attention: pre-activation of the output gate", kernels=True),
        "attention_out": Kept("latent attention: input of the output projection", kernels=True),
        "attention_kept": Kept(
            "latent attention: output before the gate, and log-sum-exp, from which its backward starts", kernels=True
        ),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True
    GROWS: ClassVar[Mapping[str, str]] = {"latent": "latents"}

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_heads", "d_nope", "d_value", "kv_rank", "q_rank", "scale"))
        require(self.d_rope >= 0, f"d_rope ({self.d_rope}) must not be negative")
        if self.rope is not None:
            self.rope.d_rotated(self.d_rope)

    def check(self, d_model: int) -> None:
        """Latent attention fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "LatentAttentionMixer":
        """The mixer of one sublayer."""
        return make.mixer(LatentAttentionMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads, and the latents, which are split as the model's width is."""
        ranks = [("kv_rank", self.kv_rank)] + ([] if self.q_rank is None else [("q_rank", self.q_rank)])
        return [("n_heads", self.n_heads, "heads"), *((name, size, "d_model") for name, size in ranks)]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, and the scores and sums of the visible keys, as in training: nothing is absorbed."""
        H, d_query, d_values = self.n_heads, self.d_nope + self.d_rope, self.n_heads * self.d_value
        queries = d_model * H * d_query if self.q_rank is None else (d_model + H * d_query) * self.q_rank
        latent = d_model * (self.kv_rank + self.d_rope) + self.kv_rank * (H * self.d_nope + d_values)
        products = queries + latent + d_model * (d_values + H * self.head_gate)
        return 2.0 * products + 2.0 * H * (d_query + self.d_value) * mean_visible(seq_len, None)

    def resolved(self, d_model: int) -> "LatentAttention":
        """With the scale."""
        return replace(self, scale=(self.d_nope + self.d_rope) ** -0.5 if self.scale is None else self.scale)


class LatentAttentionMixer(nnx.Module):
    """Queries, a normed latent and shared keys = projections; keys [latent's | shared] and values of the latent; causal
    attention with the output gate; output projection.

    With a cache one token is served in the latent's width ("absorbed"): queries go through the keys' matrix and results
    through the values', so that neither keys nor values of earlier tokens are made again.
    """

    cache_grows = True
    __call__ = on_arrays

    def __init__(
        self,
        config: LatentAttention,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input projections and of the output one (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, N, P, V, R = d_model, config.n_heads, config.d_nope, config.d_rope, config.d_value, config.kv_rank
        heads, low, rank = ("d_model", "heads", "d_head"), ("d_model", None), config.q_rank
        self.w_q = params.matrix(rngs, (D, H, N + P), heads, init_std) if rank is None else None
        self.in_q = None if rank is None else params.matrix(rngs, (D, rank), low, init_std)
        self.in_q_bias = params.zeros((rank,), (None,), "bias") if rank and config.bias else None
        self.q_norm: Any = None if rank is None else RMSNorm(rank, config.norm_eps, axis=None)
        self.up_q = None if rank is None else params.matrix(rngs, (rank, H, N + P), heads, init_std)
        self.in_kv = params.matrix(rngs, (D, R + P), low, init_std)
        self.in_kv_bias = params.zeros((R + P,), (None,), "bias") if config.bias else None
        self.kv_norm = RMSNorm(R, config.norm_eps, axis=None)
        self.up_kv = params.matrix(rngs, (R, H, N + V), heads, init_std)
        self.w_gate = params.matrix(rngs, (D, H), heads[:2], init_std) if config.head_gate else None
        out_std = init_std if out_std is None else out_std
        self.w_o = params.matrix(rngs, (H, V, D), (*heads[1:], "d_model"), out_std, n_in=2)
        self.b_o = params.zeros((D,), ("d_model",), "bias") if config.bias else None

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D] -> [B, T, D] in `dtype`."""
        ids, positions, _ = stand(x_BTD, tokens, None)
        q_BTHX, latent_BTX, gate_BTH = self._project(x_BTD, positions)
        k, v = self._expand(latent_BTX)
        y_BTHV = self._attend(q_BTHX, k, v, gate_BTH, segment_ids=(ids, ids), split_tokens=True)
        return Output(self._output(y_BTHV))

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Entropy of the attention, and its share on the first token; see `inspection.attention`."""
        ids, positions, _ = stand(x_BTD, tokens, None)
        q_BTHX, latent_BTX, _ = self._project(x_BTD, positions)
        options: dict[str, Any] = {"window": None, "scale": self._scale, "softcap": None}
        return inspection.attention(q_BTHX, self._expand(latent_BTX)[0], None, ids, None, **options)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Normed latents and rotated shared keys [B, S, 1, R + P]."""
        width = self.config.kv_rank + self.config.d_rope
        return {"latent": layout.keys((batch, max_len, 1, width), self.dtype)}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the cache after them; see `block.Mixer`."""
        (batch, tokens, _), slots = x_BTD.shape, cache["latent"].shape[-3]
        gaps = gaps and real_BT is not None and tokens > 1
        real_BT = jnp.ones((batch, tokens), bool) if real_BT is None else real_BT
        before_BT = jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - real_BT
        position_BT = length_B[:, None] + (before_BT if gaps else jnp.arange(tokens, dtype=jnp.int32)[None])
        end_B = length_B + real_BT.sum(axis=1, dtype=jnp.int32)
        q_BTHX, latent_BTX, gate_BTH = self._project(x_BTD, position_BT)
        slot_BT = jnp.where(real_BT, position_BT, slots)
        new = {"latent": caches.write_slots(cache["latent"], layer, slot_BT, latent_BTX[:, :, None])}
        slot_BS = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
        places = {"positions": (position_BT, slot_BS)} if gaps else {"q_offset": length_B}
        places["segment_ids"] = (real_BT.astype(jnp.int32), (slot_BS < end_B[:, None]).astype(jnp.int32))
        if tokens == 1:
            y_BTHV = self._absorbed(q_BTHX, new["latent"], gate_BTH, layer=layer, **places)
        else:
            k, v = self._expand(caches.read(new["latent"], layer, self.dtype)[:, :, 0])
            y_BTHV = self._attend(q_BTHX, k, v, gate_BTH, **places)
        return self._output(y_BTHV), new

    @jax.named_scope("project")
    def _project(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Queries [B, T, H, N + P], normed latents and shared keys [B, T, R + P], the gate's pre-activation."""
        c, x_BTD = self.config, x_BTD.astype(self.dtype)
        pairs = [(self.w_q, None) if self.in_q is None else (self.in_q, self.in_q_bias), (self.in_kv, self.in_kv_bias)]
        pairs += [] if self.w_gate is None else [(self.w_gate, None)]
        q, latent_BTX, *gate = params.projections(x_BTD, *pairs)
        if self.in_q is not None:
            q = params.project(self.q_norm(q), self.up_q)
        q_BTHX = sharding.constrain(q, "batch", "tokens", "heads", None)
        latent_BTR, k_BTP = jnp.split(latent_BTX, (c.kv_rank,), axis=-1)
        if c.rope is not None:
            q_nope, q_rope = jnp.split(q_BTHX, (c.d_nope,), axis=-1)
            q_BTHX = jnp.concatenate([q_nope, rotate(q_rope, positions_BT, c.rope)], axis=-1)
            k_BTP = rotate(k_BTP[:, :, None], positions_BT, c.rope)[:, :, 0]
        latent_BTX = jnp.concatenate([self.kv_norm(latent_BTR), k_BTP], axis=-1)
        gate_BTH = checkpoint_name(gate[0], "attention_gate") if gate else None
        return checkpoint_name(q_BTHX, "latent_q"), checkpoint_name(latent_BTX, "latent_kv"), gate_BTH

    @jax.named_scope("expand")
    def _expand(self, latent_BSX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys [B, S, H, N + P] and values [B, S, H, V] of latents and shared keys [B, S, R + P]."""
        latent_BSR, k_BSP = jnp.split(latent_BSX, (self.config.kv_rank,), axis=-1)
        kv_BSHX = params.project(latent_BSR, self.up_kv)
        kv_BSHX = sharding.constrain(kv_BSHX, "batch", "tokens", "heads", None)
        k_BSHN, v_BSHV = jnp.split(kv_BSHX, (self.config.d_nope,), axis=-1)
        k_BSHP = jnp.broadcast_to(k_BSP[:, :, None], (*k_BSHN.shape[:3], k_BSP.shape[-1]))
        return jnp.concatenate([k_BSHN, k_BSHP], axis=-1), v_BSHV

    @jax.named_scope("attend")
    def _attend(self, q, k, v, gate_BTH, **places) -> jax.Array:
        """The attention op; places: where queries and keys stand, as `ops.attention` takes it."""
        y = ops.attention(q, k, v, gate_BTH, None, window=None, scale=self._scale, softcap=None, **places)
        return checkpoint_name(y, "attention_out")

    def _absorbed(self, q_BTHX, latent, gate_BTH, **places) -> jax.Array:
        """The same of keys and values that are the cached latents themselves: one key head, of width R + P."""
        N, R = self.config.d_nope, self.config.kv_rank
        w_RHX = params.use(self.up_kv, self.dtype)
        q_BTHN, q_BTHP = jnp.split(q_BTHX, (N,), axis=-1)
        q_BTHR = jnp.einsum("BTHN,RHN->BTHR", q_BTHN, w_RHX[..., :N])
        y_BTHX = self._attend(jnp.concatenate([q_BTHR, q_BTHP], axis=-1), latent, latent, gate_BTH, **places)
        return jnp.einsum("BTHR,RHV->BTHV", y_BTHX[..., :R], w_RHX[..., N:])

    @property
    def _scale(self) -> float:
        c = self.config
        return (c.d_nope + c.d_rope) ** -0.5 if c.scale is None else c.scale

    @jax.named_scope("output")
    def _output(self, y_BTHV: jax.Array) -> jax.Array:
        y_BTHV = sharding.constrain(y_BTHV, "batch", "tokens", "heads", None)
        return params.leave(y_BTHV, self.w_o, self.b_o)
