# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts whose router averages over depth (ZAYA1; Zyphra 2025, arXiv:2511.17127): an MLP of a state that
each depth hands to the next, and one choice more, which is no expert.

Axis letters: B batch, T tokens, D model, R router state, E choices (the experts and none), k choices of a token, F
feed-forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import params
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, reporting
from hybridlm.layers.experts import routed_per_device
from hybridlm.layers.mlp import ACTIVATIONS, GATED
from hybridlm.layers.moe import STATISTICS, Router, inspected, route, statistics
from hybridlm.layers.norm import RMSNorm


@dataclass(frozen=True)
class DepthMoE:
    """Feed-forward sublayer of n_experts experts, chosen by an MLP of the router's state; or of none."""

    n_experts: int = 16
    """Experts; one choice more is to skip them."""
    d_ff: int = 2048
    """Width F of an expert."""
    activation: Literal["swiglu", "geglu", "geglu_tanh", "reglu", "reglu2"] = "swiglu"
    """As in MLP, the gated ones."""
    d_router: int = 256
    """Width R of the router's state, the same in all depths."""
    first: bool = False
    """No state comes to it: it has no scale for one."""
    top_k: int = 1
    """Choices of a token; its weights are their probabilities among all."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norm of the router's state."""
    balance_weight: float = 0.0
    """Weight of the load-balance loss, as in MoE; the published model is balanced by the bias of its choice alone."""
    z_weight: float = 0.0
    """Weight of the mean of logsumexp(router logits) squared."""
    capacity: float | None = None
    """As in MoE."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "moe_logits": Kept("MoE by depth: router logits", kernels=True),
        "moe_routed": Kept("MoE by depth: output of the experts, weighed and added up", kernels=True),
        "moe_order": Kept("MoE by depth: assignments sorted by expert"),
        "moe_hidden": Kept("MoE by depth: what the routed experts' first product gives, before activation and gate"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = STATISTICS
    MIXES_TOKENS = False

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_experts", "d_ff", "d_router", "top_k", "capacity"))
        for name in ("balance_weight", "z_weight"):
            require(getattr(self, name) >= 0, f"{name} ({getattr(self, name)}) must not be negative")
        choices = self.n_experts + 1
        require(self.top_k <= choices, f"top_k ({self.top_k}) exceeds the {choices} choices")

    def check(self, d_model: int) -> None:
        """It fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "DepthMoEFeedForward":
        """The mixer of one sublayer."""
        return make.mixer(DepthMoEFeedForward, self, d_model)

    def passes(self, d_model: int) -> int:
        """The router's state goes on to the next depth."""
        return self.d_router

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Experts and their widths."""
        return [("n_experts", self.n_experts, "experts"), ("d_ff", self.d_ff, "d_ff")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Router and a token's experts; none is counted as one."""
        router = self.d_router * (d_model + 2 * self.d_router + self.n_experts + 1)
        return 2.0 * router + 2.0 * 3 * self.top_k * d_model * self.d_ff

    def resolved(self, d_model: int) -> "DepthMoE":
        """Nothing is derived."""
        return self


