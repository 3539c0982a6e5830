# SPDX-License-Identifier: Apache-2.0
"""Time mixing of RWKV-4 (Peng et al. 2023, arXiv:2305.13048, section 3.1): a mean of values weighed by keys and age.

Axis letters: B batch, T tokens, D model, c of key, value and receptance, F inner width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.layers import cache as caches
from hybridlm.layers import inspection, ops, params, recurrent, short_conv
from hybridlm.layers.block import Kept, Make, Statistic, Tokens, on_arrays
from hybridlm.layers.quantized import einsum

STATES = ("a", "b", "m")


@dataclass(frozen=True)
class Rwkv4:
    """Keys, values and receptance of the token mixed with the one before; decay and bonus of each channel."""

    d_inner: int | None = None
    """Inner width F; None: the model's."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "rwkv4_kvr": Kept("RWKV-4: keys, values and receptance", kernels=True),
        "rwkv4_mean": Kept("RWKV-4: output of the recurrence", kernels=True),
        "rwkv4_out": Kept("RWKV-4: input of the output projection"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        require(self.d_inner is None or self.d_inner > 0, f"d_inner ({self.d_inner}) must be positive")

    def check(self, d_model: int) -> None:
        """It fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "Rwkv4Mixer":
        """The mixer of one sublayer."""
        return make.mixer(Rwkv4Mixer, self, d_model, layer=make.layer)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """The inner width."""
        return [("d_inner", self.d_inner or d_model, "d_inner")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections; the recurrence has no products of matrices and counts nothing."""
        return 2.0 * 4 * d_model * (self.d_inner or d_model)

    def resolved(self, d_model: int) -> "Rwkv4":
        """With the inner width."""
        return replace(self, d_inner=self.d_inner or d_model)


class Rwkv4Mixer(nnx.Module):
    """Output projection of sigmoid(receptance) * mean of the values."""

    cache_grows = False
    __call__ = on_arrays
    mix, extend = recurrent.mix, recurrent.extend_run

    def __init__(
        self,
        config: Rwkv4,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        layer: tuple = (0, 1),
    ):
        """init_std, out_std: standard deviations of the input and output projections (None: init_std). Decays are
        exp(-exp(w)) with w from -5 to 3 over the channels, shares of the token rise from 0 to 1, as published, by
        depth. layer: as of `Make`; both kinds of mixing count."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        D, F = d_model, config.d_inner or d_model
        out_std = init_std if out_std is None else out_std
        self.share = params.make(params.by_layer(layer, partial(_shares, D)), (None, "d_model"), "recurrence")
        self.w_in = params.matrix(rngs, (D, 3, F), ("d_model", None, "d_inner"), init_std, fused_axes=(1,))
        channel_F = np.arange(F)
        rising_F = channel_F / max(F - 1, 1)
        decay = params.by_layer(layer, lambda i, n: -5 + 8 * rising_F ** (0.7 + 1.3 * i / max(n - 1, 1)))
        self.decay = params.make(decay, ("d_inner",), "recurrence")
        bonus = np.log(0.3) + 0.5 * ((channel_F + 1) % 3 - 1)
        self.bonus = params.make(jnp.asarray(bonus), ("d_inner",), "recurrence")
        self.w_out = params.matrix(rngs, (F, D), ("d_inner", "d_model"), out_std)

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What a token leaves of the sums a and b, of all channels, and the norm of a / b behind a row's last one."""
        new, decay_F = recurrent.last(self, x_BTD, tokens), jnp.exp(-jnp.exp(self.decay[...]))
        return inspection.span("decay", decay_F, None) | inspection.state_norms(new["a"], new["b"])

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, jax.Array]:
        """The token before, and the sums of the recurrence (float32)."""
        D, _, F = self.w_in.shape[-3:]
        shape, axes = (batch, F), ("batch", "d_inner")
        sums = {name: layout.state(shape, axes) for name in STATES} | {"m": layout.zeros(shape, jnp.float32, axes)}
        return {**sums, "before": layout.zeros((batch, 1, D), self.dtype)}

    def _run(self, x_BTD, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """The tokens in parallel, from the cache `old` (None: from nothing, and no new one is made)."""
        ids, before, initial = tokens.segment_ids, None, None
        if old is not None:
            before, initial = old["before"], tuple(old[name] for name in STATES)
        x_BTD = x_BTD.astype(self.dtype)
        with jax.named_scope("shift"):
            shifted_BTD, before = short_conv.shift(x_BTD, segment_ids=ids, gaps=tokens.gaps, window=before)
            mixed_BTcD = blend(x_BTD, shifted_BTD, self.share)
        with jax.named_scope("project"):
            kvr_BTcF = einsum("BTcD,DcF->BTcF", mixed_BTcD, params.held(self.w_in, self.dtype))
            kvr_BTcF = checkpoint_name(sharding.constrain(kvr_BTcF, "batch", "tokens", None, "d_inner"), "rwkv4_kvr")
        with jax.named_scope("mean"):
            y_BTF, sums = ops.rwkv4(
                kvr_BTcF[:, :, 0], kvr_BTcF[:, :, 1], -jnp.exp(self.decay[...]), self.bonus[...], segment_ids=ids,
                initial=initial,
            )  # fmt: skip
            y_BTF = checkpoint_name(y_BTF, "rwkv4_mean")
        with jax.named_scope("output"):
            y_BTF = sharding.constrain(y_BTF * jax.nn.sigmoid(kvr_BTcF[:, :, 2]), "batch", "tokens", "d_inner")
            y_BTD = params.leave(y_BTF, self.w_out, kept="rwkv4_out")
        return y_BTD, {} if old is None or sums is None else {**dict(zip(STATES, sums, strict=True)), "before": before}


def _shares(d_model: int, index: int, count: int) -> np.ndarray:
    """Shares of the token in key, value and receptance at the start of a layer, [c, D]."""
    left, rising_D = 1 - index / count, np.arange(d_model) / d_model
    key_D = rising_D**left
    return np.stack([key_D, key_D + 0.3 * index / max(count - 1, 1), rising_D ** (0.5 * left)])


def blend(x_BTD: jax.Array, shifted_BTD: jax.Array, share: nnx.Param) -> jax.Array:
    """Mixtures [B, T, c, D] of each token and the one before, by the token's shares [c, D]; in the tokens' type."""
    share_cD = params.use(share, jnp.float32)[None, None]
    x_BTD, shifted_BTD = x_BTD[:, :, None], shifted_BTD[:, :, None]
    return (x_BTD * share_cD + shifted_BTD * (1 - share_cD)).astype(x_BTD.dtype)
