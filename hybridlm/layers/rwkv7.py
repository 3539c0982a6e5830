# SPDX-License-Identifier: Apache-2.0
"""RWKV-7's time mix (Peng et al. 2025, arXiv:2503.14456, section 4; BlinkDL/RWKV-LM, RWKV_Tmix_x070).

Axis letters: B batch, T tokens, D model, H heads, N width of a head's keys and of its values, R low ranks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, ops, params, recurrent, token_shift
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, on_arrays
from hybridlm.layers.norm import head_layer_norm
from hybridlm.layers.quantized import dot

LARGEST_RATE = math.exp(-0.5)
"""Log decays are between minus this and 0."""


@dataclass(frozen=True)
class Rwkv7:
    """Generalised delta rule, S_t = (diag(w_t) - (a_t o u_t) u_t^T) S_(t-1) + k_t v_t^T per head; norm, bonus, gate."""

    d_head: int = 64
    """Head width N, of keys and of values; there are d_model / N heads."""
    decay_rank: int | None = None
    """Rank of the decay w; None: 2.5 sqrt(d_model), rounded to 32."""
    rate_rank: int | None = None
    """Rank of the in-context learning rate a; None: as decay_rank."""
    gate_rank: int | None = None
    """Rank of the output gate; None: 5 sqrt(d_model), rounded to 32."""
    values: Literal["own", "first", "mixed"] = "own"
    """What the state is written with: own, nothing else; first, the same, and they are handed on to later depths;
    mixed, own ones mixed with those of the first, by shares that depend on the data (the value residual)."""
    value_rank: int | None = None
    """Rank of these shares; None: 1.7 sqrt(d_model), rounded to 32."""
    norm_eps: float = 64e-5
    """Added to the variance in the layer norm of each head's output."""
    chunk: int | None = None
    """Tokens a chunk of the op; None: as it chooses."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        **{
            f"rwkv_{name}": Kept(f"RWKV: {what}", kernels=True)
            for name, what in {
                "r": "receptances", "k": "keys", "v": "values", "decay": "what the decay is made of",
                "share": "what the share of first values is made of",
                "rate": "what the learning rate is made of", "gate": "output gate, RWKV-6 before its silu",
                "read": "what is read from the state",
            }.items()
        },
        "rwkv_out": Kept("RWKV: normed and gated input of the output projection"),
    }  # fmt: skip
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("d_head", "decay_rank", "rate_rank", "gate_rank", "value_rank", "chunk"))

    def heads(self, d_model: int) -> int:
        """Heads H for a model width; ConfigError where the widths do not divide."""
        require(d_model % self.d_head == 0, f"d_model ({d_model}) not divisible by d_head ({self.d_head})")
        return d_model // self.d_head

    def ranks(self, d_model: int) -> dict[str, int]:
        """The low ranks for a model width, by field."""
        default = {"decay_rank": 2.5, "rate_rank": 2.5, "gate_rank": 5.0, "value_rank": 1.7}
        rounded = lambda factor: max(32, round(factor * d_model**0.5 / 32) * 32)
        return {name: getattr(self, name) or rounded(factor) for name, factor in default.items()}

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this mixer cannot be built at the model width."""
        self.heads(d_model)

    def build(self, d_model: int, make: Make) -> "Rwkv7Mixer":
        """The mixer of one sublayer."""
        return make.mixer(Rwkv7Mixer, self, d_model, layer=make.layer)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads."""
        return [("heads", self.heads(d_model), "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections and scan."""
        ranks = self.ranks(d_model)
        ranks["value_rank"] *= self.values == "mixed"
        projections = 4 * d_model**2 + 2 * d_model * sum(ranks.values())
        return 2.0 * projections + scan_flops(self.heads(d_model), self.d_head, seq_len)

    def passes(self, d_model: int) -> int:
        """Width of the first values; 0 without a value residual."""
        return 0 if self.values == "own" else d_model

    def resolved(self, d_model: int) -> "Rwkv7":
        """With the ranks; value_rank is 1 where it is not used."""
        ranks: dict[str, Any] = self.ranks(d_model)
        return replace(self, **ranks | ({} if self.values == "mixed" else {"value_rank": 1}))


SCAN_CHUNK = 128
"""Chunk length Q at which the scan's FLOPs are counted, whatever chunk and implementation run."""


def scan_flops(n_heads: int, d_head: int, seq_len: int) -> float:
    """Forward FLOPs per token of the chunked scan, per head: pairs a b, a k, r b and r k within the chunk, their causal
    half, 4 N (Q + 1); what they weigh, the triangular system among it, as many; two keys that write to the state and
    two queries that read from it, 8 N^2."""
    return n_heads * (8.0 * (min(SCAN_CHUNK, seq_len) + 1) * d_head + 8.0 * d_head**2)