class DepthMoEFeedForward(nnx.Module):
    """sum over the choices of probability * expert(x); probabilities: softmax of an MLP of the state r = projection(x)
    + scale * (r of the depth before). The router is computed in float32."""

    cache_grows = False
    __call__ = reporting

    def __init__(
        self,
        config: DepthMoE,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the first matrices and of the last (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, E, F, R = d_model, config.n_experts, config.d_ff, config.d_router
        exact = partial(params.matrix, rngs, std=init_std, exact=True)
        self.router_in = exact((D, R), ("d_model", None))
        self.router_in_bias = params.zeros((R,), (None,), "bias")
        self.state_scale = None if config.first else params.ones((R,), (None,), "norm")
        self.router_norm = RMSNorm(R, config.norm_eps, axis=None)
        self.fc1, self.fc2 = (exact((R, R), (None, None)) for _ in range(2))
        self.fc1_bias, self.fc2_bias = (params.zeros((R,), (None,), "bias") for _ in range(2))
        self.router_out = exact((R, E + 1), (None, None))
        self.selection_bias = params.make(jnp.zeros((E + 1,)).at[E].set(-1.0), (None,), "bias")
        self.w_in = params.matrix(rngs, (E, D, 2, F), ("experts", "d_model", None, "d_ff"), init_std, fused_axes=(0, 2))
        out_std = init_std if out_std is None else out_std
        self.w_out = params.matrix(rngs, (E, F, D), ("experts", "d_ff", "d_model"), out_std, fused_axes=(0,))

    def pass_on(self, x_BTD: jax.Array, passed_BTR: jax.Array | None, tokens: Tokens) -> tuple[Output, jax.Array]:
        """([B, T, D] in `dtype` and the statistics, the router's state [B, T, R] in float32).

        passed_BTR: the state of the depth before; None: zeros. Padding reaches no expert."""
        c, x_BTD, ids = self.config, x_BTD.astype(self.dtype), tokens.segment_ids
        real_BT = jnp.ones(x_BTD.shape[:2], bool) if ids is None else ids != 0
        with jax.named_scope("router"):
            state_BTR = self._state(x_BTD, passed_BTR)
            logits_BTE = checkpoint_name(sharding.constrain(self._logits(state_BTR), *sharding.STREAM), "moe_logits")
            router = Router(c.top_k, "softmax", selection_bias=True)
            choices_BTk, weights_BTk, scores_BTE = route(router, logits_BTE, self.selection_bias[...])
        with jax.named_scope("experts"):
            experts_BTk = jnp.where(real_BT[..., None], choices_BTk, c.n_experts)
            w_in, w_out = (params.operand(w, x_BTD.dtype) for w in (self.w_in, self.w_out))
            y_BTD, kept_BTk = routed_per_device(
                x_BTD, experts_BTk, weights_BTk, w_in, w_out, ACTIVATIONS[GATED[c.activation]],
                n_experts=c.n_experts, d_ff=c.d_ff, capacity=c.capacity,
            )  # fmt: skip
            y_BTD = checkpoint_name(y_BTD, "moe_routed")
        with jax.named_scope("statistics"):
            kept_BTk |= choices_BTk == c.n_experts
            stats = statistics(c, c.top_k, logits_BTE, scores_BTE, choices_BTk, real_BT, kept_BTk)
        return Output(y_BTD, stats), state_BTR

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """`pass_on` where nothing comes from a depth before."""
        return self.pass_on(x_BTD, None, tokens)[0]

    def inspect_on(self, x_BTD: jax.Array, passed_BTR: jax.Array | None, tokens: Tokens) -> dict[str, jax.Array]:
        """The busiest choice's share over an even one, the entropy of the router, assignments that were dropped."""
        return inspected(self.pass_on(x_BTD, passed_BTR, tokens)[0].stats)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """`inspect_on` where nothing comes from a depth before."""
        return self.inspect_on(x_BTD, None, tokens)

    def init_cache(self, batch: int, max_len: int) -> dict:
        """Nothing to remember."""
        return {}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """`mix`: the past does not matter."""
        return self.mix(x_BTD, Tokens(None if real_BT is None else real_BT.astype(jnp.int32))).y_BTD, cache

    def _state(self, x_BTD, passed_BTR) -> jax.Array:
        """The router's state, float32."""
        exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        state_BTR = params.enter(exact, x_BTD.astype(jnp.float32), [self.router_in], sharding.STREAM)
        state_BTR += self.router_in_bias[...][None, None]
        if passed_BTR is not None and self.state_scale is not None:
            state_BTR += passed_BTR * self.state_scale[...][None, None]
        return sharding.constrain(state_BTR, *sharding.STREAM)

    def _logits(self, state_BTR) -> jax.Array:
        """Logits of the choices, float32."""
        exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        h_BTR = self.router_norm(state_BTR)
        for weight, bias in ((self.fc1, self.fc1_bias), (self.fc2, self.fc2_bias)):
            h_BTR = ACTIVATIONS["gelu"](exact(h_BTR, weight[...]) + bias[...][None, None])
        return exact(h_BTR, self.router_out[...])
