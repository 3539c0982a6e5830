# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: routers as published, dropless experts, shared and latent experts, router losses and statistics.

Axis letters: B batch, T tokens, D model, E experts, k experts of a token, F feed-forward, R latent width.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import sharding
from hybridlm.errors import ConfigError, require
from hybridlm.layers import params
from hybridlm.layers.experts import feed_forward, routed_experts, routed_experts_over
from hybridlm.layers.mlp import ACTIVATIONS, GATED, MLP, FeedForward

STATISTICS = ("loss", "balance", "z", "entropy", "max_load", "dropped")
"""What a router reports of a batch; see `MoEFeedForward`."""


@dataclass(frozen=True)
class Router:
    """How a token chooses its experts, and what their outputs are multiplied by."""

    top_k: int = 2
    """Experts of a token."""
    score: Literal["softmax", "softmax_after", "sigmoid"] = "softmax"
    """softmax over all experts; softmax_after: over the chosen ones alone; sigmoid: of each by itself."""
    renormalise: bool = False
    """Weights are divided by their sum, plus renormalise_eps."""
    renormalise_eps: float = 1e-20
    """See renormalise."""
    scaling: float = 1.0
    """Multiplies the weights, last."""
    selection_bias: bool = False
    """A number an expert is added to the scores for the choice, not for the weights. No gradient reaches it."""
    n_groups: int = 1
    """Experts stand in this many equal groups, and a token chooses among those of its best groups."""
    top_groups: int = 1
    """How many groups that is."""
    group_top: int = 2
    """A group is as good as the sum of this many of its best scores (1: DeepSeek-V2, 2: DeepSeek-V3, Nemotron)."""

    def __post_init__(self):
        for name in ("top_k", "n_groups", "top_groups", "group_top"):
            require(getattr(self, name) > 0, f"{name} ({getattr(self, name)}) must be positive")
        require(
            self.top_groups <= self.n_groups,
            f"top_groups ({self.top_groups}) must not exceed n_groups ({self.n_groups})",
        )
        require(
            not (self.score == "softmax_after" and self.renormalise), "renormalise: softmax_after sums to one already"
        )


