# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a decay: one block for what differs in the decay, the features and the output.

Katharopoulos et al. 2020 (arXiv:2006.16236); RetNet, Sun et al. 2023 (arXiv:2307.08621); lightning attention, Qin et
al. 2024 (arXiv:2401.04658), as in MiniMax-01 (arXiv:2501.08313); GLA, Yang et al. 2023 (arXiv:2312.06635); Based, Arora
et al. 2024 (arXiv:2402.18668); HGRN2, Qin et al. 2024 (arXiv:2404.07904). docs/compositions.md has the options of each.

Axis letters: B batch, T tokens, D model, H heads, N key width, P value width, R low rank.
"""

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
from hybridlm.layers import inspection, ops, params, recurrent
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.mlp import ACTIVATIONS
from hybridlm.layers.norm import GATES, gated_rms_norm, rms_normalise
from hybridlm.layers.rope import Rope, rotate
from hybridlm.layers.segments import positions_within


@dataclass(frozen=True)
class FixedDecay:
    """A constant for each head: retnet, the factors 1 - 2^(-5 - h); lightning, exp(-2^(-8 (h + 1) / H) s), where s goes
    from 1 in the model's first layer to 1e-5 in its last. The latter are kept as parameters that are not trained."""

    kind: Literal["retnet", "lightning"] = "retnet"
    """Which constants."""


@dataclass(frozen=True)
class HeadDecay:
    """exp(log sigmoid(w . x + b) / divisor), of each token for each head (simple GLA)."""

    divisor: float = 16.0
    """Divides the logarithm: decays start near 1."""

    def __post_init__(self):
        check_fields(self)
        require(self.divisor > 0, f"divisor ({self.divisor}) must be positive")


@dataclass(frozen=True)
class ChannelDecay:
    """The same for each key channel, by a matrix of low rank (GLA)."""

    rank: int = 16
    """Rank R."""
    divisor: float = 16.0
    """Divides the logarithm: decays start near 1."""

    def __post_init__(self):
        check_fields(self)
        require(self.rank > 0, f"rank ({self.rank}) must be positive")
        require(self.divisor > 0, f"divisor ({self.divisor}) must be positive")


