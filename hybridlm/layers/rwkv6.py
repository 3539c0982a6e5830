# SPDX-License-Identifier: Apache-2.0
"""RWKV-6's time mix (Peng et al. 2024, "Eagle and Finch", arXiv:2404.05892; BlinkDL/RWKV-LM, RWKV_Tmix_x060).

Axis letters: B batch, T tokens, D model, H heads, N width of a head's keys and of its values, R low ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

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
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.linear_attention import scan_flops
from hybridlm.layers.norm import head_layer_norm
from hybridlm.layers.quantized import dot, einsum
from hybridlm.layers.rwkv7 import Rwkv7


@dataclass(frozen=True)
class Rwkv6:
    """Linear attention with a decay by channel and a bonus for a token's own value; its input is mixed with the token
    before it by shares that depend on the data."""

    d_head: int = 64
    """Head width N, of keys and of values; there are d_model / N heads."""
    mix_rank: int = 32
    """Rank of the shares, for each of the five inputs."""
    decay_rank: int = 64
    """Rank of the decay."""
    norm_eps: float = 64e-5
    """Added to the variance in the layer norm of each head's output."""
    chunk: int | None = None
    """Tokens a chunk of the op; None: as it chooses."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        name: what for name, what in Rwkv7.KEPT.items() if name not in ("rwkv_rate", "rwkv_share")
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("d_head", "mix_rank", "decay_rank", "chunk"))

    def heads(self, d_model: int) -> int:
        """Heads H for a model width; ConfigError where the widths do not divide."""
        require(d_model % self.d_head == 0, f"d_model ({d_model}) not divisible by d_head ({self.d_head})")
        return d_model // self.d_head

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this mixer cannot be built at the model width."""
        self.heads(d_model)

    def build(self, d_model: int, make: Make) -> "Rwkv6Mixer":
        """The mixer of one sublayer."""
        return make.mixer(Rwkv6Mixer, self, d_model, layer=make.layer)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads."""
        return [("heads", self.heads(d_model), "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections and scan."""
        projections = 5 * d_model**2 + 2 * d_model * (5 * self.mix_rank + self.decay_rank)
        return 2.0 * projections + scan_flops(self.heads(d_model), self.d_head, self.d_head, seq_len)

    def resolved(self, d_model: int) -> "Rwkv6":
        """Nothing is derived."""
        return self


