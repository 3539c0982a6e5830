# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 mixer (Dao & Gu 2024, "Transformers are SSMs", section 7).

Axis letters: B batch, T tokens, D model, H heads, P head width, G state groups, N state size, W convolution window.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import exchange, sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, one_row, ops, params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.norm import gated_rms_norm
from hybridlm.layers.quantized import dot, dot_all, dot_parts
from pallas_kernels import one_token


@dataclass(frozen=True)
class GatedNorm:
    """RMS norm of the scan's output with the gate z: norm(y * silu(z)), or norm(y) * silu(z) with `before_gate`."""

    before_gate: bool = False
    """Normalise first, gate after."""
    n_groups: int | None = None
    """Channels are normalised in this many groups; None: the mixer's n_groups."""
    eps: float = 1e-5
    """Added to the mean square."""

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2 mixer: input projection, causal convolution, selective state space, gated norm, output projection."""

    d_state: int = 128
    """State size N of a head's channel."""
    d_head: int = 64
    """Head width P."""
    n_heads: int | None = None
    """Heads H; None: expand * d_model / d_head."""
    expand: float = 2.0
    """Inner width over model width where n_heads is None."""
    n_groups: int = 1
    """Groups G of heads that share B and C."""
    d_conv: int = 4
    """Window W of the causal convolution over x, B and C."""
    conv_bias: bool = True
    """Bias of the convolution."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    """Behind the convolution; the gate is always a silu."""
    proj_bias: bool = False
    """Bias of the input projection."""
    out_bias: bool | None = None
    """Bias of the output projection; None: where the input projection has one."""
    per_channel_D: bool = False
    """Skip weight D per channel [H, P] instead of per head [H]."""
    gated_norm: GatedNorm | None = GatedNorm()
    """Gated RMS norm; None: y * silu(z) alone."""
    dt_min: float = 1e-3
    """Smallest step size at initialisation."""
    dt_max: float = 0.1
    """Largest step size at initialisation."""
    dt_init_floor: float = 1e-4
    """Lower clamp of the step size at initialisation."""
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    """Clamp of dt after softplus, in training and decoding alike."""
    A_init: tuple[float, float] = (1.0, 16.0)
    """-A is drawn uniformly from this range."""
    multipliers: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    """Multiply the results z, x, B, C and dt of the input projection, biases included."""
    chunk: int | None = None
    """Chunk length of the scan; None: the op chooses. Results do not depend on it beyond rounding."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "mamba_zx": Kept("Mamba-2: gate and inner input, before the convolution", kernels=True),
        "mamba_BC": Kept("Mamba-2: B and C, before the convolution", kernels=True),
        "mamba_dt": Kept("Mamba-2: step sizes, before bias and softplus", kernels=True),
        "mamba_conv": Kept("Mamba-2: x, B and C after convolution and SiLU"),
        "mamba_ssd": Kept("Mamba-2: output of the state space model", kernels=True),
        "ssd_states": Kept(
            "Mamba-2: states within the row from which the backward of the state space model starts", kernels=True
        ),
        "mamba_root": Kept(
            "Mamba-2: inverse root mean squares of the gated norm, one number a token and group", kernels=True
        ),
        "mamba_norm": Kept("Mamba-2: gated and normed input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("d_state", "d_head", "n_groups", "d_conv"))
        require(self.n_heads is None or self.n_heads > 0, f"n_heads ({self.n_heads}) must be positive")
        require(self.chunk is None or self.chunk > 0, f"chunk ({self.chunk}) must be positive")
        require(
            0 < self.dt_min <= self.dt_max,
            f"dt_min ({self.dt_min}) must be positive and at most dt_max ({self.dt_max})",
        )
        low, high = self.dt_limit
        require(0 <= low < high, f"dt_limit ({low}, {high}) must satisfy 0 <= low < high")
        low, high = self.A_init
        require(0 < low <= high, f"A_init ({low}, {high}) must satisfy 0 < low <= high")

    def heads(self, d_model: int) -> int:
        """Heads H for a model width; ConfigError where the widths do not divide."""
        if self.n_heads is not None:
            n_heads = self.n_heads
        else:
            d_inner = self.expand * d_model
            require(
                d_inner == int(d_inner) and int(d_inner) % self.d_head == 0,
                f"expand * d_model ({d_inner:g}) not divisible by d_head ({self.d_head})",
            )
            n_heads = int(d_inner) // self.d_head
        require(n_heads % self.n_groups == 0, f"n_heads ({n_heads}) not divisible by n_groups ({self.n_groups})")
        if self.gated_norm is not None and self.gated_norm.n_groups is not None:
            groups = self.gated_norm.n_groups
            require(
                groups > 0 and n_heads * self.d_head % groups == 0,
                f"gated_norm.n_groups ({groups}) does not divide the inner width ({n_heads * self.d_head})",
            )
        return n_heads

    def check(self, d_model: int) -> None:
        """Raises ConfigError where this mixer cannot be built at the model width."""
        self.heads(d_model)

    def build(self, d_model: int, make: Make) -> "Mamba2Mixer":
        """The mixer of one sublayer."""
        return make.mixer(Mamba2Mixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads; state groups need not divide."""
        return [("n_heads", self.heads(d_model), "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, convolution and scan."""
        n_heads = self.heads(d_model)
        d_inner, d_bc = n_heads * self.d_head, 2 * self.n_groups * self.d_state
        projections = 2.0 * d_model * (2 * d_inner + d_bc + n_heads) + 2.0 * d_inner * d_model
        conv = 2.0 * self.d_conv * (d_inner + d_bc)
        return projections + conv + ssd_flops(n_heads, self.d_head, self.n_groups, self.d_state, seq_len)

    def resolved(self, d_model: int) -> "Mamba2":
        """With the number of heads, of the norm's groups, and the output's bias; expand is 1, as it is not used."""
        norm = self.gated_norm
        if norm is not None and norm.n_groups is None:
            norm = replace(norm, n_groups=self.n_groups)
        out_bias = self.proj_bias if self.out_bias is None else self.out_bias
        return replace(self, n_heads=self.heads(d_model), expand=1.0, gated_norm=norm, out_bias=out_bias)


SSD_CHUNK = 128
"""Chunk length Q at which the scan's FLOPs are counted, whatever chunk and implementation run."""


def ssd_flops(n_heads: int, d_head: int, n_groups: int, d_state: int, seq_len: int) -> float:
    """Forward FLOPs per token of the chunked scan (Dao & Gu 2024, section 6).

    | product, per token | FLOPs |
    | --- | --- |
    | C B^T within the chunk, causal half | G N (Q + 1) |
    | (C B^T * decay) x within the chunk, causal half | H P (Q + 1) |
    | state of the chunk, B^T x | 2 H P N |
    | output of the incoming state, C S | 2 H P N |
    """
    chunk = min(SSD_CHUNK, seq_len)
    within = (chunk + 1) * (n_groups * d_state + n_heads * d_head)
    return within + 4.0 * n_heads * d_head * d_state


class Mamba2Mixer(nnx.Module):
    """Mamba-2: z, x, B, C, dt = projections; convolution and SiLU over x, B, C; ssd; norm with the gate z; projection.

    The published fused input projection and convolution are stored by head and by group, so that tensor parallelism can
    split them. Products and convolutions are taken apart, too: each result is an array of its own, which the kernels
    behind it read as it is.
    """

    def __init__(
        self,
        config: Mamba2,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, P, G, N, W = d_model, config.heads(d_model), config.d_head, config.n_groups, config.d_state, config.d_conv
        out_std = init_std if out_std is None else out_std
        heads, channels, BC = ("heads",), ("heads", "d_head"), (None, "groups", "d_state")
        zx = ("d_model", None, *channels)
        self.in_zx = params.matrix(rngs, (D, 2, H, P), zx, init_std, fused_axes=(1,), apart=True)
        self.in_BC = params.matrix(rngs, (D, 2, G, N), ("d_model", *BC), init_std, fused_axes=(1,), joined=True)
        self.in_dt = params.matrix(rngs, (D, H), ("d_model", *heads), init_std, joined=True)
        bias = config.proj_bias
        self.in_zx_bias: Any = params.zeros((2, H, P), (None, *channels), "bias") if bias else None
        self.in_BC_bias: Any = params.zeros((2, G, N), BC, "bias") if bias else None
        self.in_dt_bias: Any = params.zeros((H,), heads, "bias") if bias else None
        draw_x, draw_BC = params.uniforms(rngs, (H, P, W + 1), (2, G, N, W + 1))
        self.conv_x, self.conv_x_bias = short_conv.make(draw_x, channels, config.conv_bias)
        self.conv_BC, self.conv_BC_bias = short_conv.make(draw_BC, BC, config.conv_bias)
        draw_dt, draw_A = params.uniforms(rngs, (H,), (H,))
        self.dt_bias = params.make(init_dt_bias(draw_dt, config), heads, "recurrence")
        self.A_log = params.make(
            jnp.log(config.A_init[0] + draw_A * (config.A_init[1] - config.A_init[0])), heads, "recurrence"
        )
        per_D = 2 if config.per_channel_D else 1
        self.D = params.ones((H, P)[:per_D], channels[:per_D], "recurrence")
        self.norm: Any = params.ones((H, P), channels, "norm") if config.gated_norm is not None else None
        self.out = params.matrix(rngs, (H, P, D), (*channels, "d_model"), out_std, n_in=2)
        out_bias = config.proj_bias if config.out_bias is None else config.out_bias
        self.out_bias = params.zeros((D,), ("d_model",), "bias") if out_bias else None

    readers = 3  # products of the input: of z, of x, of all else
    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """Step sizes, decays of the state a token, and the norm of a row's last state."""
        dt_BTH = self._project(x_BTD)[3]
        numbers = inspection.steps(dt_BTH, jnp.exp(self.A_log[...])[None], tokens)
        return numbers | recurrent.state_norm(self, x_BTD, tokens)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """Zero state (float32), and the windows of the convolutions."""
        state = (batch, *self.out.shape[-3:-1], self.config.d_state)
        return {
            "state": layout.state(state, ("batch", "heads")),
            "conv_x": short_conv.init_window(self.conv_x, batch, self.dtype, layout),
            "conv_BC": short_conv.init_window(self.conv_BC, batch, self.dtype, layout),
        }

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the cache `old` (None: from nothing, and no new one is made)."""
        c, before, new = self.config, old or {}, {}
        # Gradients of B and C of one group are each device's own until the product: nothing adds them before.
        rows = exchange.copied_rows(x_BTD.shape[0]) if old is None and c.n_groups == 1 else "batch"
        z_BTHP, x_BTHP, BC_BTcGN, dt_BTH = self._project(x_BTD, rows)
        with jax.named_scope("convolve"):
            given: dict = {"activation": c.activation, "segment_ids": tokens.segment_ids, "gaps": tokens.gaps}
            of_x, of_BC = (self.conv_x, self.conv_x_bias), (self.conv_BC, self.conv_BC_bias)
            x, new["conv_x"] = short_conv.convolve(x_BTHP, *of_x, **given, window=before.get("conv_x"))
            BC, new["conv_BC"] = short_conv.convolve(BC_BTcGN, *of_BC, **given, window=before.get("conv_BC"), rows=rows)
            x_BTHP, BC_BTcGN = (checkpoint_name(y, "mamba_conv") for y in (x, BC))
        with jax.named_scope("scan"):
            y_BTHP, new["state"] = ops.ssd(
                x_BTHP, dt_BTH, self.A_log[...], BC_BTcGN, self.D[...], segment_ids=tokens.segment_ids,
                initial_state=before.get("state"), chunk=c.chunk, BC_rows=rows,
            )  # fmt: skip
            y_BTHP = checkpoint_name(y_BTHP, "mamba_ssd")
        return self._output(y_BTHP, z_BTHP), new

    def extend_row(self, row: one_row.Row, cache: dict, length_B, layer) -> tuple[jax.Array, dict] | None:
        """See `layers.one_row`."""
        weights, norm = (self.in_zx, self.in_BC, self.in_dt), self.config.gated_norm
        old = caches.read_all(cache, layer)
        if norm is None or (norm.n_groups or self.config.n_groups) != 1 or self.out_bias is not None:
            return None
        if not self._has_kernel(old) or not one_row.takes(*weights) or not one_row.takes(self.out, n_in=2):
            return None
        with jax.named_scope("project"):
            zx, BC, dt = one_row.products(row, *weights)
        y_BHP, new = self._in_kernel(zx, BC, dt, old)
        with jax.named_scope("output"):
            parts = y_BHP, zx, self.norm[...].astype(jnp.float32)
            x_BTD = one_row.add(row, "norm_gate" if norm.before_gate else "gated_norm", parts, self.out, norm.eps)
        return x_BTD, caches.write_all(cache, layer, new)

    def _has_kernel(self, old: dict) -> bool:
        """Whether `mamba2_step` computes what stands between the projections of one token."""
        c = self.config
        plain = c.activation == "silu" and not c.proj_bias and not c.per_channel_D and c.multipliers == (1.0,) * 5
        state = old["state"]
        few = isinstance(state.shape[0], int) and state.shape[0] <= one_token.MOST_ROWS
        fits = few and one_token.step_fits(*state.shape[-2:]) and state.dtype == jnp.float32
        return plain and fits and not sharding.is_split() and one_token.why_not(self.dtype) is None

    @jax.named_scope("scan")
    def _in_kernel(self, zx, BC, dt, old: dict) -> tuple[jax.Array, dict]:
        """zx [B, 2, H, P], BC [B, 2, G, N], dt [B, H], as the projections give them."""
        from pallas_kernels.one_token.mamba2_step import mamba2_step

        names = ("conv_x", "conv_x_bias", "conv_BC", "conv_BC_bias", "dt_bias", "A_log", "D")
        values: list[Any] = [None if getattr(self, name) is None else getattr(self, name)[...] for name in names]
        weights = one_token.Weights(*values)
        windows = old["conv_x"], old["conv_BC"]
        y, *new = mamba2_step(zx, BC, dt, *windows, old["state"], weights, dt_limit=self.config.dt_limit)
        return y, dict(zip(("conv_x", "conv_BC", "state"), new, strict=True))

    def _step(self, x_BTD, old: dict) -> tuple[jax.Array, dict]:
        """One token: the recurrence as written (the paper's equation 2, discretised with dt as in section 7)."""
        if self._has_kernel(old):
            with jax.named_scope("project"):
                x_BTD = x_BTD.astype(self.dtype)
                matrices = (params.operand(w, self.dtype) for w in (self.in_zx, self.in_BC, self.in_dt))
                zx, BC, dt = (dot(x_BTD, matrix)[:, 0] for matrix in matrices)
            y_BHP, new = self._in_kernel(zx, BC, dt, old)
            return self._output(y_BHP[:, None], zx[:, None, 0]), new
        z_BTHP, x_BTHP, BC_BTcGN, dt_BTH = self._project(x_BTD)
        act, new = self.config.activation, {}
        with jax.named_scope("convolve"):
            x_BHP, new["conv_x"] = short_conv.step(x_BTHP, self.conv_x, self.conv_x_bias, act, old["conv_x"])
            BC_BcGN, new["conv_BC"] = short_conv.step(BC_BTcGN, self.conv_BC, self.conv_BC_bias, act, old["conv_BC"])
        with jax.named_scope("scan"):
            BC_BcHN = jnp.repeat(BC_BcGN.astype(jnp.float32), x_BHP.shape[1] // self.config.n_groups, axis=2)
            x_BHP, dt_BH1 = x_BHP.astype(jnp.float32), dt_BTH[:, 0, :, None]
            decay_BH1 = jnp.exp(-dt_BH1 * jnp.exp(self.A_log[...])[None, :, None])
            state = decay_BH1[..., None] * old["state"] + (dt_BH1 * x_BHP)[..., None] * BC_BcHN[:, 0, :, None]
            D_HP = self.D[...] if self.config.per_channel_D else self.D[...][:, None]
            y_BHP = (state * BC_BcHN[:, 1, :, None]).sum(-1) + D_HP[None] * x_BHP
        return self._output(y_BHP[:, None].astype(z_BTHP.dtype), z_BTHP), new | {"state": state}

    @jax.named_scope("project")
    def _project(self, x_BTD, rows: sharding.Axis = "batch") -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """z and x [B, T, H, P], B and C [B, T, 2, G, N], dt [B, T, H] (float32, after softplus, within its limits).
        rows: what splits B of B and C."""
        x_BTD, c = x_BTD.astype(self.dtype), self.config

        def products(x, w_DcHP, *others):
            *xs, last = x if isinstance(x, tuple) else params.several(x, self.readers)
            return [*dot_parts(xs, w_DcHP), *dot_all(last, others)]

        heads, groups = ("batch", "tokens", "heads", None), "groups" if rows == "batch" else None
        BC_axes = (rows, "tokens", None, groups, None)
        axes = [heads, heads, BC_axes, heads[:3]]
        z, x, BC, dt = params.enter(products, x_BTD, (self.in_zx, self.in_BC, self.in_dt), axes)
        if c.proj_bias:
            bias_cHP, bias_BC, bias_dt = (
                params.use(bias, self.dtype) for bias in (self.in_zx_bias, self.in_BC_bias, self.in_dt_bias)
            )
            z, x = z + bias_cHP[0][None, None], x + bias_cHP[1][None, None]
            BC, dt = BC + bias_BC[None, None], dt + bias_dt[None, None]
        if c.multipliers != (1.0,) * 5:
            of_z, of_x, of_B, of_C, of_dt = c.multipliers
            z, x, dt = z * of_z, x * of_x, dt * of_dt
            BC = BC * jnp.array((of_B, of_C), BC.dtype)[None, None, :, None, None]
        z, x = (checkpoint_name(sharding.constrain(a, *heads), "mamba_zx") for a in (z, x))
        BC = checkpoint_name(sharding.constrain(BC, *BC_axes), "mamba_BC")
        dt = checkpoint_name(sharding.constrain(dt, *heads[:3]), "mamba_dt")
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None])
        if c.dt_limit != (0.0, math.inf):
            dt = jnp.clip(dt, *c.dt_limit)
        return z, x, BC, dt

    def _output(self, y_BTHP: jax.Array, z_BTHP: jax.Array) -> jax.Array:
        """Gate, norm in float32, output projection."""
        norm = self.config.gated_norm
        with jax.named_scope("gate_norm"):
            if norm is None:
                y = (y_BTHP.astype(jnp.float32) * jax.nn.silu(z_BTHP.astype(jnp.float32))).astype(self.dtype)
            else:
                n_groups = self.config.n_groups if norm.n_groups is None else norm.n_groups
                y = gated_rms_norm(y_BTHP, z_BTHP, self.norm[...], norm.eps, n_groups, norm.before_gate, self.dtype)
            y_BTHP = sharding.constrain(y, "batch", "tokens", "heads", None)
        with jax.named_scope("output"):
            return params.leave(y_BTHP, self.out, self.out_bias, kept="mamba_norm")


class StepSizes(Protocol):
    """What a block says of its step sizes at the start; see Mamba2."""

    @property
    def dt_min(self) -> float: ...
    @property
    def dt_max(self) -> float: ...
    @property
    def dt_init_floor(self) -> float: ...


def init_dt_bias(uniform_H: jax.Array, config: StepSizes) -> jax.Array:
    """Inverse softplus of step sizes drawn log-uniformly from [dt_min, dt_max], at least dt_init_floor."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt_H = jnp.maximum(jnp.exp(low + uniform_H * (high - low)), config.dt_init_floor)
    return dt_H + jnp.log(-jnp.expm1(-dt_H))
