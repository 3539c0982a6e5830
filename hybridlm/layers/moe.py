# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: routers as published, dropless experts, shared and latent experts, router losses and statistics.

Axis letters: B batch, T tokens, D model, E experts, k experts of a token, J sinks, F feed-forward, R latent width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require, within
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import params
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, reporting, split_of_parts
from hybridlm.layers.experts import routed_per_device
from hybridlm.layers.mlp import ACTIVATIONS, GATED, MLP, FeedForward, gated

STATISTICS = {
    "loss": Statistic("router_loss", layers="sum", loss=True),
    "balance": Statistic("router_balance"),
    "z": Statistic("router_z"),
    "entropy": Statistic("router_entropy"),
    "max_load": Statistic("router_max_load", layers="max"),
    "dropped": Statistic("router_dropped", layers="sum", batches="sum"),
}
"""What a router reports of each batch."""


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
        check_fields(self)
        check_positive(self, ("top_k", "n_groups", "top_groups", "group_top"))
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
    the rest is dropped; None: nothing is dropped."""
    sinks: int = 0
    """Experts J of width d_ff that every token uses and that the router weighs beside the chosen ones: weights are
    renormalised over both (Inkling)."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "moe_logits": Kept("MoE: router logits", kernels=True),
        "moe_routed": Kept("MoE: output of the routed experts, weighed and added up", kernels=True),
        "moe_order": Kept("MoE: assignments sorted by expert"),
        "moe_hidden": Kept("MoE: what the routed experts' first product gives, before activation and gate"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = STATISTICS
    MIXES_TOKENS = False

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_experts", "d_ff", "d_latent", "capacity"))
        for name in ("balance_weight", "z_weight"):
            require(getattr(self, name) >= 0, f"{name} ({getattr(self, name)}) must not be negative")
        r, E = self.router, self.n_experts
        require(E % r.n_groups == 0, f"n_experts ({E}) not divisible by router.n_groups ({r.n_groups})")
        choice = E // r.n_groups * r.top_groups
        require(r.top_k <= choice, f"router.top_k ({r.top_k}) exceeds the {choice} experts to choose from")
        require(not self.shared_gate or self.shared is not None, "shared_gate needs shared experts")
        require(self.sinks >= 0, f"sinks ({self.sinks}) must not be negative")
        weighed = r.score == "sigmoid" and r.renormalise
        require(not self.sinks or weighed, f"sinks ({self.sinks}) need router.score=sigmoid and router.renormalise")
        require(not self.latent_bias or self.d_latent is not None, "latent_bias needs d_latent")

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this block cannot be built at the model width."""
        for name, part in self.parts().items():
            with within(f"{name}."):
                part.check(d_model)

    def parts(self) -> dict[str, MLP]:
        """The shared experts."""
        return {} if self.shared is None else {"shared": self.shared}

    def build(self, d_model: int, make: Make) -> "MoEFeedForward":
        """The mixer of one sublayer."""
        return make.mixer(MoEFeedForward, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Experts, their widths, and the shared ones'."""
        own = [("n_experts", self.n_experts, "experts"), ("d_ff", self.d_ff, "d_ff")]
        own.append(("d_latent", self.d_latent or d_model, "d_model"))
        return own + split_of_parts(self, d_model)

    def flops(self, d_model: int, seq_len: int) -> float:
        """Router, projections, a token's experts and the shared ones."""
        shared = sum(part.flops(d_model, seq_len) for part in self.parts().values())
        choices = self.n_experts + self.sinks + self.shared_gate
        projections = 2.0 * d_model * (choices + 2 * (self.d_latent or 0))
        width = self.router.top_k * (self.d_latent or d_model) + self.sinks * d_model
        return projections + shared + 2.0 * (3 if self.gated else 2) * width * self.d_ff

    def resolved(self, d_model: int) -> "MoE":
        """Options of the router that are not used have their defaults, renormalise_eps 1."""
        r = self.router
        eps = r.renormalise_eps if r.renormalise else 1.0
        grouped: dict[str, Any] = {} if r.n_groups > 1 else {"top_groups": 1, "group_top": 2}
        shared = None if self.shared is None else self.shared.resolved(d_model)
        return replace(self, router=replace(r, renormalise_eps=eps, **grouped), shared=shared)

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

    cache_grows = False
    __call__ = reporting

    def __init__(
        self,
        config: MoE,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the first matrices and of the last (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        out_std = init_std if out_std is None else out_std
        D, E, F, R = d_model, config.n_experts, config.d_ff, config.d_latent or d_model
        J = config.sinks
        self.router = params.matrix(rngs, (D, E + J), ("d_model", None), init_std, exact=True)
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
        of_sinks, parts = ("d_model", *names, None, "d_ff"), tuple(range(1, len(sides) + 2))
        self.sink_in = params.matrix(rngs, (D, *sides, J, F), of_sinks, init_std, fused_axes=parts) if J else None
        self.sink_out = params.matrix(rngs, (J, F, D), (None, "d_ff", "d_model"), out_std, n_in=2) if J else None
        options: dict[str, Any] = {"rngs": rngs, "init_std": init_std, "out_std": out_std, "dtype": dtype}
        self.shared = None if config.shared is None else FeedForward(config.shared, D, **options)
        self.shared_gate = params.matrix(rngs, (D, 1), ("d_model", None), init_std) if config.shared_gate else None

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D] in `dtype`, and the statistics. Padding (segment id 0) reaches no routed expert."""
        c, x_BTD = self.config, x_BTD.astype(self.dtype)
        ids = tokens.segment_ids
        real_BT = jnp.ones(x_BTD.shape[:2], bool) if ids is None else ids != 0
        with jax.named_scope("router"):
            exact = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
            logits_BTE = params.enter(exact, x_BTD.astype(jnp.float32), [self.router], sharding.STREAM)
            logits_BTE = checkpoint_name(sharding.constrain(logits_BTE, *sharding.STREAM), "moe_logits")
            bias_E = None if self.selection_bias is None else self.selection_bias[...]
            logits_BTE, sinks_BTJ = logits_BTE[..., : c.n_experts], logits_BTE[..., c.n_experts :]
            experts_BTk, weights_BTk, scores_BTE = route(c.router, logits_BTE, bias_E, sinks_BTJ)
            weights_BTk, sinks_BTJ = weights_BTk[..., : c.router.top_k], weights_BTk[..., c.router.top_k :]
        with jax.named_scope("experts"):
            y_BTD, kept_BTk = self._routed(x_BTD, experts_BTk, weights_BTk, real_BT)
        with jax.named_scope("shared"):
            y_BTD = y_BTD + self._shared(x_BTD) + self._sinks(x_BTD, sinks_BTJ)
        with jax.named_scope("statistics"):
            of_router = statistics(c, c.router.top_k, logits_BTE, scores_BTE, experts_BTk, real_BT, kept_BTk)
            return Output(y_BTD, of_router)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """The busiest expert's share over an even one, the entropy of the router, assignments that were dropped."""
        return inspected(self.mix(x_BTD, tokens).stats)

    def init_cache(self, batch: int, max_len: int) -> dict:
        """Nothing to remember."""
        return {}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """`mix`: the past does not matter."""
        ids = None if real_BT is None else real_BT.astype(jnp.int32)
        return self.mix(x_BTD, Tokens(ids)).y_BTD, cache

    def _routed(self, x_BTD, experts_BTk, weights_BTk, real_BT) -> tuple[jax.Array, jax.Array]:
        """The routed experts' output [B, T, D], and bool [B, T, k]: which assignments it has. Padding has none."""
        c, u_BTR = self.config, x_BTD
        if self.latent_in is not None:
            u_BTR = params.project(x_BTD, self.latent_in, self.latent_in_bias)
        experts_BTk = jnp.where(real_BT[..., None], experts_BTk, c.n_experts)
        w_in, w_out = (params.operand(w, u_BTR.dtype) for w in (self.w_in, self.w_out))
        activation = ACTIVATIONS[GATED.get(c.activation, c.activation)]
        sizes: dict[str, Any] = {"n_experts": c.n_experts, "d_ff": c.d_ff, "capacity": c.capacity}
        y_BTR, kept_BTk = routed_per_device(u_BTR, experts_BTk, weights_BTk, w_in, w_out, activation, **sizes)
        y_BTD = checkpoint_name(y_BTR, "moe_routed")
        if self.latent_out is not None:
            y_BTD = params.project(y_BTD, self.latent_out, self.latent_out_bias)
        return y_BTD, kept_BTk

    def _shared(self, x_BTD) -> jax.Array | float:
        if self.shared is None:
            return 0.0
        y_BTD = self.shared.mix(x_BTD, Tokens()).y_BTD
        if self.shared_gate is None:
            return y_BTD
        return y_BTD * jax.nn.sigmoid(params.project(x_BTD, self.shared_gate))

    def _sinks(self, x_BTD, weights_BTJ) -> jax.Array | float:
        """The output of the experts that the router weighs for every token."""
        if self.sink_in is None or self.sink_out is None:
            return 0.0
        h, name = params.project(x_BTD, self.sink_in), self.config.activation
        h = sharding.constrain(h, "batch", "tokens", *(None,) * (h.ndim - 3), "d_ff")
        h_BTJF = gated(h, GATED[name], 1.0) if self.config.gated else ACTIVATIONS[name](h)
        return params.leave((h_BTJF * weights_BTJ[..., None]).astype(h_BTJF.dtype), self.sink_out)


def statistics(config, top_k: int, logits_BTE, scores_BTE, experts_BTk, real_BT, kept_BTk) -> dict[str, jax.Array]:
    """STATISTICS of a mixture, over the real tokens. config: with the weights of its losses."""
    n_choices = logits_BTE.shape[-1]
    real_BT1 = real_BT[..., None].astype(jnp.float32)
    n_real = jnp.maximum(real_BT1.sum(), 1.0)
    mean = lambda a_BTX: jnp.sum(a_BTX * real_BT1, axis=(0, 1)) / n_real
    p_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    is_it_BTkE = experts_BTk[..., None] == jnp.arange(n_choices)[None, None, None]
    chosen_BTE = jnp.sum(is_it_BTkE, axis=2, dtype=jnp.float32)
    share_E = mean(chosen_BTE) / top_k
    balance = n_choices * jnp.sum(share_E * mean(p_BTE))
    z = mean(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)))[0]
    entropy = mean(-jnp.sum(jax.scipy.special.xlogy(p_BTE, p_BTE), axis=-1, keepdims=True))[0]
    dropped = jnp.sum((~kept_BTk).astype(jnp.float32) * real_BT1)
    loss = config.balance_weight * balance + config.z_weight * z
    max_load = share_E.max() * n_choices
    return dict(zip(STATISTICS, (loss, balance, z, entropy, max_load, dropped), strict=True))