@dataclass(frozen=True)
class MoE:
    """Feed-forward sublayer of n_experts experts, of which each token uses router.top_k."""

    n_experts: int = 8
    """Routed experts E."""
    d_ff: int = 4096
    """Width F of a routed expert."""
    activation: Literal[
        "swiglu", "geglu", "geglu_tanh", "reglu", "reglu2", "silu", "gelu", "gelu_tanh", "relu", "relu2"
    ] = "swiglu"
    """As in MLP: those in -glu are gated."""
    router: Router = Router()
    """Which experts, and how much of each."""
    shared: MLP | None = None
    """Experts that every token uses, side by side as one MLP; None: none."""
    shared_gate: bool = False
    """The shared experts' output is multiplied by a sigmoid of a projection of the token (Qwen)."""
    d_latent: int | None = None
    """Routed experts work in this width, between two projections (Nemotron); None: in the model's."""
    latent_bias: bool = False
    """Bias of these projections."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss E sum(share of assignments * mean probability), which is 1 for an even load."""
    z_weight: float = 1e-3
    """Weight of the mean of logsumexp(router logits) squared."""
    capacity: float | None = None
    """Over a mesh axis `expert`: room for that many times the rows of an even load in what a device sends to another,
    the rest is dropped; None: nothing is dropped, with room for all rows."""

    def __post_init__(self):
        for name in ("n_experts", "d_ff", "d_latent", "capacity"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} ({value}) must be positive")
        for name in ("balance_weight", "z_weight"):
            require(getattr(self, name) >= 0, f"{name} ({getattr(self, name)}) must not be negative")
        r, E = self.router, self.n_experts
        require(E % r.n_groups == 0, f"n_experts ({E}) not divisible by router.n_groups ({r.n_groups})")
        choice = E // r.n_groups * r.top_groups
        require(r.top_k <= choice, f"router.top_k ({r.top_k}) exceeds the {choice} experts to choose from")
        require(not self.shared_gate or self.shared is not None, "shared_gate needs shared experts")
        require(not self.latent_bias or self.d_latent is not None, "latent_bias needs d_latent")

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this block cannot be built at the model width."""
        if self.shared is not None:
            try:
                self.shared.check(d_model)
            except ConfigError as error:
                raise ConfigError(f"shared.{error}") from None

    @property
    def gated(self) -> bool:
        """Experts have three matrices, not two."""
        return self.activation in GATED


class MoEFeedForward(nnx.Module):
    """sum over the chosen experts of weight * expert(x), plus the shared experts' output.

    A call gives the output and the router's statistics, float32 scalars over the real tokens: `loss` (to be added to
    the training loss), `balance` and `z` (the two losses unweighted), `entropy` (of the scores as a distribution, mean
    over tokens, nats), `max_load` (assignments of the busiest expert over those of an even load), `dropped`
    (assignments left out).
    """

    keeps_all = False
    """The cache does not grow with the number of tokens."""

    def __init__(
        self,
        config: MoE,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: str = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the first matrices and of the last (None: init_std)."""
        self.config, self.dtype = config, dtype
        out_std = init_std if out_std is None else out_std
        D, E, F, R = d_model, config.n_experts, config.d_ff, config.d_latent or d_model
        self.router = params.matrix(rngs, (D, E), ("d_model", None), init_std)
        self.selection_bias = params.zeros((E,), (None,), "bias") if config.router.selection_bias else None
        latent, bias = config.d_latent is not None, config.latent_bias
        self.latent_in = params.matrix(rngs, (D, R), ("d_model", None), init_std) if latent else None
        self.latent_in_bias = params.zeros((R,), (None,), "bias") if bias else None
        sides, names, fused = ((2,), (None,), (0, 2)) if config.gated else ((), (), (0,))
        shape, axes = (E, R, *sides, F), ("experts", "d_model", *names, "d_ff")
        self.w_in = params.matrix(rngs, shape, axes, init_std, fused_axes=fused)
        self.w_out = params.matrix(rngs, (E, F, R), ("experts", "d_ff", "d_model"), out_std, fused_axes=(0,))
        self.latent_out = params.matrix(rngs, (R, D), (None, "d_model"), out_std) if latent else None
        self.latent_out_bias = params.zeros((D,), ("d_model",), "bias") if bias else None
        options = {"rngs": rngs, "init_std": init_std, "out_std": out_std, "dtype": dtype}
        self.shared = None if config.shared is None else FeedForward(config.shared, D, **options)
        self.shared_gate = params.matrix(rngs, (D, 1), ("d_model", None), init_std) if config.shared_gate else None

    def __call__(self, x_BTD: jax.Array, segment_ids=None, positions=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, T, D] -> [B, T, D] in `dtype`, and the statistics. Padding (segment id 0) reaches no routed expert."""
        x_BTD = x_BTD.astype(self.dtype)
        real_BT = jnp.ones(x_BTD.shape[:2], bool) if segment_ids is None else segment_ids != 0
        w_DE = params.use(self.router, jnp.float32)
        logits_BTE = jnp.matmul(x_BTD.astype(jnp.float32), w_DE, precision=jax.lax.Precision.HIGHEST)
        logits_BTE = checkpoint_name(sharding.constrain(logits_BTE, "batch", "tokens", None), "moe_logits")
        bias_E = None if self.selection_bias is None else self.selection_bias[...]
        experts_BTk, weights_BTk, scores_BTE = route(self.config.router, logits_BTE, bias_E)
        u_BTR = x_BTD
        if self.latent_in is not None:
            u_BTR = _linear(x_BTD, self.latent_in, self.latent_in_bias)
        y_BTR, kept_BTk = self._routed(
            u_BTR, jnp.where(real_BT[..., None], experts_BTk, self.config.n_experts), weights_BTk
        )
        y_BTD = checkpoint_name(y_BTR, "moe_routed")
        if self.latent_out is not None:
            y_BTD = _linear(y_BTD, self.latent_out, self.latent_out_bias)
        y_BTD = y_BTD + self._shared(x_BTD)
        return y_BTD, self._statistics(logits_BTE, scores_BTE, experts_BTk, real_BT, kept_BTk)

    def init_cache(self, batch: int, max_len: int) -> dict:
        """Nothing to remember."""
        return {}

    def extend(self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None) -> tuple[jax.Array, dict]:
        """`__call__`: the past does not matter."""
        return self(x_BTD, None if real_BT is None else real_BT.astype(jnp.int32))[0], cache

    def _routed(self, x_BTR, experts_BTk, weights_BTk) -> tuple[jax.Array, jax.Array]:
        """The routed experts' output [B, T, R], and bool [B, T, k]: which assignments it has; by device."""
        c = self.config
        activation = ACTIVATIONS[GATED.get(c.activation, c.activation)]

        def run(x_BTR, experts_BTk, weights_BTk, w_in, w_out, context_axis=None):
            flat = [a.reshape(-1, a.shape[-1]) for a in (x_BTR, experts_BTk, weights_BTk)]
            apply = feed_forward(w_in, w_out, activation)
            if apply.n_experts == c.n_experts:
                y_MR, kept_Mk = routed_experts(*flat, apply), flat[1] < c.n_experts
            else:
                y_MR, kept_Mk = routed_experts_over("expert", *flat, apply, n_experts=c.n_experts, capacity=c.capacity)
            y_BTR = y_MR.astype(x_BTR.dtype).reshape(x_BTR.shape)
            y_BTR = y_BTR if w_out.shape[1] == c.d_ff else jax.lax.psum(y_BTR, "tensor")
            return y_BTR, kept_Mk.reshape(experts_BTk.shape)

        tokens, sides = ("batch", "tokens", None), (None,) if c.gated else ()
        weights = [params.use(w, x_BTR.dtype) for w in (self.w_in, self.w_out)]
        names = (tokens, tokens, tokens, ("experts", None, *sides, "d_ff"), ("experts", "d_ff", None))
        arrays = (x_BTR, experts_BTk, weights_BTk, *weights)
        return sharding.per_device(run, arrays, names, [tokens, tokens], split_tokens=True)

    def _shared(self, x_BTD) -> jax.Array | float:
        if self.shared is None:
            return 0.0
        y_BTD = self.shared(x_BTD)
        if self.shared_gate is None:
            return y_BTD
        return y_BTD * jax.nn.sigmoid(x_BTD @ params.use(self.shared_gate, x_BTD.dtype))

    def _statistics(self, logits_BTE, scores_BTE, experts_BTk, real_BT, kept_BTk) -> dict[str, jax.Array]:
        c, top_k = self.config, self.config.router.top_k
        real_BT1 = real_BT[..., None].astype(jnp.float32)
        n_real = jnp.maximum(real_BT1.sum(), 1.0)
        mean = lambda a_BTX: jnp.sum(a_BTX * real_BT1, axis=(0, 1)) / n_real
        p_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
        chosen_BTE = jnp.sum(experts_BTk[..., None] == jnp.arange(c.n_experts), axis=2, dtype=jnp.float32)
        share_E = mean(chosen_BTE) / top_k
        balance = c.n_experts * jnp.sum(share_E * mean(p_BTE))
        z = mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)))[0]
        entropy = mean(-jnp.sum(jax.scipy.special.xlogy(p_BTE, p_BTE), axis=-1, keepdims=True))[0]
        dropped = jnp.sum((~kept_BTk).astype(jnp.float32) * real_BT1)
        loss = c.balance_weight * balance + c.z_weight * z
        max_load = share_E.max() * c.n_experts
        return dict(zip(STATISTICS, (loss, balance, z, entropy, max_load, dropped), strict=True))