@dataclass(frozen=True)
class ForgetDecay:
    """f = b + (1 - b) sigmoid(w . x) for each key channel, and 1 - f is the key (HGRN2)."""

    lower_bound: bool = True
    """A learned b, which starts at the layer's index over the number of layers; else 0."""


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm of what is read from the state."""

    per_head: bool = True
    """Each head by itself; else all of them together."""
    weight: Literal["head", "channel"] | None = "head"
    """One weight for each channel of a head, the same for all heads; for each channel of all; none."""
    eps: float = 1e-5
    """Added to the mean square."""


Decay = FixedDecay | HeadDecay | ChannelDecay | ForgetDecay
FEATURES = ACTIVATIONS | {"elu": lambda x: jax.nn.elu(x) + 1}
"""Of queries and keys; the op has the Taylor features itself."""


@dataclass(frozen=True)
class LinearAttention:
    """S_t = decay_t S_(t-1) + k_t v_t^T, y_t = S_t^T (scale q_t) for each head; then norm, gate, output projection."""

    n_heads: int = 4
    """Heads H."""
    d_key: int = 64
    """Width N of a head's queries and keys."""
    d_head: int = 128
    """Width P of a head's values."""
    decay: Decay | None = FixedDecay()
    """How the state fades; None: never."""
    feature_map: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "elu", "taylor"] | None = None
    """Of queries and keys. elu: elu(x) + 1; taylor: weights 1 + s + s^2 / 2, s = scale q . k, for decays by head."""
    value_activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] | None = None
    """Of the values."""
    normalizer: bool = False
    """Divide by what the same sum gives for values of 1, plus normalizer_eps."""
    normalizer_eps: float = 1e-6
    """Added to the divisor."""
    rope: Rope | None = None
    """Rotation of queries and keys by their position; None: no positions."""
    scale: float | None = None
    """Multiplier of the queries; None: d_key ** -0.5."""
    norm: HeadNorm | None = HeadNorm()
    """Of the heads' outputs, before the gate; None: none."""
    gate: Literal["silu", "sigmoid"] | None = "silu"
    """Output gate from the layer's input, for each channel; None: none."""
    chunk: int | None = None
    """Tokens a chunk of the op; None: as it chooses."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "linear_q": Kept("linear attention: queries, before features and rotation", kernels=True),
        "linear_k": Kept("linear attention: keys, or what the forget gate is made of", kernels=True),
        "linear_v": Kept("linear attention: values before their activation", kernels=True),
        "linear_gate": Kept("linear attention: pre-activation of the output gate", kernels=True),
        "linear_decay": Kept("linear attention: projection that the decay is made of", kernels=True),
        "linear_read": Kept("linear attention: what is read from the state", kernels=True),
        "mamba_root": Kept("gated norm: reciprocal root mean squares, one number a token and group", kernels=True),
        "linear_norm": Kept("linear attention: normed and gated input of the output projection"),
    }  # fmt: skip
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_heads", "d_key", "d_head", "scale", "chunk"))
        by_channel = isinstance(self.decay, ChannelDecay | ForgetDecay)
        require(
            not (self.feature_map == "taylor" and by_channel),
            f"feature_map ('taylor') has other channels than decay ({type(self.decay).__name__}): decay by head or not",
        )
        if self.rope is not None:
            self.rope.d_rotated(self.d_key)

    def check(self, d_model: int) -> None:
        """Linear attention fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "LinearAttentionMixer":
        """The mixer of one sublayer."""
        return make.mixer(LinearAttentionMixer, self, d_model, layer=make.layer)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections and scan."""
        d_keys, d_values = self.n_heads * self.d_key, self.n_heads * self.d_head
        entries = d_model * (2 * d_keys + (2 if self.gate is None else 3) * d_values)
        match self.decay:
            case HeadDecay():
                entries += d_model * self.n_heads
            case ChannelDecay(rank=rank):
                entries += rank * (d_model + d_keys)
        n_features = 1 + self.d_key + self.d_key**2 if self.feature_map == "taylor" else self.d_key
        return 2.0 * entries + scan_flops(self.n_heads, self.d_key, self.d_head, seq_len, n_features)

    def resolved(self, d_model: int) -> "LinearAttention":
        """With the scale; normalizer_eps is 1 where it is not used."""
        scale = self.d_key**-0.5 if self.scale is None else self.scale
        return replace(self, scale=scale, normalizer_eps=self.normalizer_eps if self.normalizer else 1.0)


SCAN_CHUNK = 128
"""Chunk length Q at which FLOPs of linear attention are counted, whatever chunk and implementation run."""


def scan_flops(n_heads: int, d_key: int, d_head: int, seq_len: int, n_features: int | None = None) -> float:
    """Forward FLOPs per token of chunked linear attention: pairs within the chunk, its causal half, H (N + P) (Q + 1);
    its state and what is read from the one that enters, 4 H P times the features (None: the key width)."""
    within = (min(SCAN_CHUNK, seq_len) + 1) * n_heads * (d_key + d_head)
    return within + 4.0 * n_heads * d_head * (n_features or d_key)


class LinearAttentionMixer(nnx.Module):
    """Projections; features and rotation of queries and keys; the scan; norm, gate, output projection."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: LinearAttention,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        layer: tuple = (0, 1),
    ):
        """init_std, out_std: standard deviations of the input projections and of the output one (None: init_std).
        layer: as of `Make`."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, N, P = d_model, config.n_heads, config.d_key, config.d_head
        key, value = ("heads", "d_head"), ("heads", "d_head")
        self.w_q = params.matrix(rngs, (D, H, N), ("d_model", *key), init_std)
        self.w_k = params.matrix(rngs, (D, H, N), ("d_model", *key), init_std)
        self.w_v = params.matrix(rngs, (D, H, P), ("d_model", *value), init_std)
        gated = config.gate is not None
        self.w_gate = params.matrix(rngs, (D, H, P), ("d_model", *value), init_std) if gated else None
        of_decay = decay_parameters(config, D, rngs, init_std, layer)
        self.w_decay, self.w_decay_up = of_decay.get("w_decay"), of_decay.get("w_decay_up")
        self.decay_bias: Any
        self.slopes: Any
        self.decay_bias, self.slopes = of_decay.get("decay_bias"), of_decay.get("slopes")
        self.lower_bound = of_decay.get("lower_bound")
        shape = {"head": (P,), "channel": (H, P), None: None}[config.norm.weight if config.norm else None]
        self.norm = None if shape is None else params.ones(shape, value[-len(shape) :], "norm")
        out_std = init_std if out_std is None else out_std
        self.w_o = params.matrix(rngs, (H, P, D), (*value, "d_model"), out_std, n_in=2)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Decays of the state a token, where it has some, and the norm of a row's last state."""
        _, k, v, _, raw_decay = self._project(x_BTD.astype(self.dtype))
        g, _ = self._decay(raw_decay, k)
        state = recurrent.state_norm(self, x_BTD, tokens)
        if g is None:
            return state
        g = jnp.broadcast_to(g[None, None], v.shape[:3]) if g.ndim == 1 else g
        return inspection.decays(g, tokens) | state

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero state (float32); with a normaliser it has a column more."""
        c = self.config
        n_features = 1 + c.d_key + c.d_key**2 if c.feature_map == "taylor" else c.d_key
        return {"state": layout.state((batch, c.n_heads, n_features, c.d_head + c.normalizer), ("batch", "heads"))}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens from the cache `old` (None: from nothing, and no new one is made)."""
        c, ids = self.config, tokens.segment_ids
        q, k, v, gate, raw_decay = self._project(x_BTD.astype(self.dtype))
        g, k = self._decay(raw_decay, k)
        if c.rope is not None:
            positions = positions_within(ids, v.shape[:2]) if tokens.positions is None else tokens.positions
            q, k = rotate(q, positions, c.rope), rotate(k, positions, c.rope)
        with jax.named_scope("scan"):
            y_BTHP, state = ops.linear_attention(
                q, k, v, g, segment_ids=ids, initial_state=None if old is None else old["state"], scale=c.scale,
                normalizer=c.normalizer, eps=c.normalizer_eps, chunk=c.chunk,
                feature_map="taylor" if c.feature_map == "taylor" else None,
            )  # fmt: skip
            y_BTHP = checkpoint_name(y_BTHP, "linear_read")
        return self._output(y_BTHP, gate), {} if old is None else {"state": state}

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple:
        """Queries and keys [B, T, H, N] and values [B, T, H, P] with their features, the gate's pre-activation and what
        the decay is made of, each None where there is none."""
        c, heads = self.config, ("batch", "tokens", "heads", None)
        parts = {"q": self.w_q, "k": self.w_k, "v": self.w_v, "gate": self.w_gate, "decay": self.w_decay}
        parts = {name: weight for name, weight in parts.items() if weight is not None}
        found = dict(zip(parts, params.projections(x_BTD, *((weight, None) for weight in parts.values())), strict=True))
        if self.w_decay_up is not None:
            found["decay"] = params.project(found["decay"], self.w_decay_up)
        found = {
            name: checkpoint_name(sharding.constrain(a, *heads[: a.ndim]), f"linear_{name}")
            for name, a in found.items()
        }
        q, k, v = (found[name] for name in ("q", "k", "v"))
        if c.feature_map in FEATURES:
            q = FEATURES[c.feature_map](q)
            k = k if isinstance(c.decay, ForgetDecay) else FEATURES[c.feature_map](k)
        v = v if c.value_activation is None else ACTIVATIONS[c.value_activation](v)
        return q, k, v, found.get("gate"), found.get("decay")

    @jax.named_scope("decay")
    def _decay(self, raw, k_BTHN) -> tuple[jax.Array | None, jax.Array]:
        """The log decays as the op takes them, float32, and the keys. raw: what they are made of, or None."""
        match self.config.decay:
            case FixedDecay(kind="retnet"):
                return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.config.n_heads)))), k_BTHN
            case FixedDecay():
                return -jax.lax.stop_gradient(self.slopes[...]), k_BTHN
            case HeadDecay(divisor=divisor) | ChannelDecay(divisor=divisor):
                bias = params.use(self.decay_bias, jnp.float32)[None, None]
                return jax.nn.log_sigmoid(raw.astype(jnp.float32) + bias) / divisor, k_BTHN
            case ForgetDecay():
                f = k_BTHN.astype(jnp.float32)
                if self.lower_bound is None:
                    return jax.nn.log_sigmoid(f), jax.nn.sigmoid(-f).astype(k_BTHN.dtype)
                bound = params.use(self.lower_bound, jnp.float32)[None, None]
                log_rest = jax.nn.log_sigmoid(-bound)  # of 1 - b
                g = jnp.logaddexp(jax.nn.log_sigmoid(bound), log_rest + jax.nn.log_sigmoid(f))
                return g, jnp.exp(log_rest + jax.nn.log_sigmoid(-f)).astype(k_BTHN.dtype)
        return None, k_BTHN

    def _output(self, y_BTHP: jax.Array, gate_BTHP: jax.Array | None) -> jax.Array:
        """Norm and gate in float32, output projection."""
        c = self.config
        with jax.named_scope("gate_norm"):
            weight = None if self.norm is None else params.use(self.norm, jnp.float32)
            y = normed_heads(y_BTHP, gate_BTHP, weight, c.norm, c.gate, self.dtype)
            y_BTHP = sharding.constrain(y, "batch", "tokens", "heads", None)
        with jax.named_scope("output"):
            return params.leave(y_BTHP, self.w_o, kept="linear_norm")


