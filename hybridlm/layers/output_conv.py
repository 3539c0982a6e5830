# SPDX-License-Identifier: Apache-2.0
"""A mixer or feed-forward sublayer whose output is convolved over tokens, as each of Inkling's (Thinking Machines
2026).

Axis letters: B batch, T tokens, D model, W convolution window.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import params, short_conv
from hybridlm.layers.block import (
    Block,
    Kept,
    Make,
    Output,
    Statistic,
    Tokens,
    check_parts,
    inspect,
    of_parts,
    split_of_parts,
)
from hybridlm.layers.mixers import AnyMixer
from hybridlm.layers.mlp import MLP


@dataclass(frozen=True)
class OutputConv:
    """y + convolution(y) of the output y of another block, a causal convolution of each channel by itself."""

    mixer: AnyMixer = MLP()  # noqa: RUF009 (frozen)
    """What gives y."""
    d_conv: int = 4
    """Window W of the convolution."""
    scaled: bool = False
    """y is the output times a learned number, which starts at 1."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {}
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("d_conv",))

    def parts(self) -> dict[str, Block]:
        """The mixer by its field name."""
        return {"mixer": self.mixer}

    def check(self, d_model: int) -> None:
        """Raises ConfigError where the mixer cannot be built at the model width, or reads both directions."""
        check_parts(self, d_model)

    def build(self, d_model: int, make: Make) -> "OutputConvMixer":
        """The mixer of one sublayer."""
        return make.whole(OutputConvMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Those of the mixer."""
        return split_of_parts(self, d_model)

    def flops(self, d_model: int, seq_len: int) -> float:
        """The mixer's, and the convolution."""
        return self.mixer.flops(d_model, seq_len) + 2.0 * d_model * self.d_conv

    def resolved(self, d_model: int) -> "OutputConv":
        """The mixer resolved."""
        return replace(self, mixer=self.mixer.resolved(d_model))


class OutputConvMixer(nnx.Module):
    """A mixer, a number, a convolution."""

    __call__ = of_parts

    def __init__(
        self,
        config: OutputConv,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
        norm_eps: float = 1e-5,
        layer: tuple = (0, 1),
    ):
        """The options are those of `Make`."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        self.mixer = config.mixer.build(d_model, Make(rngs, init_std, out_std, dtype, norm_eps, layer))
        self.scale = params.ones((1,), (None,), "norm") if config.scaled else None
        (draw,) = params.uniforms(rngs, (d_model, config.d_conv + 1))
        self.conv, _ = short_conv.make(draw, (None,), bias=False)

    @property
    def cache_grows(self) -> bool:
        """The mixer's cache grows with the number of tokens."""
        return self.mixer.cache_grows

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D], and the statistics of the mixer behind its name."""
        with jax.named_scope("mixer"):
            y_BTD, stats = self.mixer.mix(x_BTD, tokens)
        y_BTD, _ = self._convolved(y_BTD, tokens, None)
        return Output(y_BTD, {f"mixer.{name}": value for name, value in stats.items()})

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What the mixer says of itself, behind its name."""
        return {f"mixer.{name}": value for name, value in inspect(self.mixer, x_BTD, tokens).items()}

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, Any]:
        """The mixer's, and the window of the convolution."""
        window = short_conv.init_window(self.conv, batch, self.dtype, layout)
        return {"mixer": caches.make(self.mixer, batch, max_len, layout), "conv": window}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the caches after them; see `block.Mixer`."""
        with jax.named_scope("mixer"):
            y_BTD, inner = self.mixer.extend(x_BTD, cache["mixer"], length_B, real_BT, layer, gaps=gaps)
        ids = None if real_BT is None else real_BT.astype(jnp.int32)
        y_BTD, window = self._convolved(y_BTD, Tokens(ids, gaps=gaps), caches.read(cache["conv"], layer))
        return y_BTD, {"mixer": inner, "conv": caches.write(cache["conv"], layer, window)}

    @jax.named_scope("convolve")
    def _convolved(self, y_BTD, tokens: Tokens, window) -> tuple[jax.Array, Any]:
        """The output plus its convolution, and the new window (None: from nothing, none)."""
        if self.scale is not None:
            y_BTD = y_BTD * self.scale[...].astype(y_BTD.dtype)[None, None]
        more_BTD, window = short_conv.convolve(
            y_BTD, self.conv, None, None, segment_ids=tokens.segment_ids, gaps=tokens.gaps, window=window
        )
        return y_BTD + more_BTD, window
