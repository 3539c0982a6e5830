# SPDX-License-Identifier: Apache-2.0
"""Kimi Delta Attention mixer (Kimi Team 2025, arXiv:2510.26692): a gated delta rule with a decay for each key channel.

Axis letters: B batch, T tokens, D model, H heads, P head width, N key width, W convolution window, R low rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.gated_delta_net import (
    check_sizes,
    delta_flops,
    gated_head_norm,
    init_cache,
    run_rule,
    step_rule,
)
from hybridlm.layers.mamba2 import init_dt_bias


@dataclass(frozen=True)
class KimiDelta:
    """Kimi Delta Attention: projections, short convolutions, delta rule with decays by channel, gated norm of each
    head, projection."""

    n_heads: int = 32
    """Heads H."""
    d_key: int = 128
    """Width N of queries and keys."""
    d_head: int = 128
    """Width P of a head's values."""
    decay_rank: int | None = 128
    """Rank R of the projection that decays come from; None: full."""
    gate_rank: int | None = 128
    """Rank R of the output gate's projection; None: full."""
    lower_bound: float | None = None
    """Log decays lie between this number and 0 (Ling 3); None: they are -exp(A_log) softplus(...), as in the paper."""
    d_conv: int = 4
    """Window W of the causal convolutions over queries, keys and values."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """Behind the convolutions; the output gate is always a sigmoid."""
    neg_eigval: bool = False
    """Step sizes of the rule reach 2 instead of 1, so that states can be reflected (Grazzi et al. 2024)."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norm of the output."""
    dt_min: float = 1e-3
    """Smallest step size of the decay at initialisation."""
    dt_max: float = 0.1
    """Largest step size of the decay at initialisation."""
    dt_init_floor: float = 1e-4
    """Lower clamp of the step size at initialisation."""
    A_init: tuple[float, float] = (1.0, 16.0)
    """-A is drawn uniformly from this range."""
    chunk: int | None = None
    """Chunk length of the rule; None: the op chooses. Results do not depend on it beyond rounding."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "delta_in": Kept("Kimi Delta: queries, keys and values, before the convolutions", kernels=True),
        "delta_ba": Kept("Kimi Delta: step sizes, decays and gate, before their activations", kernels=True),
        "delta_conv": Kept("Kimi Delta: queries, keys and values after convolution and activation"),
        "delta_rule": Kept("Kimi Delta: output of the delta rule", kernels=True),
        "mamba_root": Kept("Kimi Delta: inverse root mean squares of the gated norm", kernels=True),
        "delta_norm": Kept("Kimi Delta: gated and normed input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_sizes(self, ("n_heads", "d_key", "d_head", "decay_rank", "gate_rank", "d_conv", "chunk"))
        require(self.lower_bound is None or self.lower_bound < 0, f"lower_bound ({self.lower_bound}) must be negative")

    def check(self, d_model: int) -> None:
        """Kimi Delta Attention fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "KimiDeltaMixer":
        """The mixer of one sublayer."""
        return make.mixer(KimiDeltaMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, convolutions and the delta rule."""
        d_keys, d_values = self.n_heads * self.d_key, self.n_heads * self.d_head
        products = d_model * (2 * d_keys + 2 * d_values + self.n_heads)
        for width, rank in ((d_keys, self.decay_rank), (d_values, self.gate_rank)):
            products += d_model * width if rank is None else (d_model + width) * rank
        conv = 2.0 * self.d_conv * (2 * d_keys + d_values)
        return 2.0 * products + conv + delta_flops(self.n_heads, self.d_head, self.d_key, seq_len)

    def resolved(self, d_model: int) -> "KimiDelta":
        """Nothing is derived."""
        return self


class KimiDeltaMixer(nnx.Module):
    """KDA: q, k, v, b = projections, f and z too, of low rank; convolution and activation of q, k, v; delta rule with
    step sizes sigmoid(b) and log decays -exp(A_log) softplus(f + dt_bias), or lower_bound sigmoid(exp(A_log) (f +
    dt_bias)); RMS norm of each head, times sigmoid(z); projection."""

    in_decay: nnx.Param | None
    in_gate: nnx.Param | None
    decay: nnx.Param
    gate: nnx.Param

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend

    def __init__(
        self,
        config: KimiDelta,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, P, N, W = d_model, config.n_heads, config.d_head, config.d_key, config.d_conv
        out_std = init_std if out_std is None else out_std
        keys, values = ("heads", "d_state"), ("heads", "d_head")
        self.in_q = params.matrix(rngs, (D, H, N), ("d_model", *keys), init_std)
        self.in_k = params.matrix(rngs, (D, H, N), ("d_model", *keys), init_std)
        self.in_v = params.matrix(rngs, (D, H, P), ("d_model", *values), init_std)
        self.in_b = params.matrix(rngs, (D, H), ("d_model", "heads"), init_std)
        for name, width, axes, rank in (("decay", N, keys, config.decay_rank), ("gate", P, values, config.gate_rank)):
            down = None if rank is None else params.matrix(rngs, (D, rank), ("d_model", None), init_std)
            first = (D, "d_model") if rank is None else (rank, None)
            setattr(self, f"in_{name}", down)
            setattr(self, name, params.matrix(rngs, (first[0], H, width), (first[1], *axes), init_std))
        draw_q, draw_k, draw_v = params.uniforms(rngs, (H, N, W + 1), (H, N, W + 1), (H, P, W + 1))
        self.conv_q, _ = short_conv.make(draw_q, keys, bias=False)
        self.conv_k, _ = short_conv.make(draw_k, keys, bias=False)
        self.conv_v, _ = short_conv.make(draw_v, values, bias=False)
        draw_dt, draw_A = params.uniforms(rngs, (H, N), (H,))
        self.dt_bias = params.make(init_dt_bias(draw_dt, config), keys, "recurrence")
        low, high = config.A_init
        self.A_log = params.make(jnp.log(low + draw_A * (high - low)), ("heads",), "recurrence")
        self.norm = params.ones((P,), ("d_head",), "norm")
        self.out = params.matrix(rngs, (H, P, D), (*values, "d_model"), out_std, n_in=2)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Decays of the state a token, and the norm of a row's last state."""
        return inspection.decays(self._project(x_BTD)[3], tokens) | recurrent.state_norm(self, x_BTD, tokens)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero state (float32), and the windows of the convolutions."""
        return init_cache(self, batch, layout)

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the cache `old` (None: from nothing, and no new one is made)."""
        qkv, z_BTHP, beta_BTH, g_BTHN = self._project(x_BTD)
        y_BTHP, new = run_rule(self, qkv, beta_BTH, g_BTHN, tokens, old)
        return self._output(y_BTHP, z_BTHP), new

    def _step(self, x_BTD, old: dict) -> tuple[jax.Array, dict]:
        """One token: the recurrence as written."""
        qkv, z_BTHP, beta_BTH, g_BTHN = self._project(x_BTD)
        y_BTHP, new = step_rule(self, qkv, beta_BTH, g_BTHN, old)
        return self._output(y_BTHP.astype(z_BTHP.dtype), z_BTHP), new

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]:
        """q, k [B, T, H, N] and v [B, T, H, P]; the gate z [B, T, H, P]; step sizes beta [B, T, H] and log decays g
        [B, T, H, N], float32."""
        first = [self.decay if self.in_decay is None else self.in_decay]
        first += [self.gate if self.in_gate is None else self.in_gate]
        matrices = (self.in_q, self.in_k, self.in_v, self.in_b, *first)
        *qkv, b_BTH, f, z = params.projections(x_BTD.astype(self.dtype), *((w, None) for w in matrices))
        f_BTHN = f if self.in_decay is None else params.project(f, self.decay)
        z_BTHP = z if self.in_gate is None else params.project(z, self.gate)
        heads = ("batch", "tokens", "heads", None)
        qkv = [checkpoint_name(sharding.constrain(a, *heads), "delta_in") for a in qkv]
        b_BTH, f_BTHN, z_BTHP = (
            checkpoint_name(sharding.constrain(a, *heads[: a.ndim]), "delta_ba") for a in (b_BTH, f_BTHN, z_BTHP)
        )
        beta_BTH = jax.nn.sigmoid(b_BTH.astype(jnp.float32)) * (2.0 if self.config.neg_eigval else 1.0)
        f_BTHN = f_BTHN.astype(jnp.float32) + self.dt_bias[...][None, None]
        A_H1 = jnp.exp(self.A_log[...])[None, None, :, None]
        bound = self.config.lower_bound
        g_BTHN = -A_H1 * jax.nn.softplus(f_BTHN) if bound is None else bound * jax.nn.sigmoid(A_H1 * f_BTHN)
        return qkv, z_BTHP, beta_BTH, g_BTHN

    def _output(self, y_BTHP: jax.Array, z_BTHP: jax.Array) -> jax.Array:
        """Norm of each head and gate in float32, output projection."""
        with jax.named_scope("gate_norm"):
            y_BTHP = gated_head_norm(self, y_BTHP, z_BTHP, "sigmoid")
        with jax.named_scope("output"):
            return params.leave(y_BTHP, self.out, kept="delta_norm")
