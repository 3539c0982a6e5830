# SPDX-License-Identifier: Apache-2.0
"""The neural memory of Titans as a mixer (Behrouz, Zhong and Mirrokni 2024, arXiv:2501.00663, section 3).

Axis letters: B batch, T tokens, D model, H heads, P head width, F hidden width of a memory, W convolution window.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, ops, params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays

RATE, MOMENTUM, FORGET = range(3)


@dataclass(frozen=True)
class Titans:
    """Neural memory: of each head the weights of a small network, which learn to give values for keys while they read.

    How fast it learns, how long surprise lasts and how much it forgets follow from the token; see
    `pallas_kernels.titans` for the update. Rows of several documents are read token by token.
    """

    n_heads: int = 4
    """Memories H, each of its own head."""
    d_head: int | None = None
    """Head width P; None: d_model / n_heads."""
    d_memory: int | None = None
    """Hidden width F of a memory; None: 2 P."""
    d_conv: int = 4
    """Window W of the convolution over queries, keys and values."""
    max_rate: float = 0.1
    """Largest learning rate of the memory."""
    momentum: bool = True
    """What surprised before goes on to count."""
    store_every: int = 1
    """Tokens of a document after which the memory takes in what they bring. Changes results."""
    refresh_every: int | None = 1
    """Tokens after which gradients are taken at the memory as it is then, a multiple of store_every; None: always at
    the weights that a document starts with. 1 and 1 is the paper's rule. Changes results."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "titans_in": Kept("Titans: queries, keys and values, before the convolution", kernels=True),
        "titans_memory": Kept("Titans: what the memory answers", kernels=True),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_heads", "d_head", "d_memory", "d_conv", "max_rate", "store_every", "refresh_every"))
        require(
            self.refresh_every is None or self.refresh_every % self.store_every == 0,
            f"refresh_every ({self.refresh_every}) not a multiple of store_every ({self.store_every})",
        )

    def sizes(self, d_model: int) -> tuple[int, int]:
        """Head width P and hidden width F at a model width; ConfigError where the heads do not divide it."""
        require(
            self.d_head is not None or d_model % self.n_heads == 0,
            f"d_model ({d_model}) not divisible by n_heads ({self.n_heads}): give d_head",
        )
        d_head = self.d_head or d_model // self.n_heads
        return d_head, self.d_memory or 2 * d_head

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this mixer cannot be built at the model width."""
        self.sizes(d_model)

    def build(self, d_model: int, make: Make) -> "TitansMixer":
        """The mixer of one sublayer."""
        return make.mixer(TitansMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, convolution, and what a token costs its memories."""
        (d_head, hidden), H = self.sizes(d_model), self.n_heads
        inner = H * d_head
        projections = 2.0 * d_model * (5 * inner + 3 * H)
        return projections + 2.0 * 3 * inner * self.d_conv + H * memory_flops(d_head, hidden)

    def resolved(self, d_model: int) -> "Titans":
        """With the widths."""
        d_head, hidden = self.sizes(d_model)
        return replace(self, d_head=d_head, d_memory=hidden)


def memory_flops(d_head: int, hidden: int) -> float:
    """FLOPs per token of one memory: an answer (two products), and a gradient (two forward, three backward)."""
    return 14.0 * d_head * hidden


