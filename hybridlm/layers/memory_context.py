# SPDX-License-Identifier: Apache-2.0
"""Memory as context (Behrouz, Zhong and Mirrokni 2024, arXiv:2501.00663, section 4.1): attention over the tokens and
over what a memory remembers at each of them.

Axis letters: B batch, T tokens, D model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from hybridlm.layers import cache as caches
from hybridlm.layers.attention import Attention
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
from hybridlm.layers.titans import Titans


@dataclass(frozen=True)
class MemoryAsContext:
    """attention(r_1, x_1, r_2, x_2, ...) at the x, times sigmoid(r); r is the memory's answer at each token.

    The attention's positions and window count both, r and x.
    """

    memory: AnyMixer = Titans()  # noqa: RUF009 (frozen)
    """What remembers."""
    attention: Attention = Attention(window=1024)  # noqa: RUF009 (frozen)
    """Reads the tokens and what is remembered."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {}
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True

    def parts(self) -> dict[str, Block]:
        """Both by field name."""
        return {"memory": self.memory, "attention": self.attention}

    def check(self, d_model: int) -> None:
        """Raises ConfigError where a part cannot be built at the model width."""
        check_parts(self, d_model)

    def build(self, d_model: int, make: Make) -> "MemoryAsContextMixer":
        """The mixer of one sublayer."""
        return make.whole(MemoryAsContextMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Those of the parts."""
        return split_of_parts(self, d_model)

    def flops(self, d_model: int, seq_len: int) -> float:
        """The memory's, and the attention's over twice as many tokens."""
        return self.memory.flops(d_model, seq_len) + 2 * self.attention.flops(d_model, 2 * seq_len)

    def resolved(self, d_model: int) -> "MemoryAsContext":
        """The parts resolved."""
        resolved: dict[str, Any] = {name: part.resolved(d_model) for name, part in self.parts().items()}
        return replace(self, **resolved)


class MemoryAsContextMixer(nnx.Module):
    """A memory, and attention over its answers and the tokens in turn."""

    __call__ = of_parts

    def __init__(
        self,
        config: MemoryAsContext,
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
        make = Make(rngs, init_std, out_std, dtype, norm_eps, layer)
        self.config, self.d_model = config, d_model
        self.memory = config.memory.build(d_model, make)
        self.attention = config.attention.build(d_model, make)

    @property
    def cache_grows(self) -> bool:
        """The cache of a part grows with the number of tokens."""
        return self.memory.cache_grows or self.attention.cache_grows

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D], and the statistics of the memory behind its name."""
        with jax.named_scope("memory"):
            r_BTD, stats = self.memory.mix(x_BTD, tokens)
        with jax.named_scope("attention"):
            y_BTD = _at_tokens(self.attention.mix(*_both(r_BTD, x_BTD, tokens)).y_BTD)
        return Output(_gated(y_BTD, r_BTD), {f"memory.{name}": value for name, value in stats.items()})

    def inspect(self, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """What the memory says of itself, and the attention of its queries at the tokens, behind their names."""
        both = _both(self.memory.mix(x_BTD, tokens).y_BTD, x_BTD, tokens)
        found = {"memory": inspect(self.memory, x_BTD, tokens), "attention": self.attention.inspect(*both, every=2)}
        return {f"{name}.{key}": value for name, numbers in found.items() for key, value in numbers.items()}

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, Any]:
        """The parts' by name; that of the attention has room for both."""
        memory = caches.make(self.memory, batch, max_len, layout)
        return {"memory": memory, "attention": caches.make(self.attention, batch, 2 * max_len, layout)}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the caches after them; see `block.Mixer`."""
        with jax.named_scope("memory"):
            r_BTD, memory = self.memory.extend(x_BTD, cache["memory"], length_B, real_BT, layer, gaps=gaps)
        real = None if real_BT is None else jnp.repeat(real_BT, 2, axis=1)
        with jax.named_scope("attention"):
            both = _in_turn(r_BTD, x_BTD.astype(r_BTD.dtype))
            y, attention = self.attention.extend(both, cache["attention"], 2 * length_B, real, layer, gaps=gaps)
        return _gated(_at_tokens(y), r_BTD), {"memory": memory, "attention": attention}


def _both(r_BTD: jax.Array, x_BTD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Tokens]:
    """What the attention reads, in documents."""
    ids = None if tokens.segment_ids is None else jnp.repeat(tokens.segment_ids, 2, axis=1)
    return _in_turn(r_BTD, x_BTD.astype(r_BTD.dtype)), Tokens(ids, gaps=tokens.gaps)


def _in_turn(r_BTD: jax.Array, x_BTD: jax.Array) -> jax.Array:
    """[B, 2 T, D]: of each token what is remembered, then itself."""
    batch, n_tokens, width = x_BTD.shape
    return jnp.stack([r_BTD, x_BTD], axis=2).reshape(batch, 2 * n_tokens, width)


def _at_tokens(y: jax.Array) -> jax.Array:
    """[B, T, D] of [B, 2 T, D]: what came out at the tokens themselves."""
    return y.reshape(y.shape[0], -1, 2, y.shape[2])[:, :, 1]


def _gated(y_BTD: jax.Array, r_BTD: jax.Array) -> jax.Array:
    return (y_BTD * jax.nn.sigmoid(r_BTD.astype(jnp.float32))).astype(y_BTD.dtype)