class Rwkv7Mixer(nnx.Module):
    """The token before mixed in; projections; the scan; layer norm of each head, bonus, gate, output projection."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: Rwkv7,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        layer: tuple = (0, 1),
    ):
        """init_std, out_std: standard deviations of the input projections and of the output one (None: init_std).
        layer: as of `Make`. Everything else starts as published."""
        self.config, self.dtype, self.d_model = config, dtype, d_model
        D, H, N, ranks = d_model, config.heads(d_model), config.d_head, config.ranks(d_model)
        heads, powers = ("heads", "d_head"), np.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None]
        shares = params.by_layer(layer, lambda index, count: token_shift.ramp(D, powers * (1 - index / count)))
        self.shares = params.make(shares, (None, "d_model"), "recurrence")  # of r, w, k, v, a, g
        self.w_r = params.matrix(rngs, (D, H, N), ("d_model", *heads), init_std)
        self.w_k = params.matrix(rngs, (D, H, N), ("d_model", *heads), 0.1 * init_std)
        self.w_v = params.matrix(rngs, (D, H, N), ("d_model", *heads), init_std)

        def pair(rank: int) -> tuple[nnx.Param, nnx.Param]:
            down = params.make(jnp.zeros((D, rank)), ("d_model", None), "matrix", n_in=1)
            return down, params.matrix(rngs, (rank, H, N), (None, *heads), 0.1 / math.sqrt(D))

        self.decay_down, self.decay_up = pair(ranks["decay_rank"])
        self.rate_down, self.rate_up = pair(ranks["rate_rank"])
        self.gate_down, self.gate_up = pair(ranks["gate_rank"])
        mixed = config.values == "mixed"
        self.value_down: Any
        self.value_up: Any
        self.value_down, self.value_up = pair(ranks["value_rank"]) if mixed else (None, None)
        line, zigzag = np.linspace(-0.5, 0.5, D), np.tile(np.linspace(-1, 1, N), H)
        zigzag *= np.abs(zigzag)

        def decay(index: int, count: int) -> np.ndarray:
            rise = (line + 0.5) ** (1 + (index / max(count - 1, 1)) ** 0.3)
            return (-5.5 + 6 * rise + 2.5 * zigzag).reshape(H, N)

        self.decay_bias = params.make(params.by_layer(layer, decay), heads, "recurrence")
        rate = (-0.19 + 0.3 * zigzag + 0.4 * line).reshape(H, N)
        self.rate_bias = params.make(jnp.asarray(rate), heads, "recurrence")
        share = (0.73 - 0.4 * line).reshape(H, N)
        self.value_bias: Any = params.make(jnp.asarray(share), heads, "recurrence") if mixed else None
        self.k_k = params.make(jnp.asarray((0.71 - 0.1 * line).reshape(H, N)), heads, "recurrence")
        self.k_a = params.make(jnp.full((H, N), 1.02), heads, "recurrence")
        self.r_k = params.make(jnp.full((H, N), -0.04), heads, "recurrence")
        weight = params.by_layer(layer, lambda index, count: np.full((H, N), ((1 + index) / count) ** 0.7))
        self.norm_weight = params.make(weight, heads, "norm")
        self.norm_bias = params.zeros((H, N), heads, "bias")
        self.w_o = params.matrix(rngs, (H, N, D), (*heads, "d_model"), init_std if out_std is None else out_std, n_in=2)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """`inspect_on` as of a first depth."""
        return self.inspect_on(x_BTD, jnp.zeros(x_BTD.shape, jnp.float32), tokens)

    def inspect_on(self, x_BTD: jax.Array, passed_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Decays of the state a token, and the norm of a row's last state. passed_BTD: as of `pass_on`."""
        pair_BTcD, _ = token_shift.with_previous(x_BTD.astype(self.dtype), tokens, None)
        _, _, new = self._through(x_BTD, passed_BTD, tokens, self.init_cache(x_BTD.shape[0], 0))
        numbers = inspection.decays(self._log_decay(self._project(pair_BTcD)[3]), tokens)
        return numbers | inspection.state_norms(new["state"])

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero state (float32), and the last token."""
        state = (batch, self.config.heads(self.d_model), self.config.d_head, self.config.d_head)
        window = token_shift.init_window(batch, self.d_model, self.dtype, layout)
        return {"state": layout.state(state, ("batch", "heads")), "shift": window}

    def pass_on(self, x_BTD: jax.Array, passed_BTD: jax.Array, tokens: Tokens) -> tuple[Output, jax.Array]:
        """`mix`, with the values of the first depth, and those for the next."""
        y_BTD, passed_BTD, _ = self._through(x_BTD, passed_BTD, tokens, None)
        return Output(y_BTD), passed_BTD

    def extend_on(
        self, x_BTD: jax.Array, passed_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *,
        gaps: bool = True,
    ) -> tuple[jax.Array, jax.Array, dict]:  # fmt: skip
        """`extend`, with the values of the first depth, and those for the next."""
        tokens = recurrent.tokens_behind(x_BTD, length_B, real_BT, gaps)
        y_BTD, passed_BTD, new = self._through(x_BTD, passed_BTD, tokens, caches.read_all(cache, layer))
        return y_BTD, passed_BTD, caches.write_all(cache, layer, new)

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens from the cache `old` (None: from nothing, and no new one is made), as of a first depth."""
        y_BTD, _, new = self._through(x_BTD, jnp.zeros(x_BTD.shape, jnp.float32), tokens, old)
        return y_BTD, new

    def _through(self, x_BTD, passed_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, jax.Array, dict]:
        """(output, the first depth's values, the new cache)."""
        before = old or {}
        with jax.named_scope("shift"):
            pair_BTcD, window = token_shift.with_previous(x_BTD.astype(self.dtype), tokens, before.get("shift"))
        r, k, v, raw_decay, raw_rate, gate, *share = self._project(pair_BTcD)
        v, passed_BTD = self._values(v, share, passed_BTD)
        with jax.named_scope("select"):
            weigh = lambda param: params.use(param, jnp.float32)[None, None]
            g = self._log_decay(raw_decay)
            rate = jax.nn.sigmoid(raw_rate.astype(jnp.float32) + weigh(self.rate_bias))
            k_f32 = k.astype(jnp.float32)
            unit = normalised(k_f32 * weigh(self.k_k))
            k = (k_f32 * (1 + (rate - 1) * weigh(self.k_a))).astype(self.dtype)
            removed, written = (-unit).astype(self.dtype), (unit * rate).astype(self.dtype)
        with jax.named_scope("scan"):
            y, state = ops.rwkv7(
                r, g, k, v, removed, written, segment_ids=tokens.segment_ids, initial_state=before.get("state"),
                chunk=self.config.chunk,
            )  # fmt: skip
            y = checkpoint_name(y, "rwkv_read")
        return self._output(y, r, k, v, gate), passed_BTD, {} if old is None else {"state": state, "shift": window}

    def _values(self, v_BTHN, share: list, passed_BTD) -> tuple[jax.Array, jax.Array]:
        """What the state is written with, and what is handed on. share: what the first values' share is made of."""
        if self.config.values == "first":
            return v_BTHN, sharding.constrain(v_BTHN.reshape(passed_BTD.shape).astype(jnp.float32), *sharding.STREAM)
        if self.config.values == "own":
            return v_BTHN, passed_BTD
        first_BTHN = sharding.constrain(passed_BTD.reshape(v_BTHN.shape), "batch", "tokens", "heads", None)
        share_BTHN = jax.nn.sigmoid(share[0].astype(jnp.float32) + params.use(self.value_bias, jnp.float32)[None, None])
        v = v_BTHN.astype(jnp.float32)
        return (v + (first_BTHN - v) * share_BTHN).astype(v_BTHN.dtype), passed_BTD

    def _log_decay(self, raw_decay: jax.Array) -> jax.Array:
        bias = params.use(self.decay_bias, jnp.float32)[None, None]
        return -LARGEST_RATE * jax.nn.sigmoid(raw_decay.astype(jnp.float32) + bias)

    @jax.named_scope("project")
    def _project(self, pair_BTcD) -> list[jax.Array]:
        """Receptances, keys and values, what decay and learning rate are made of, the gate, and what the share of first
        values is made of, where there is one; all [B, T, H, N]."""

        def products(pair, shares, w_r, w_k, w_v, *low):
            r, w, k, v, a, g = (token_shift.mixed(pair, share) for share in shares)
            decay_down, decay_up, rate_down, rate_up, gate_down, gate_up, *of_values = low
            return [
                dot(r, w_r), dot(k, w_k), dot(v, w_v), dot(jnp.tanh(dot(w, decay_down)), decay_up),
                dot(dot(a, rate_down), rate_up), dot(jax.nn.sigmoid(dot(g, gate_down)), gate_up),
                *([dot(dot(v, of_values[0]), of_values[1])] if of_values else []),
            ]  # fmt: skip

        weights = [self.shares, self.w_r, self.w_k, self.w_v, self.decay_down, self.decay_up]
        weights += [self.rate_down, self.rate_up, self.gate_down, self.gate_up]
        weights += [] if self.value_down is None else [self.value_down, self.value_up]
        names = ("r", "k", "v", "decay", "rate", "gate", "share")[: 6 if self.value_down is None else 7]
        heads = ("batch", "tokens", "heads", None)
        found = params.enter(products, pair_BTcD, weights, [heads] * len(names), x_axes=token_shift.PAIR)
        return [checkpoint_name(a, f"rwkv_{name}") for name, a in zip(names, found, strict=True)]

    def _output(self, y_BTHN, r_BTHN, k_BTHN, v_BTHN, gate_BTHN) -> jax.Array:
        """Layer norm of each head, the bonus of a token's own value, gate; output projection."""
        with jax.named_scope("gate_norm"):
            y = head_layer_norm(y_BTHN, self.norm_weight[...], self.norm_bias[...], self.config.norm_eps)
            r, k, v, gate = (a.astype(jnp.float32) for a in (r_BTHN, k_BTHN, v_BTHN, gate_BTHN))
            y += jnp.sum(r * k * self.r_k[...][None, None], axis=-1, keepdims=True) * v
            y = sharding.constrain((y * gate).astype(self.dtype), "batch", "tokens", "heads", None)
        with jax.named_scope("output"):
            return params.leave(y, self.w_o, kept="rwkv_out")


def normalised(x: jax.Array) -> jax.Array:
    """x of unit length along the last axis; of length below 1e-12, over that."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
