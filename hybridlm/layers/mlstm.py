# SPDX-License-Identifier: Apache-2.0
"""mLSTM, the matrix memory of xLSTM with exponential gates, as in xLSTM 7B (Beck et al. 2025, arXiv:2503.13427).

Axis letters: B batch, T tokens, D model, H heads, N query and key width, P head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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
from hybridlm.layers.mamba2 import ssd_flops
from hybridlm.layers.norm import layer_normalise


@dataclass(frozen=True)
class MLSTM:
    """Queries, keys, values and gates; the memory; a layer norm of each head, a sigmoid gate, a projection."""

    n_heads: int = 4
    """Heads H."""
    d_key: int = 64
    """Width N of a head's queries and keys."""
    d_head: int = 128
    """Width P of a head's values."""
    gate_softcap: float | None = 15.0
    """Input and forget gates become gate_softcap * tanh(gates / gate_softcap) before their activations; None: not."""
    norm_eps: float = 1e-6
    """Added to the variance in the heads' norm."""
    eps: float = 1e-6
    """Added to the divisor of the memory's output."""
    bias: bool = False
    """Bias of the projections and of the norm; input and forget gates always have one."""
    chunk: int | None = None
    """Chunk length of the scan; None: the op chooses. Results do not depend on it beyond rounding."""

    FREE: ClassVar[frozenset[str]] = frozenset({"chunk"})
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "mlstm_qkv": Kept("mLSTM: queries, keys and values", kernels=True),
        "mlstm_gates": Kept("mLSTM: input, forget and output gates before their activations", kernels=True),
        "mlstm_h": Kept("mLSTM: output of the memory", kernels=True),
        "mlstm_out": Kept("mLSTM: input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_heads", "d_key", "d_head", "gate_softcap", "chunk"))
        for name in ("norm_eps", "eps"):
            require(getattr(self, name) >= 0, f"{name} ({getattr(self, name)}) must not be negative")

    def check(self, d_model: int) -> None:
        """mLSTM fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "MLSTMMixer":
        """The mixer of one sublayer."""
        return make.mixer(MLSTMMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Heads."""
        return [("n_heads", self.n_heads, "heads")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, and the products of the memory in chunks."""
        H, N, P = self.n_heads, self.d_key, self.d_head
        return 2.0 * d_model * H * (2 * N + 3 * P + 2) + ssd_flops(H, P, H, N, seq_len)

    def resolved(self, d_model: int) -> "MLSTM":
        """Nothing is derived."""
        return self


class MLSTMMixer(nnx.Module):
    """q, k, v, o and the gates i, f = projections; memory; layer norm of each head; sigmoid(o); output projection."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: MLSTM,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std). The gates of the
        memory start as published: nearly closed to the input, the forget gates from 3 to 6 over the heads."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, H, N, P = d_model, config.n_heads, config.d_key, config.d_head
        out_std, heads, bias = init_std if out_std is None else out_std, ("heads", "d_head"), config.bias
        self.w_qk = params.matrix(rngs, (D, 2, H, N), ("d_model", None, *heads), init_std, fused_axes=(1,))
        self.w_vo = params.matrix(rngs, (D, 2, H, P), ("d_model", None, *heads), init_std, fused_axes=(1,))
        self.b_qk = params.zeros((2, H, N), (None, *heads), "bias") if bias else None
        self.b_vo = params.zeros((2, H, P), (None, *heads), "bias") if bias else None
        closed = jnp.zeros((D, 2, H))
        self.w_gates = params.make(closed, ("d_model", None, "heads"), "matrix", n_in=1, fused_axes=(1,))
        b_gates = jnp.stack([jnp.full((H,), -10.0), jnp.linspace(3.0, 6.0, H)])
        self.b_gates = params.make(b_gates, (None, "heads"), "bias")
        self.norm = params.ones((H, P), heads, "norm")
        self.norm_bias = params.zeros((H, P), heads, "bias") if bias else None
        self.w_out = params.matrix(rngs, (H, P, D), (*heads, "d_model"), out_std, n_in=2)
        self.b_out = params.zeros((D,), ("d_model",), "bias") if bias else None

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What the forget gates leave of the memory, and the norm of a row's last one, of C with its scale e^m."""
        new, f_BTH = recurrent.last(self, x_BTD, tokens), self._project(x_BTD)[5]
        memory_BHNP = new["c"] * jnp.exp(new["m"])[:, :, None, None]
        return inspection.decays(jax.nn.log_sigmoid(f_BTH), tokens) | inspection.state_norms(memory_BHNP)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """The empty memory, float32: C, its normaliser n, and the logarithm m of their scale."""
        (H, N, P), axes = (self.config.n_heads, self.config.d_key, self.config.d_head), ("batch", "heads")
        return {
            "c": layout.state((batch, H, N, P), axes),
            "n": layout.state((batch, H, N), axes),
            "m": layout.zeros((batch, H), jnp.float32, axes),
        }

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the cache `old` (None: from nothing, and no new one is made)."""
        q_BTHN, k_BTHN, v_BTHP, o_BTHP, i_BTH, f_BTH = self._project(x_BTD)
        with jax.named_scope("memory"):
            h_BTHP, state = ops.mlstm(
                q_BTHN, k_BTHN, v_BTHP, i_BTH, f_BTH, eps=self.config.eps, segment_ids=tokens.segment_ids,
                initial=None if old is None else (old["c"], old["n"], old["m"]), chunk=self.config.chunk,
            )  # fmt: skip
            h_BTHP = checkpoint_name(h_BTHP, "mlstm_h")
        return self._output(h_BTHP, o_BTHP), {} if old is None or state is None else dict(
            zip(("c", "n", "m"), state, strict=True)
        )

    @jax.named_scope("project")
    def _project(self, x_BTD) -> tuple[jax.Array, ...]:
        """Queries and keys [B, T, H, N], values and output gate [B, T, H, P], input and forget gates [B, T, H].

        The output gate comes before its sigmoid, the others soft-capped, in float32."""
        pairs = (self.w_qk, self.b_qk), (self.w_vo, self.b_vo), (self.w_gates, None)
        qk, vo, gates = params.projections(x_BTD.astype(self.dtype), *pairs)
        qk, vo = (sharding.constrain(a, "batch", "tokens", None, "heads", None) for a in (qk, vo))
        gates = gates.astype(jnp.float32) + self.b_gates[...][None, None]
        gates = checkpoint_name(sharding.constrain(gates, "batch", "tokens", None, "heads"), "mlstm_gates")
        cap = self.config.gate_softcap
        gates = gates if cap is None else cap * jnp.tanh(gates / cap)
        q, k, v = (checkpoint_name(a, "mlstm_qkv") for a in (qk[:, :, 0], qk[:, :, 1], vo[:, :, 0]))
        return q, k, v, checkpoint_name(vo[:, :, 1], "mlstm_gates"), gates[:, :, 0], gates[:, :, 1]

    def _output(self, h_BTHP: jax.Array, o_BTHP: jax.Array) -> jax.Array:
        """Norm and gate in float32, output projection."""
        with jax.named_scope("norm_gate"):
            y_BTHP = layer_normalise(h_BTHP, self.config.norm_eps) * self.norm[...][None, None]
            y_BTHP = y_BTHP if self.norm_bias is None else y_BTHP + self.norm_bias[...][None, None]
            y_BTHP = (y_BTHP * jax.nn.sigmoid(o_BTHP.astype(jnp.float32))).astype(self.dtype)
            y_BTHP = sharding.constrain(y_BTHP, "batch", "tokens", "heads", None)
        with jax.named_scope("output"):
            return params.leave(y_BTHP, self.w_out, self.b_out, kept="mlstm_out")