def route(router: Router, logits_BTE: jax.Array, bias_E: jax.Array | None = None) -> tuple:
    """(chosen experts [B, T, k], their weights [B, T, k], scores [B, T, E]), the last two float32.

    bias_E: added to the scores (of softmax_after: to the logits) for the choice alone.
    """
    logits_BTE = logits_BTE.astype(jnp.float32)
    scores_BTE = jax.nn.sigmoid(logits_BTE) if router.score == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)
    choice_BTE = jax.lax.stop_gradient(logits_BTE if router.score == "softmax_after" else scores_BTE)
    choice_BTE = choice_BTE if bias_E is None else choice_BTE + jax.lax.stop_gradient(bias_E)
    if router.n_groups > 1:
        choice_BTE = _in_best_groups(router, choice_BTE)
    experts_BTk = jax.lax.top_k(choice_BTE, router.top_k)[1]
    if router.score == "softmax_after":
        weights_BTk = jax.nn.softmax(jnp.take_along_axis(logits_BTE, experts_BTk, axis=-1), axis=-1)
    else:
        weights_BTk = jnp.take_along_axis(scores_BTE, experts_BTk, axis=-1)
    if router.renormalise:
        weights_BTk /= weights_BTk.sum(axis=-1, keepdims=True) + router.renormalise_eps
    return experts_BTk, weights_BTk * router.scaling, scores_BTE


def _in_best_groups(router: Router, choice_BTE):
    """Scores, those outside of the best groups -inf."""
    grouped = choice_BTE.reshape(*choice_BTE.shape[:-1], router.n_groups, -1)
    best = jax.lax.top_k(grouped, min(router.group_top, grouped.shape[-1]))[0].sum(axis=-1)
    groups = jax.lax.top_k(best, router.top_groups)[1]
    allowed = jnp.any(groups[..., None] == jnp.arange(router.n_groups), axis=-2)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice_BTE.shape)


def _linear(x, weight: nnx.Param, bias: nnx.Param | None):
    y = x @ params.use(weight, x.dtype)
    return y if bias is None else y + params.use(bias, x.dtype)


def summarise(stats) -> dict[str, jax.Array]:
    """One number a statistic for a model, from what `hidden_with_stats` gives; {} where it has no experts.

    Losses and drops are added up over layers, balance, z and entropy averaged, of the loads the largest is taken.
    """
    flat = [
        (path[-1].key.rsplit(".", 1)[-1], leaf.reshape(-1)) for path, leaf in jax.tree_util.tree_leaves_with_path(stats)
    ]
    joined = {name: jnp.concatenate([leaf for key, leaf in flat if key == name]) for name in dict(flat)}
    how = {"loss": jnp.sum, "dropped": jnp.sum, "max_load": jnp.max}
    return {name: how.get(name, jnp.mean)(values) for name, values in joined.items()}
