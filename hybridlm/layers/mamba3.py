# SPDX-License-Identifier: Apache-2.0
"""Mamba-3 mixer (2025, openreview.net/forum?id=HwCvaJOiCj; state-spaces/mamba, modules/mamba3.py).

Axis letters: B batch, T tokens, D model, H heads, P head width, G state groups, N state size, R ranks (inputs and
outputs a head), S turned pairs of channels.
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
from hybridlm.layers import inspection, ops, params, recurrent
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.mamba2 import init_dt_bias
from hybridlm.layers.norm import RMSNorm
from pallas_kernels.ops.mamba3.api import decay_rates


@dataclass(frozen=True)
class Mamba3:
    """Mamba-3 mixer: projections, norms of B and C, trapezoidal scan with a rotated state, gate, output projection."""

    d_state: int = 128
    """State size N of a head's channel."""
    d_head: int = 64
    """Head width P."""
    expand: float = 2.0
    """Inner width over model width."""
    n_groups: int = 1
    """Groups G of heads that share B and C."""
    rank: int | None = None
    """Ranks R, inputs and outputs of a head (MIMO); None: one of each (SISO)."""
    rope_fraction: float = 0.5
    """Share of the state's channels that are turned."""
    rotary_pairs: Literal["adjacent", "half"] | None = None
    """Channels that are turned together; None: adjacent, with ranks half, as the published kernels."""
    A_activation: Literal["heavy_tail", "softplus"] = "heavy_tail"
    """Of -A's projection: that of the published code since June 2026, or of release 2.3.2."""
    A_floor: float = 1e-4
    """-A is at least this."""
    out_norm: bool = False
    """RMS norm of each head's output, before the gate."""
    dt_min: float = 1e-3
    """Smallest step size at initialisation."""
    dt_max: float = 0.1
    """Largest step size at initialisation."""
    dt_init_floor: float = 1e-4
    """Lower clamp of the step size at initialisation."""
    chunk: int | None = None
    """Tokens a chunk of the op; None: as it chooses."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "mamba3_zx": Kept("Mamba-3: z and x", kernels=True),
        "mamba3_BC": Kept("Mamba-3: B and C before their norms", kernels=True),
        "mamba3_dt": Kept("Mamba-3: what dt, A and the trapezoid's share are made of", kernels=True),
        "mamba3_angles": Kept("Mamba-3: what angles are made of", kernels=True),
        "mamba3_scan": Kept("Mamba-3: the scan's output, gated", kernels=True),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("d_state", "d_head", "n_groups", "rank", "A_floor", "chunk"))
        require(0 < self.rope_fraction <= 1, f"rope_fraction ({self.rope_fraction}) must be in (0, 1]")
        require(self.n_angles > 0, f"rope_fraction ({self.rope_fraction}) of d_state ({self.d_state}) turns no pair")
        require(
            0 < self.dt_min <= self.dt_max,
            f"dt_min ({self.dt_min}) must be positive and at most dt_max ({self.dt_max})",
        )

    @property
    def n_angles(self) -> int:
        """Turned pairs S."""
        return int(self.d_state * self.rope_fraction) // 2

    def heads(self, d_model: int) -> int:
        """Heads H for a model width; ConfigError where the widths do not divide."""
        d_inner = self.expand * d_model
        require(
            d_inner == int(d_inner) and int(d_inner) % self.d_head == 0,
            f"expand * d_model ({d_inner:g}) not divisible by d_head ({self.d_head})",
        )
        n_heads = int(d_inner) // self.d_head
        require(n_heads % self.n_groups == 0, f"heads ({n_heads}) not divisible by n_groups ({self.n_groups})")
        return n_heads

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this mixer cannot be built at the model width."""
        self.heads(d_model)

    def build(self, d_model: int, make: Make) -> "Mamba3Mixer":
        """The mixer of one sublayer."""
        return make.mixer(Mamba3Mixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads; state groups need not divide."""
        return [("heads", self.heads(d_model), "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections and scan."""
        H, P, R = self.heads(d_model), self.d_head, self.rank or 1
        projections = 3 * H * P + 2 * R * self.n_groups * self.d_state + 3 * H + self.n_angles
        return 2.0 * d_model * projections + scan_flops(H, P, self.d_state, R, seq_len)

    def resolved(self, d_model: int) -> "Mamba3":
        """With the pairs."""
        return replace(self, rotary_pairs=self.rotary_pairs or ("half" if self.rank else "adjacent"))


SCAN_CHUNK = 128
"""Chunk length Q at which the scan's FLOPs are counted, whatever chunk and implementation run."""


def scan_flops(n_heads: int, d_head: int, d_state: int, rank: int, seq_len: int) -> float:
    """Forward FLOPs per token of the chunked scan: pairs of ranks within the chunk, their causal half, H R^2 (N + P)
    (Q + 1); what each rank writes to the state and reads from it, 4 H P N R."""
    within = (min(SCAN_CHUNK, seq_len) + 1) * n_heads * rank**2 * (d_state + d_head)
    return within + 4.0 * n_heads * d_head * d_state * rank


class Mamba3Mixer(nnx.Module):
    """Mamba-3: z, x, B, C, dt, A, trapezoid's share, angles = projections; norms of B and C; the scan; projection."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: Mamba3,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, P, G, N, R = d_model, config.heads(d_model), config.d_head, config.n_groups, config.d_state, config.rank
        heads, ranks, groups = ("heads", "d_head"), () if R is None else (R,), ("groups", "d_state")
        self.in_zx = params.matrix(rngs, (D, 2, H, P), ("d_model", None, *heads), init_std, fused_axes=(1,))
        BC_axes = ("d_model", None, *(None,) * len(ranks), *groups)
        self.in_BC = params.matrix(rngs, (D, 2, *ranks, G, N), BC_axes, init_std, fused_axes=(1,))
        self.in_dt = params.matrix(rngs, (D, 3, H), ("d_model", None, "heads"), init_std, fused_axes=(1,))
        self.in_angles = params.matrix(rngs, (D, config.n_angles), ("d_model", None), init_std)
        self.dt_bias = params.make(init_dt_bias(params.uniforms(rngs, (H,))[0], config), ("heads",), "recurrence")
        self.B_norm, self.C_norm = RMSNorm(N, 1e-5, axis="d_state"), RMSNorm(N, 1e-5, axis="d_state")
        bias_axes = ("heads", *(None,) * len(ranks), "d_state")
        self.B_bias, self.C_bias = (params.ones((H, *ranks, N), bias_axes, "recurrence") for _ in range(2))
        self.D = params.ones((H,), ("heads",), "recurrence")
        mimo = lambda value: params.make(jnp.full((H, R, P), value), ("heads", None, "d_head"), "recurrence")
        self.mimo_v: Any
        self.mimo_z: Any
        self.mimo_o: Any
        self.mimo_v, self.mimo_z, self.mimo_o = (mimo(v) for v in (1 / R, 1.0, 1 / R)) if R else (None,) * 3
        self.norm = params.ones((H, P), heads, "norm") if config.out_norm else None
        self.out = params.matrix(rngs, (H, P, D), (*heads, "d_model"), init_std if out_std is None else out_std, n_in=2)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Step sizes, decays of the state a token, and the norm of a row's last state."""
        dt_BTH, g_BTH, _ = self._steps(self._project(x_BTD.astype(self.dtype))[3])
        numbers = inspection.span("dt", dt_BTH, tokens.segment_ids) | inspection.decays(g_BTH, tokens)
        return numbers | recurrent.state_norm(self, x_BTD, tokens, "ssm")

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Sum of angles, state, and the last key and value, all zero, float32."""
        c, (H, P) = self.config, self.out.shape[-3:-1]
        ranks = () if c.rank is None else (c.rank,)
        shapes = {"angle": (c.n_angles,), "ssm": (P, c.d_state), "k": (*ranks, c.d_state), "v": (*ranks, P)}
        axes = ("batch", "heads")
        zeros = {name: layout.zeros((batch, H, *shape), jnp.float32, axes) for name, shape in shapes.items()}
        return zeros | {"ssm": layout.state((batch, H, *shapes["ssm"]), axes)}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens from the cache `old` (None: from nothing, and no new one is made)."""
        c = self.config
        z, x, BC, dt_BTcH, angles_BTHS = self._project(x_BTD.astype(self.dtype))
        with jax.named_scope("select"):
            dt, adt, trap = self._steps(dt_BTcH)
            B, C = self.B_norm(BC[:, :, 0]), self.C_norm(BC[:, :, 1])
        with jax.named_scope("scan"):
            weights: dict[str, Any] = {
                "q_bias": self.C_bias,
                "k_bias": self.B_bias,
                "D": self.D,
                "norm_weight": self.norm,
            }
            weights |= {"mimo_v": self.mimo_v, "mimo_z": self.mimo_z, "mimo_o": self.mimo_o}
            weights = {name: None if weight is None else weight[...] for name, weight in weights.items()}
            y_BTHP, new = ops.mamba3(
                (C, B, x, adt, dt, trap, angles_BTHS, z), weights,
                segment_ids=tokens.segment_ids, initial=old, chunk=c.chunk,
                rotary_pairs=c.rotary_pairs or ("half" if c.rank else "adjacent"),
            )  # fmt: skip
            y_BTHP = checkpoint_name(y_BTHP, "mamba3_scan")
        with jax.named_scope("output"):
            y_BTHP = sharding.constrain(y_BTHP.astype(self.dtype), "batch", "tokens", "heads", None)
            return params.leave(y_BTHP, self.out), {} if old is None or new is None else new

    def _steps(self, dt_BTcH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Step sizes, log decays, and what the trapezoid's share is made of, [B, T, H] in float32."""
        raw_dt, raw_A, trap = (dt_BTcH[:, :, i].astype(jnp.float32) for i in range(3))
        dt = jax.nn.softplus(raw_dt + self.dt_bias[...][None, None])
        return dt, dt * decay_rates(raw_A, self.config.A_activation, self.config.A_floor), trap

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple[jax.Array, ...]:
        """z and x [B, T, H, P], B and C [B, T, 2, (R,) G, N], what dt, A and the trapezoid's share are made of
        [B, T, 3, H], angles [B, T, H, S]."""
        weights = (self.in_zx, self.in_BC, self.in_dt, self.in_angles)
        zx, BC, dt, angles = params.projections(x_BTD, *((weight, None) for weight in weights))
        ranks = () if self.config.rank is None else (None,)
        zx = checkpoint_name(sharding.constrain(zx, "batch", "tokens", None, "heads", None), "mamba3_zx")
        BC = checkpoint_name(sharding.constrain(BC, "batch", "tokens", None, *ranks, "groups", None), "mamba3_BC")
        dt = checkpoint_name(sharding.constrain(dt, "batch", "tokens", None, "heads"), "mamba3_dt")
        angles = checkpoint_name(sharding.constrain(angles, "batch", "tokens", None), "mamba3_angles")
        angles = jnp.broadcast_to(angles[:, :, None].astype(jnp.float32), (*dt.shape[:2], dt.shape[3], angles.shape[2]))
        return zx[:, :, 0], zx[:, :, 1], BC, dt, sharding.constrain(angles, "batch", "tokens", "heads", None)
