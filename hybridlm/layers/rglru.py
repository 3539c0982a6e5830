# SPDX-License-Identifier: Apache-2.0
"""The recurrent block of Griffin with its RG-LRU (De et al. 2024, arXiv:2402.19427, section 2.3 and equation 1 to 4).

Axis letters: B batch, T tokens, D model, H heads (the blocks of the gates' matrices), P channels of a head, W
convolution window.
"""

import math
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
from hybridlm.layers.mlp import ACTIVATIONS
from hybridlm.layers.quantized import einsum
from hybridlm.layers.segments import positions_within

POWER = 8.0
"""The paper's c: a recurrence gate of 1 takes the decay to this power."""
MAX_SQRT_GRADIENT = 1000.0
"""Bound of the derivative of sqrt(1 - a^2), which has none where a is 1."""


@dataclass(frozen=True)
class RGLRU:
    """A gated linear recurrence behind a short convolution, beside a branch that gates its output."""

    n_heads: int = 16
    """Heads H: the recurrence's gates are computed in this many blocks of channels."""
    d_inner: int | None = None
    """Channels H P; None: the model's width."""
    d_conv: int = 4
    """Window W of the causal convolution."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "gelu_tanh"
    """Of the branch that gates the output."""
    bias: bool = True
    """Bias of the projections; the convolution and the recurrence's gates always have one."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "rglru_in": Kept("RG-LRU: gate branch and recurrent branch, before the convolution", kernels=True),
        "rglru_gates": Kept("RG-LRU: input and recurrence gates before their sigmoids", kernels=True),
        "rglru_scan": Kept("RG-LRU: output of the recurrence", kernels=True),
        "rglru_out": Kept("RG-LRU: input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_heads", "d_inner", "d_conv"))

    def check(self, d_model: int) -> None:
        """ConfigError where the heads do not divide the channels."""
        width = self.d_inner or d_model
        require(width % self.n_heads == 0, f"d_inner ({width}) not divisible by n_heads ({self.n_heads})")

    def build(self, d_model: int, make: Make) -> "RGLRUMixer":
        """The mixer of one sublayer."""
        return make.mixer(RGLRUMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, gates and convolution; the recurrence has no products of matrices and counts nothing."""
        width = self.d_inner or d_model
        return 2.0 * width * (3 * d_model + 2 * (width // self.n_heads) + self.d_conv)

    def resolved(self, d_model: int) -> "RGLRU":
        """With the number of channels."""
        return replace(self, d_inner=self.d_inner or d_model)


class RGLRUMixer(nnx.Module):
    """Output projection of activation(y) * RG-LRU(convolution(x)), with y and x projections of the input."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: RGLRU,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std). The gates'
        blocks start at 1 / sqrt(P), decays so that a^c is uniform in [0.9, 0.999], as in the paper."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, W = d_model, config.n_heads, config.d_conv
        P, bias, heads = (config.d_inner or D) // H, config.bias, ("heads", "d_head")
        out_std = init_std if out_std is None else out_std
        self.w_in = params.matrix(rngs, (D, 2, H, P), ("d_model", None, *heads), init_std, fused_axes=(1,))
        self.b_in = params.zeros((2, H, P), (None, *heads), "bias") if bias else None
        draw_conv, draw_decay = params.uniforms(rngs, (H, P, W + 1), (H, P))
        self.conv, self.conv_bias = short_conv.make(draw_conv, heads, True)
        gates = ("d_head", None, *heads)
        self.w_gates = params.matrix(rngs, (P, 2, H, P), gates, 1 / math.sqrt(P), fused_axes=(1, 2))
        self.b_gates = params.zeros((2, H, P), (None, *heads), "bias")
        low, high = 0.9**2, 0.999**2
        decay = jnp.log(jnp.expm1(-0.5 * jnp.log(low + (high - low) * draw_decay)))  # softplus of it is -log a
        self.decay = params.make(decay, heads, "recurrence")
        self.w_out = params.matrix(rngs, (H, P, D), (*heads, "d_model"), out_std, n_in=2)
        self.b_out = params.zeros((D,), ("d_model",), "bias") if bias else None

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Decays of the state a token, and the norm of a row's last state."""
        u_BTHP, _ = short_conv.convolve(
            self._project(x_BTD)[1], self.conv, self.conv_bias, None, segment_ids=tokens.segment_ids, gaps=tokens.gaps
        )
        starts_BT = positions_within(tokens.segment_ids, x_BTD.shape[:2]) == 0
        return inspection.decays(self._gated(u_BTHP, starts_BT)[0], tokens) | recurrent.state_norm(self, x_BTD, tokens)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero state (float32), and the window of the convolution."""
        state = layout.state((batch, *self.conv.shape[-3:-1]), ("batch", "heads"))
        return {"state": state, "conv": short_conv.init_window(self.conv, batch, self.dtype, layout)}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the cache `old` (None: from nothing, and no new one is made)."""
        ids, window, state = tokens.segment_ids, None, None
        position_BT: Any = tokens.positions
        if old is None:  # positions may be any that are to rotate
            position_BT = positions_within(ids, x_BTD.shape[:2])
        else:
            window, state = old["conv"], old["state"]
        gate_BTHP, u_BTHP = self._project(x_BTD)
        with jax.named_scope("convolve"):
            u_BTHP, window = short_conv.convolve(
                u_BTHP, self.conv, self.conv_bias, None, segment_ids=ids, gaps=tokens.gaps, window=window
            )
        log_a_BTHP, u_BTHP = self._gated(u_BTHP, position_BT == 0)
        with jax.named_scope("scan"):
            h_BTHP, state = ops.linear_scan(
                u_BTHP, log_a_BTHP, channels=("heads", "d_head"), segment_ids=ids, initial_state=state
            )
            h_BTHP = checkpoint_name(h_BTHP, "rglru_scan")
        return self._output(h_BTHP, gate_BTHP), {} if old is None else {"state": state, "conv": window}

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple[jax.Array, jax.Array]:
        """The gate branch and the recurrent branch, [B, T, H, P]."""
        h = params.project(x_BTD.astype(self.dtype), self.w_in, self.b_in)
        h = checkpoint_name(sharding.constrain(h, "batch", "tokens", None, "heads", None), "rglru_in")
        return h[:, :, 0], h[:, :, 1]

    @jax.named_scope("gates")
    def _gated(self, u_BTHP: jax.Array, starts_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log decays and what is added to the state, float32: sqrt(1 - a^2) i u, at a document's first token i u."""
        gates = einsum("BTHQ,QcHP->BTcHP", u_BTHP, params.held(self.w_gates, u_BTHP.dtype), jnp.float32)
        gates = sharding.constrain(gates, "batch", "tokens", None, "heads", None)
        gates = checkpoint_name(gates + self.b_gates[...][None, None], "rglru_gates")
        i_BTHP, r_BTHP = jax.nn.sigmoid(gates[:, :, 0]), jax.nn.sigmoid(gates[:, :, 1])
        log_a_BTHP = -POWER * r_BTHP * jax.nn.softplus(self.decay[...])[None, None]
        scale = jnp.where(starts_BT[:, :, None, None], 1.0, _bounded_sqrt(-jnp.expm1(2 * log_a_BTHP)))
        return log_a_BTHP, scale * i_BTHP * u_BTHP.astype(jnp.float32)

    @jax.named_scope("output")
    def _output(self, h_BTHP: jax.Array, gate_BTHP: jax.Array) -> jax.Array:
        y_BTHP = h_BTHP * ACTIVATIONS[self.config.activation](gate_BTHP).astype(jnp.float32)
        y_BTHP = sharding.constrain(y_BTHP.astype(self.dtype), "batch", "tokens", "heads", None)
        return params.leave(y_BTHP, self.w_out, self.b_out, kept="rglru_out")


@jax.custom_jvp
def _bounded_sqrt(x: jax.Array) -> jax.Array:
    """sqrt(x) with a derivative of at most MAX_SQRT_GRADIENT."""
    return jnp.sqrt(x)


@_bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    x = primals[0]
    return jnp.sqrt(x), tangents[0] / jnp.sqrt(jnp.maximum(4 * x, MAX_SQRT_GRADIENT**-2))
