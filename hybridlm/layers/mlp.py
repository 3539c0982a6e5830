# SPDX-License-Identifier: Apache-2.0
"""Feed-forward sublayers: SwiGLU (Shazeer 2020), GELU, squared ReLU (So et al. 2021)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.layers import params


@dataclass(frozen=True)
class MLP:
    """Feed-forward sublayer of width d_ff."""

    d_ff: int = 4096
    """Feed-forward width F."""
    activation: Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu2"] = "swiglu"
    """swiglu and geglu are gated (three matrices); gelu (exact or tanh) and relu2 are not (two matrices)."""
    bias: bool = False
    """Bias of the projections."""

    def __post_init__(self):
        require(self.d_ff > 0, f"d_ff ({self.d_ff}) must be positive")

    def check(self, d_model: int) -> None:
        """An MLP fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    @property
    def gated(self) -> bool:
        """One matrix more: its product, through the activation, multiplies the other's."""
        return self.activation in ("swiglu", "geglu")


ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class FeedForward(nnx.Module):
    """w_out(activation(w_in x)); gated: w_out(activation(w_in[0] x) * w_in[1] x)."""

    def __init__(
        self,
        config: MLP,
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
        d_ff, bias = config.d_ff, config.bias
        if config.gated:
            self.w_in = params.matrix(rngs, (d_model, 2, d_ff), ("d_model", None, "d_ff"), init_std, fused_axes=(1,))
            self.b_in = params.zeros((2, d_ff), (None, "d_ff"), "bias") if bias else None
        else:
            self.w_in = params.matrix(rngs, (d_model, d_ff), ("d_model", "d_ff"), init_std)
            self.b_in = params.zeros((d_ff,), ("d_ff",), "bias") if bias else None
        self.w_out = params.matrix(rngs, (d_ff, d_model), ("d_ff", "d_model"), out_std)
        self.b_out = params.zeros((d_model,), ("d_model",), "bias") if bias else None

    def __call__(self, x_BTD: jax.Array, segment_ids=None, positions=None) -> jax.Array:
        """[B, T, D] -> [B, T, D] in `dtype`. Every token for itself: segment_ids and positions do not matter."""
        x_BTD = x_BTD.astype(self.dtype)
        h = jnp.tensordot(x_BTD, params.use(self.w_in, x_BTD.dtype), 1)
        if self.b_in is not None:
            h += params.use(self.b_in, h.dtype)
        h = checkpoint_name(sharding.constrain(h, "batch", *(None,) * (h.ndim - 2), "d_ff"), "mlp_in")
        activation = ACTIVATIONS[self.config.activation]
        h_BTF = activation(h[:, :, 0]) * h[:, :, 1] if self.config.gated else activation(h)
        h_BTF = checkpoint_name(h_BTF, "mlp_hidden")
        y_BTD = h_BTF @ params.use(self.w_out, h.dtype)
        return y_BTD if self.b_out is None else y_BTD + params.use(self.b_out, h.dtype)

    def init_cache(self, batch: int, max_len: int) -> dict:
        """Nothing to remember."""
        return {}

    def extend(self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None) -> tuple[jax.Array, dict]:
        """`__call__`: the past does not matter."""
        return self(x_BTD), cache
