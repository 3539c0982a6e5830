# SPDX-License-Identifier: Apache-2.0
"""RWKV's feed-forward sublayer, the channel mix (Peng et al. 2023, arXiv:2305.13048, 2024, arXiv:2404.05892, and 2025,
arXiv:2503.14456): squared ReLU of each token mixed with the one before it.

Axis letters: B batch, T tokens, D model, F feed-forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.layers import cache as caches
from hybridlm.layers import params, recurrent, token_shift
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.quantized import dot


@dataclass(frozen=True)
class ChannelMix:
    """w_out relu(w_in mixed(x))^2, times sigmoid(w_gate mixed(x)) with a gate."""

    d_ff: int = 4096
    """Feed-forward width F."""
    gate: bool = False
    """The receptance, of RWKV-4 to 6: a gate for each channel of the model, from its own mix."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "channel_in": Kept("channel mix: result of the first product", kernels=True),
        "channel_hidden": Kept("channel mix: input of the last product"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        require(self.d_ff > 0, f"d_ff ({self.d_ff}) must be positive")

    def check(self, d_model: int) -> None:
        """A channel mix fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "ChannelMixMixer":
        """The mixer of one sublayer."""
        return make.mixer(ChannelMixMixer, self, d_model, layer=make.layer)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """The feed-forward width."""
        return [("d_ff", self.d_ff, "d_ff")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Two matrices, and the gate's."""
        return 2.0 * d_model * (2 * self.d_ff + self.gate * d_model)

    def resolved(self, d_model: int) -> "ChannelMix":
        """Nothing is derived."""
        return self


class ChannelMixMixer(nnx.Module):
    """The token before it mixed in; product, squared ReLU, product, gate."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: ChannelMix,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        layer: tuple = (0, 1),
    ):
        """init_std, out_std: standard deviations of the first matrices and of the last (None: init_std).
        layer: as of `Make`."""
        self.config, self.dtype, self.d_model = config, dtype, d_model
        D, F, power = d_model, config.d_ff, 3 if config.gate else 4  # as published of RWKV-6 and of RWKV-7
        share = params.by_layer(layer, lambda index, count: token_shift.ramp(D, (1 - index / count) ** power))
        self.share_in = params.make(share, ("d_model",), "recurrence")
        self.share_gate: Any = params.make(share, ("d_model",), "recurrence") if config.gate else None
        self.w_in = params.matrix(rngs, (D, F), ("d_model", "d_ff"), init_std)
        self.w_gate = params.matrix(rngs, (D, D), ("d_model", None), init_std) if config.gate else None
        self.w_out = params.matrix(rngs, (F, D), ("d_ff", "d_model"), init_std if out_std is None else out_std)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """The last token."""
        return {"shift": token_shift.init_window(batch, self.d_model, self.dtype, layout)}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens from the cache `old` (None: from nothing, and no new one is made)."""
        x_BTD = x_BTD.astype(self.dtype)
        with jax.named_scope("shift"):
            pair_BTcD, window = token_shift.with_previous(x_BTD, tokens, None if old is None else old["shift"])
        with jax.named_scope("channel_in"):
            product = lambda pair, share, w: dot(token_shift.mixed(pair, share), w)
            axes = ("batch", "tokens", "d_ff")
            h_BTF = params.enter(product, pair_BTcD, [self.share_in, self.w_in], axes, x_axes=token_shift.PAIR)
            h_BTF = checkpoint_name(h_BTF, "channel_in")
        h_BTF = jnp.square(jax.nn.relu(h_BTF))
        with jax.named_scope("channel_out"):
            y_BTD = params.leave(h_BTF, self.w_out, kept="channel_hidden")
            if self.w_gate is not None:
                share = params.use(self.share_gate, self.dtype)
                u_BTD = sharding.constrain(token_shift.mixed(pair_BTcD, share), *sharding.STREAM)
                y_BTD = y_BTD * jax.nn.sigmoid(params.project(u_BTD, self.w_gate))
        return y_BTD, {} if old is None else {"shift": window}