def inspected(stats: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What `inspect` of a mixture says, of its statistics."""
    names = {"load_max": "max_load", "router_entropy_mean": "entropy", "dropped_sum": "dropped"}
    return {name: stats[key] for name, key in names.items()}


def route(
    router: Router, logits_BTE: jax.Array, bias_E: jax.Array | None = None, sinks_BTJ: jax.Array | None = None
) -> tuple:
    """(chosen experts [B, T, k], their weights [B, T, k], scores [B, T, E]), the last two float32.

    bias_E: added to the scores (of softmax_after: to the logits) for the choice alone. sinks_BTJ: logits of experts
    that are used anyway, whose weights stand behind the others, [B, T, k + J].
    """
    logits_BTE = logits_BTE.astype(jnp.float32)
    scores_BTE = jax.nn.sigmoid(logits_BTE) if router.score == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)
    choice_BTE = jax.lax.stop_gradient(logits_BTE if router.score == "softmax_after" else scores_BTE)
    choice_BTE = choice_BTE if bias_E is None else choice_BTE + jax.lax.stop_gradient(bias_E)[None, None]
    if router.n_groups > 1:
        choice_BTE = _in_best_groups(router, choice_BTE)
    experts_BTk = jax.lax.top_k(choice_BTE, router.top_k)[1]
    if router.score == "softmax_after":
        weights_BTk = jax.nn.softmax(jnp.take_along_axis(logits_BTE, experts_BTk, axis=-1), axis=-1)
    else:
        weights_BTk = jnp.take_along_axis(scores_BTE, experts_BTk, axis=-1)
    if sinks_BTJ is not None and sinks_BTJ.shape[-1]:
        sinks_BTJ = jax.nn.sigmoid(sinks_BTJ.astype(jnp.float32))
        weights_BTk = jnp.concatenate([weights_BTk, sinks_BTJ], axis=-1)
    if router.renormalise:
        weights_BTk /= weights_BTk.sum(axis=-1, keepdims=True) + router.renormalise_eps
    return experts_BTk, weights_BTk * router.scaling, scores_BTE


def _in_best_groups(router: Router, choice_BTE):
    """Scores, those outside of the best groups -inf."""
    grouped = choice_BTE.reshape(*choice_BTE.shape[:-1], router.n_groups, -1)
    best = jax.lax.top_k(grouped, min(router.group_top, grouped.shape[-1]))[0].sum(axis=-1)
    groups = jax.lax.top_k(best, router.top_groups)[1]
    allowed = jnp.any(groups[..., None] == jnp.arange(router.n_groups)[None, None, None], axis=-2)
    return jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(choice_BTE.shape)