def decay_parameters(config: LinearAttention, d_model: int, rngs, std: float, layer: tuple) -> dict[str, nnx.Param]:
    """What the kind of decay needs, by its name in the mixer."""
    D, H, N, key = d_model, config.n_heads, config.d_key, ("heads", "d_head")
    match config.decay:
        case FixedDecay(kind="lightning"):
            return {"slopes": params.make(lightning_slopes(H, layer), ("heads",), "recurrence")}
        case HeadDecay():
            weight = params.matrix(rngs, (D, H), ("d_model", "heads"), std)
            return {"w_decay": weight, "decay_bias": params.zeros((H,), ("heads",), "bias")}
        case ChannelDecay(rank=R):
            down = params.matrix(rngs, (D, R), ("d_model", None), std)
            up = params.matrix(rngs, (R, H, N), (None, *key), std)
            return {"w_decay": down, "w_decay_up": up, "decay_bias": params.zeros((H, N), key, "bias")}
        case ForgetDecay(lower_bound=True):
            return {"lower_bound": params.make(jnp.broadcast_to(first_bound(layer), (H, N)), key, "recurrence")}
    return {}


def normed_heads(y_BTHP, gate_BTHP, weight, norm: HeadNorm | None, gate: str | None, dtype) -> jax.Array:
    """norm(y) * weight * gate(pre-activation), in `dtype`. weight: [P], [H, P], or None for 1."""
    shape = y_BTHP.shape[2:]
    n_groups = 1 if norm is None or not norm.per_head else shape[0]
    weight = jnp.ones(shape[1:], jnp.float32) if weight is None else weight
    if norm is not None and gate is not None:
        return gated_rms_norm(y_BTHP, gate_BTHP, weight, norm.eps, n_groups, True, dtype, gate)
    y = y_BTHP.astype(jnp.float32)
    if norm is not None:
        weight = jnp.broadcast_to(weight, shape)[None, None]
        y = rms_normalise(y.reshape(*y.shape[:2], n_groups, -1), norm.eps).reshape(y.shape) * weight
    return (y if gate is None else y * GATES[gate](gate_BTHP.astype(jnp.float32))).astype(dtype)


def lightning_slopes(n_heads: int, layer: tuple) -> jax.Array:
    """Minus a layer's log decays [H], 2^(-8 (h + 1) / H) (1 - layer / (layers - 1 + 1e-5) + 1e-5), as in MiniMax-01."""
    rates_H = 2.0 ** (-8.0 * (1 + np.arange(n_heads)) / n_heads)
    return params.by_layer(layer, lambda index, count: rates_H * (1 - index / (count - 1 + 1e-5) + 1e-5))


def first_bound(layer: tuple) -> jax.Array:
    """What a learned lower bound starts as, before its sigmoid: the layer's index over the number of layers, where the
    published sums of a softmax over layers start; of the first layer, 1e-3."""

    def bound(index: int, count: int) -> np.ndarray:
        share = max(index / count, 1e-3)
        return np.log(share / (1 - share))

    return params.by_layer(layer, bound)