class TitansMixer(nnx.Module):
    """q, k, v = projections, convolution, SiLU; q and k of length 1; the memory; a sigmoid gate; output projection."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: Titans,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, W = d_model, config.n_heads, config.d_conv
        P, F = config.sizes(d_model)
        channels = (None, "heads", "d_head")
        self.w_qkv = params.matrix(rngs, (D, 3, H, P), ("d_model", *channels), init_std, fused_axes=(1,))
        self.w_gate = params.matrix(rngs, (D, H, P), ("d_model", "heads", "d_head"), init_std)
        self.w_rates = params.matrix(rngs, (D, 3, H), ("d_model", None, "heads"), init_std, fused_axes=(1,))
        start = jnp.array([0.0, 2.0, -4.0])  # half of max_rate, momentum 0.88, 2% forgotten
        self.rates = params.make(jnp.broadcast_to(start[:, None], (3, H)), (None, "heads"), "recurrence")
        (draw,) = params.uniforms(rngs, (3, H, P, W + 1))
        self.conv, _ = short_conv.make(draw, channels, bias=False)
        memory = lambda *shape: jax.random.normal(rngs.params(), shape) / math.sqrt(shape[1])
        self.memory_norm = params.zeros((H, P), ("heads", None), "recurrence")
        self.memory_in = params.make(memory(H, P, F), ("heads", None, None), "recurrence")
        self.memory_out = params.make(memory(H, F, P), ("heads", None, None), "recurrence")
        out_std = init_std if out_std is None else out_std
        self.out = params.matrix(rngs, (H, P, D), ("heads", "d_head", "d_model"), out_std, n_in=2)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What a token's forget gate leaves of the memory, and how far a row's last memory is from the learned one."""
        forget_BTH = self._project(x_BTD)[2][:, :, FORGET]
        state_BHS = recurrent.last(self, x_BTD, tokens)["state"]
        changed_BHM = state_BHS[..., : (state_BHS.shape[-1] - 3) // 4]
        return inspection.decays(jax.nn.log_sigmoid(-forget_BTH), tokens) | inspection.state_norms(changed_BHM)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """A memory as a document starts with it (float32), and the window of the convolution."""
        n_heads, width, hidden = self.memory_in.shape[-3:]
        n_memory = width + 2 * width * hidden
        state = layout.zeros((batch, n_heads, 4 * n_memory + 3), jnp.float32, ("batch", "heads"))
        return {"state": state, "conv": short_conv.init_window(self.conv, batch, self.dtype, layout)}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens from the cache `old` (None: from nothing, and no new one is made)."""
        c, ids, before = self.config, tokens.segment_ids, old or {}
        qkv_BTcHP, gate_BTHP, rates_BTcH = self._project(x_BTD)
        with jax.named_scope("convolve"):
            qkv_BTcHP, window = short_conv.convolve(
                qkv_BTcHP, self.conv, None, "silu", segment_ids=ids, gaps=tokens.gaps, window=before.get("conv")
            )
        with jax.named_scope("memory"):
            q_BTHP, k_BTHP, v_BTHP = (qkv_BTcHP[:, :, i] for i in range(3))
            y_BTHP, state = ops.titans(
                _unit(q_BTHP), _unit(k_BTHP), v_BTHP, c.max_rate * jax.nn.sigmoid(rates_BTcH[:, :, RATE]),
                rates_BTcH[:, :, MOMENTUM] if c.momentum else None, rates_BTcH[:, :, FORGET],
                (self.memory_norm[...], self.memory_in[...], self.memory_out[...]), segment_ids=ids,
                initial_state=before.get("state"), store_every=c.store_every, refresh_every=c.refresh_every,
            )  # fmt: skip
            y_BTHP = checkpoint_name(y_BTHP, "titans_memory")
        return self._output(y_BTHP, gate_BTHP), {} if old is None else {"state": state, "conv": window}

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, 3, H, P], the gate before its sigmoid [B, T, H, P], and what says how fast
        the memory learns, how long surprise lasts and how much is forgotten, float32 [B, T, 3, H]."""
        pairs = [(self.w_qkv, None), (self.w_gate, None), (self.w_rates, None)]
        qkv, gate, rates = params.projections(x_BTD.astype(self.dtype), *pairs)
        qkv = checkpoint_name(sharding.constrain(qkv, "batch", "tokens", None, "heads", "d_head"), "titans_in")
        rates = rates.astype(jnp.float32) + self.rates[...][None, None]
        return qkv, gate, sharding.constrain(rates, "batch", "tokens", None, "heads")

    @jax.named_scope("output")
    def _output(self, y_BTHP, gate_BTHP) -> jax.Array:
        y_BTHP = y_BTHP.astype(jnp.float32) * jax.nn.sigmoid(gate_BTHP.astype(jnp.float32))
        y_BTHP = sharding.constrain(y_BTHP.astype(self.dtype), "batch", "tokens", "heads", "d_head")
        return params.leave(y_BTHP, self.out)


def _unit(x_BTHP: jax.Array) -> jax.Array:
    """Vectors of length 1; those near zero stay."""
    x = x_BTHP.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)).astype(x_BTHP.dtype)
