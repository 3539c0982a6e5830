# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet mixer (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464, section 3.4), as published with Qwen3-Next.

Axis letters: B batch, T tokens, D model, H heads, P head width, G key heads, N key width, W convolution window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

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
from hybridlm.layers.mamba2 import init_dt_bias
from hybridlm.layers.norm import gated_rms_norm


@dataclass(frozen=True)
class GatedDeltaNet:
    """Gated DeltaNet mixer: projections, short convolutions, gated delta rule, gated norm of each head, projection."""

    n_heads: int = 32
    """Heads H, of values."""
    n_key_heads: int | None = None
    """Heads G of queries and keys, each shared by as many of values; None: n_heads."""
    d_key: int = 128
    """Width N of queries and keys."""
    d_head: int = 128
    """Width P of a head's values."""
    d_conv: int = 4
    """Window W of the causal convolutions over queries, keys and values."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """Behind the convolutions."""
    gate: Literal["silu", "sigmoid"] = "silu"
    """Of the output."""
    neg_eigval: bool = False
    """Step sizes of the rule reach 2 instead of 1, so that states can be reflected (Grazzi et al. 2024)."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norm of the output."""
    dt_min: float = 1e-3
    """Smallest step size of the decay at initialisation."""
    dt_max: float = 0.1
    """Largest step size of the decay at initialisation."""
    dt_init_floor: float = 1e-4
    """Lower clamp of the step size at initialisation."""
    A_init: tuple[float, float] = (0.01, 16.0)
    """-A is drawn uniformly from this range."""
    chunk: int | None = None
    """Chunk length of the rule; None: the op chooses. Results do not depend on it beyond rounding."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "delta_in": Kept("Gated DeltaNet: queries, keys, values and gate, before the convolutions", kernels=True),
        "delta_ba": Kept("Gated DeltaNet: step sizes of the rule and of the decay, before they are made", kernels=True),
        "delta_conv": Kept("Gated DeltaNet: queries, keys and values after convolution and activation"),
        "delta_rule": Kept("Gated DeltaNet: output of the delta rule", kernels=True),
        "mamba_root": Kept("Gated DeltaNet: inverse root mean squares of the gated norm", kernels=True),
        "delta_norm": Kept("Gated DeltaNet: gated and normed input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_sizes(self, ("n_heads", "n_key_heads", "d_key", "d_head", "d_conv", "chunk"))
        require(
            self.n_heads % self.key_heads == 0,
            f"n_heads ({self.n_heads}) not divisible by n_key_heads ({self.key_heads})",
        )

    @property
    def key_heads(self) -> int:
        """Heads G of queries and keys."""
        return self.n_heads if self.n_key_heads is None else self.n_key_heads

    def check(self, d_model: int) -> None:
        """Gated DeltaNet fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "GatedDeltaNetMixer":
        """The mixer of one sublayer."""
        return make.mixer(GatedDeltaNetMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads of values; those of keys need not divide."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, convolutions and the delta rule."""
        d_keys, d_values = self.key_heads * self.d_key, self.n_heads * self.d_head
        projections = 2.0 * d_model * (2 * d_keys + 3 * d_values + 2 * self.n_heads)
        conv = 2.0 * self.d_conv * (2 * d_keys + d_values)
        return projections + conv + delta_flops(self.n_heads, self.d_head, self.d_key, seq_len)

    def resolved(self, d_model: int) -> "GatedDeltaNet":
        """With the number of key heads."""
        return replace(self, n_key_heads=self.key_heads)


def check_sizes(block, names: tuple[str, ...]) -> None:
    """ConfigError where a size is not positive, or where initial step sizes and decays cannot be drawn."""
    check_positive(block, names)
    require(
        0 < block.dt_min <= block.dt_max,
        f"dt_min ({block.dt_min}) must be positive and at most dt_max ({block.dt_max})",
    )
    low, high = block.A_init
    require(0 < low <= high, f"A_init ({low}, {high}) must satisfy 0 < low <= high")


DELTA_CHUNK = 64
"""Chunk length Q at which the rule's FLOPs are counted, whatever chunk and implementation run."""


def delta_flops(n_heads: int, d_head: int, d_key: int, seq_len: int) -> float:
    """Forward FLOPs per token of the chunked gated delta rule (Yang et al. 2024, arXiv:2412.06464, section 3.3).

    | product, per token and head | FLOPs |
    | --- | --- |
    | keys with keys, and queries with keys, causal halves | 2 N (Q + 1) |
    | inverse of the chunk's triangular system, Q^3 / 3 a chunk | Q^2 / 3 |
    | the inverse times values and decayed keys, causal half | (N + P) (Q + 1) |
    | scores times corrections, causal half | P (Q + 1) |
    | entering state: corrections of it, outputs; leaving state | 6 N P |
    """
    Q = min(DELTA_CHUNK, seq_len)
    within = (Q + 1) * (3 * d_key + 2 * d_head) + Q * Q / 3
    return n_heads * (within + 6.0 * d_key * d_head)


def run_rule(mixer, qkv: list, beta_BTH, g, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
    """Convolutions and delta rule of all tokens from the cache `old` (None: from nothing): (y [B, T, H, P], new cache).

    mixer: has conv_q, conv_k and conv_v. qkv: before the convolutions. g: log decays, [B, T, H] or [B, T, H, N].
    """
    before, new, convolved = old or {}, {}, []
    with jax.named_scope("convolve"):
        for a, (name, weight) in zip(qkv, _convolutions(mixer).items(), strict=True):
            y, new[name] = short_conv.convolve(
                a, weight, None, mixer.config.activation, segment_ids=tokens.segment_ids, gaps=tokens.gaps,
                window=before.get(name),
            )  # fmt: skip
            convolved.append(checkpoint_name(y, "delta_conv"))
    with jax.named_scope("rule"):
        q, k, v = convolved
        y_BTHP, new["state"] = ops.gated_delta_rule(
            q, k, v, beta_BTH, g, segment_ids=tokens.segment_ids, initial_state=before.get("state"),
            chunk=mixer.config.chunk,
        )  # fmt: skip
        return checkpoint_name(y_BTHP, "delta_rule"), new


def step_rule(mixer, qkv: list, beta_BTH, g_BTHN, old: dict) -> tuple[jax.Array, dict]:
    """The same for one token, by the recurrence as written (the paper's equation 10): (y [B, 1, H, P] in float32, new
    cache). g: [B, 1, H, N], or [B, 1, H, 1] where it is the head's."""
    new, convolved = {}, []
    with jax.named_scope("convolve"):
        for a, (name, weight) in zip(qkv, _convolutions(mixer).items(), strict=True):
            y, new[name] = short_conv.step(a, weight, None, mixer.config.activation, old[name])
            convolved.append(y)
    with jax.named_scope("rule"):
        n_heads, v_BHP = mixer.config.n_heads, convolved[2].astype(jnp.float32)
        q_BHN, k_BHN = (jnp.repeat(_unit(a), n_heads // a.shape[1], axis=1) for a in convolved[:2])
        state_BHNP = jnp.exp(g_BTHN[:, 0, :, :, None]) * old["state"]
        read_BHP = (state_BHNP * k_BHN[..., None]).sum(2)
        state_BHNP += k_BHN[..., None] * (beta_BTH[:, 0, :, None] * (v_BHP - read_BHP))[:, :, None]
        y_BHP = (state_BHNP * q_BHN[..., None]).sum(2) * q_BHN.shape[-1] ** -0.5
        return y_BHP[:, None], new | {"state": state_BHNP}


def init_cache(mixer, batch: int, layout: caches.Layout) -> dict[str, Any]:
    """What these two read and write: a zero state (float32), and the windows of the convolutions."""
    c, windows = mixer.config, _convolutions(mixer).items()
    kept = {name: short_conv.init_window(weight, batch, mixer.dtype, layout) for name, weight in windows}
    return {"state": layout.state((batch, c.n_heads, c.d_key, c.d_head), ("batch", "heads"))} | kept


def gated_head_norm(mixer, y_BTHP: jax.Array, z_BTHP: jax.Array, gating: str) -> jax.Array:
    """RMS norm of each head in float32, with one weight [P] for all, times the gate's activation of z."""
    c, n_heads = mixer.config, y_BTHP.shape[2]
    y_BTHP = gated_rms_norm(y_BTHP, z_BTHP, mixer.norm[...], c.norm_eps, n_heads, True, mixer.dtype, gating)
    return sharding.constrain(y_BTHP, "batch", "tokens", "heads", None)


def _convolutions(mixer) -> dict[str, nnx.Param]:
    """Weights of the convolutions of q, k and v by the names of their windows."""
    return {"conv_q": mixer.conv_q, "conv_k": mixer.conv_k, "conv_v": mixer.conv_v}


def _unit(x: jax.Array) -> jax.Array:
    """`x` in float32 over its length along the last axis, as the rule normalises queries and keys."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class GatedDeltaNetMixer(nnx.Module):
    """Gated DeltaNet: q, k, v, z, b, a = projections; convolution and activation of q, k, v; delta rule with step sizes
    sigmoid(b) and log decays -exp(A_log) softplus(a + dt_bias); RMS norm of each head, times silu(z) or
    sigmoid(z); projection.

    Published fused projections are stored apart, by head, so that tensor parallelism can split them.
    """

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend

    def __init__(
        self,
        config: GatedDeltaNet,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, P, G, N, W = d_model, config.n_heads, config.d_head, config.key_heads, config.d_key, config.d_conv
        out_std = init_std if out_std is None else out_std
        heads, keys, values = ("heads",), ("groups", "d_state"), ("heads", "d_head")
        self.in_q = params.matrix(rngs, (D, G, N), ("d_model", *keys), init_std)
        self.in_k = params.matrix(rngs, (D, G, N), ("d_model", *keys), init_std)
        self.in_v = params.matrix(rngs, (D, H, P), ("d_model", *values), init_std)
        self.in_z = params.matrix(rngs, (D, H, P), ("d_model", *values), init_std)
        self.in_ba = params.matrix(rngs, (D, 2, H), ("d_model", None, *heads), init_std, fused_axes=(1,))
        draw_q, draw_k, draw_v = params.uniforms(rngs, (G, N, W + 1), (G, N, W + 1), (H, P, W + 1))
        self.conv_q, _ = short_conv.make(draw_q, keys, bias=False)
        self.conv_k, _ = short_conv.make(draw_k, keys, bias=False)
        self.conv_v, _ = short_conv.make(draw_v, values, bias=False)
        draw_dt, draw_A = params.uniforms(rngs, (H,), (H,))
        self.dt_bias = params.make(init_dt_bias(draw_dt, config), heads, "recurrence")
        low, high = config.A_init
        self.A_log = params.make(jnp.log(low + draw_A * (high - low)), heads, "recurrence")
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
        qkv, z_BTHP, beta_BTH, g_BTH = self._project(x_BTD)
        y_BTHP, new = run_rule(self, qkv, beta_BTH, g_BTH, tokens, old)
        return self._output(y_BTHP, z_BTHP), new

    def _step(self, x_BTD, old: dict) -> tuple[jax.Array, dict]:
        """One token: the recurrence as written."""
        qkv, z_BTHP, beta_BTH, g_BTH = self._project(x_BTD)
        y_BTHP, new = step_rule(self, qkv, beta_BTH, g_BTH[..., None], old)
        return self._output(y_BTHP.astype(z_BTHP.dtype), z_BTHP), new

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple[list[jax.Array], jax.Array, jax.Array, jax.Array]:
        """q, k [B, T, G, N] and v [B, T, H, P]; the gate z; step sizes beta and log decays g [B, T, H], float32."""
        matrices = (self.in_q, self.in_k, self.in_v, self.in_z, self.in_ba)
        *qkvz, ba_BTcH = params.projections(x_BTD.astype(self.dtype), *((w, None) for w in matrices))
        names = ("groups", "groups", "heads", "heads")
        qkvz = [sharding.constrain(a, "batch", "tokens", name, None) for a, name in zip(qkvz, names, strict=True)]
        *qkv, z_BTHP = (checkpoint_name(a, "delta_in") for a in qkvz)
        ba_BTcH = checkpoint_name(sharding.constrain(ba_BTcH, "batch", "tokens", None, "heads"), "delta_ba")
        ba_BTcH = ba_BTcH.astype(jnp.float32)
        beta_BTH = jax.nn.sigmoid(ba_BTcH[:, :, 0]) * (2.0 if self.config.neg_eigval else 1.0)
        dt_BTH = jax.nn.softplus(ba_BTcH[:, :, 1] + self.dt_bias[...][None, None])
        return qkv, z_BTHP, beta_BTH, -jnp.exp(self.A_log[...])[None, None] * dt_BTH

    def _output(self, y_BTHP: jax.Array, z_BTHP: jax.Array) -> jax.Array:
        """Norm of each head and gate in float32, output projection."""
        with jax.named_scope("gate_norm"):
            y_BTHP = gated_head_norm(self, y_BTHP, z_BTHP, self.config.gate)
        with jax.named_scope("output"):
            return params.leave(y_BTHP, self.out, kept="delta_norm")