class Rwkv6Mixer(nnx.Module):
    """The token before mixed in; projections; the scan; layer norm of each head, gate silu, output projection."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: Rwkv6,
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
        D, H, N, R = d_model, config.heads(d_model), config.d_head, config.mix_rank
        heads, start = ("heads", "d_head"), {name: params.by_layer(layer, of) for name, of in starts(D).items()}
        self.share = params.make(start["share"], ("d_model",), "recurrence")
        self.shares = params.make(start["shares"], (None, "d_model"), "recurrence")  # of r, w, k, v, g
        self.share_down = params.make(jnp.zeros((D, 5, R)), ("d_model", None, None), "matrix", n_in=1, fused_axes=(1,))
        draw_share, draw_decay = params.uniforms(rngs, (5, R, D), (config.decay_rank, H, N))
        ups: dict[str, Any] = {"n_in": 1, "fused_axes": (0,)}
        self.share_up = params.make(0.02 * draw_share - 0.01, (None, None, "d_model"), "matrix", **ups)
        in_shape, in_axes = (D, H, N), ("d_model", *heads)
        self.w_r, self.w_k, self.w_v, self.w_gate = (params.matrix(rngs, in_shape, in_axes, init_std) for _ in range(4))
        decay_down = jnp.zeros((D, config.decay_rank))
        self.decay_down = params.make(decay_down, ("d_model", None), "matrix", n_in=1)
        self.decay_up = params.make(0.02 * draw_decay - 0.01, (None, *heads), "matrix", n_in=1)
        self.decay_bias = params.make(start["decay"].reshape(H, N), heads, "recurrence")
        self.bonus = params.make(start["bonus"].reshape(H, N), heads, "recurrence")
        self.norm_weight, self.norm_bias = params.ones((H, N), heads, "norm"), params.zeros((H, N), heads, "bias")
        self.w_o = params.matrix(rngs, (H, N, D), (*heads, "d_model"), init_std if out_std is None else out_std, n_in=2)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Decays of the state a token, and the norm of a row's last state."""
        pair_BTcD, _ = token_shift.with_previous(x_BTD.astype(self.dtype), tokens, None)
        raw_decay = self._project(pair_BTcD)[4]
        return inspection.decays(self._log_decay(raw_decay), tokens) | recurrent.state_norm(self, x_BTD, tokens)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero state (float32), and the last token."""
        state = (batch, self.config.heads(self.d_model), self.config.d_head, self.config.d_head)
        window = token_shift.init_window(batch, self.d_model, self.dtype, layout)
        return {"state": layout.state(state, ("batch", "heads")), "shift": window}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens from the cache `old` (None: from nothing, and no new one is made)."""
        before = old or {}
        with jax.named_scope("shift"):
            pair_BTcD, window = token_shift.with_previous(x_BTD.astype(self.dtype), tokens, before.get("shift"))
        r, k, v, gate, raw_decay = self._project(pair_BTcD)
        with jax.named_scope("scan"):
            g = self._log_decay(raw_decay)
            y, state = ops.linear_attention(
                r, k, v, g, params.use(self.bonus, jnp.float32), segment_ids=tokens.segment_ids,
                initial_state=before.get("state"), scale=1.0, chunk=self.config.chunk,
            )  # fmt: skip
            y = checkpoint_name(y, "rwkv_read")
        with jax.named_scope("gate_norm"):
            y = head_layer_norm(y, self.norm_weight[...], self.norm_bias[...], self.config.norm_eps)
            y = (y * jax.nn.silu(gate.astype(jnp.float32))).astype(self.dtype)
            y = sharding.constrain(y, "batch", "tokens", "heads", None)
        with jax.named_scope("output"):
            y_BTD = params.leave(y, self.w_o, kept="rwkv_out")
            return y_BTD, {} if old is None else {"state": state, "shift": window}

    def _log_decay(self, raw_decay: jax.Array) -> jax.Array:
        return -jnp.exp(raw_decay.astype(jnp.float32) + params.use(self.decay_bias, jnp.float32)[None, None])

    @jax.named_scope("project")
    def _project(self, pair_BTcD) -> list[jax.Array]:
        """Receptances, keys, values, the gate's pre-activation, what the decay is made of, all [B, T, H, N]."""

        def products(pair, share, shares, down, up, w_r, w_k, w_v, w_gate, decay_down, decay_up):
            low_BTcR = jnp.tanh(dot(token_shift.mixed(pair, share), down))
            more_BTcD = einsum("BTcR,cRD->BTcD", low_BTcR, up)
            r, w, k, v, g = (token_shift.mixed(pair, shares[None, None, i] + more_BTcD[:, :, i]) for i in range(5))
            decay = dot(jnp.tanh(dot(w, decay_down)), decay_up)
            return [dot(r, w_r), dot(k, w_k), dot(v, w_v), dot(g, w_gate), decay]

        weights = [self.share, self.shares, self.share_down, self.share_up]
        weights += [self.w_r, self.w_k, self.w_v, self.w_gate, self.decay_down, self.decay_up]
        heads = ("batch", "tokens", "heads", None)
        found = params.enter(products, pair_BTcD, weights, [heads] * 5, x_axes=token_shift.PAIR)
        return [checkpoint_name(a, f"rwkv_{n}") for n, a in zip(("r", "k", "v", "gate", "decay"), found, strict=True)]


def starts(d_model: int) -> dict[str, Callable[[int, int], np.ndarray]]:
    """What parameters start as, as published, from the index and the number of layers."""
    line, zigzag = np.linspace(0, 1, d_model), 0.1 * ((np.arange(d_model) + 1) % 3 - 1)
    done = lambda index, count: index / max(count - 1, 1)

    def shares(index: int, count: int) -> np.ndarray:
        ramp, slow = (token_shift.ramp(d_model, power * (1 - index / count)) for power in (1.0, 0.5))
        return np.stack([slow, ramp, ramp, ramp - 0.3 * done(index, count), slow])

    return {
        "share": lambda index, count: token_shift.ramp(d_model, 1 - index / count),
        "shares": shares,
        "decay": lambda index, count: -6 + 5 * line ** (0.7 + 1.3 * done(index, count)),
        "bonus": lambda index, count: done(index, count) * (1 - line) + zigzag,
    }
