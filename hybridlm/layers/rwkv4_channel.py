# SPDX-License-Identifier: Apache-2.0
"""Channel mixing of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, section 3.1): an MLP of the token and the one before.

Axis letters: B batch, T tokens, D model, c of key and receptance, F feed-forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.layers import cache as caches
from hybridlm.layers import params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.mlp import ACTIVATIONS
from hybridlm.layers.rwkv4 import blend


@dataclass(frozen=True)
class Rwkv4Channel:
    """Squared ReLU MLP, its output gated by a sigmoid receptance; both read the token mixed with the one before."""

    d_ff: int = 3072
    """Feed-forward width F."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "rwkv4_channel_in": Kept("channel mixing: result of the first product", kernels=True),
        "rwkv4_channel_hidden": Kept("channel mixing: input of the last product"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        require(self.d_ff > 0, f"d_ff ({self.d_ff}) must be positive")

    def check(self, d_model: int) -> None:
        """It fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "Rwkv4ChannelMixer":
        """The mixer of one sublayer."""
        return make.mixer(Rwkv4ChannelMixer, self, d_model, layer=make.layer)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """The feed-forward width."""
        return [("d_ff", self.d_ff, "d_ff")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Two matrices and the receptance."""
        return 2.0 * d_model * (2 * self.d_ff + d_model)

    def resolved(self, d_model: int) -> "Rwkv4Channel":
        """Nothing is derived."""
        return self


class Rwkv4ChannelMixer(nnx.Module):
    """sigmoid(w_r x_r) * w_out relu(w_in x_k)^2, with x_k and x_r mixtures of the token and the one before."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: Rwkv4Channel,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        layer: tuple = (0, 1),
    ):
        """init_std, out_std: standard deviations of the first matrices and of the last (None: init_std). Shares of the
        token rise from 0 to 1 over the channels, as published, by depth. layer: as of `Make`; both kinds of mixing
        count."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, F = d_model, config.d_ff
        out_std = init_std if out_std is None else out_std
        rising_D = np.arange(D) / D
        share = params.by_layer(layer, lambda i, n: np.tile(rising_D ** (1 - i / n), (2, 1)))
        self.share = params.make(share, (None, "d_model"), "recurrence")
        self.w_in = params.matrix(rngs, (D, F), ("d_model", "d_ff"), init_std)
        self.w_receptance = params.matrix(rngs, (D, D), ("d_model", None), init_std)
        self.w_out = params.matrix(rngs, (F, D), ("d_ff", "d_model"), out_std)

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """The token before."""
        return {"before": layout.zeros((batch, 1, self.w_in.shape[-2]), self.dtype)}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the cache `old` (None: from nothing, and no new one is made)."""
        x_BTD, before = x_BTD.astype(self.dtype), None if old is None else old["before"]
        with jax.named_scope("shift"):
            shifted_BTD, before = short_conv.shift(
                x_BTD, segment_ids=tokens.segment_ids, gaps=tokens.gaps, window=before
            )
            mixed_BTcD = blend(x_BTD, shifted_BTD, self.share)
        with jax.named_scope("mlp_in"):
            h_BTF = params.project(mixed_BTcD[:, :, 0], self.w_in)
            h_BTF = checkpoint_name(sharding.constrain(h_BTF, "batch", "tokens", "d_ff"), "rwkv4_channel_in")
        with jax.named_scope("mlp_hidden"):
            h_BTF = ACTIVATIONS["relu2"](h_BTF)
        with jax.named_scope("mlp_out"):
            gate_BTD = jax.nn.sigmoid(params.project(mixed_BTcD[:, :, 1], self.w_receptance))
            y_BTD = gate_BTD * params.leave(h_BTF, self.w_out, kept="rwkv4_channel_hidden")
        return y_BTD, {} if old is None else {"before": before}
