# SPDX-License-Identifier: Apache-2.0
"""What a model is trained to predict: the next token, or tokens that are hidden from it. Values, as rules are.

A new one is such a class and a word in OBJECTIVES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp

from hybridlm.errors import require
from hybridlm.fields import check_fields

Batch = dict[str, jax.Array]


@runtime_checkable
class Objective(Protocol):
    """What an objective answers."""

    reads_ahead: bool
    """Whether a model may see tokens behind the one that it predicts for: one that may is asked for no next token."""

    def prepare(self, batch: Batch, key: Callable[[], jax.Array]) -> Batch:
        """A batch of packed rows, int32 [B, T], with the tokens that the model is to see and the targets that it is to
        name (-1: none). key: gives the random key, which hangs on the seed and the step alone."""
        ...

    def check(self, vocab_size: int) -> None:
        """ConfigError, naming the field, where its tokens are none of a model's."""
        ...


@dataclass(frozen=True)
class NextToken:
    """The next token of the same document, which the rows of the data have as target already."""

    reads_ahead = False

    def prepare(self, batch: Batch, key: Callable[[], jax.Array]) -> Batch:
        """The batch itself."""
        return batch

    def check(self, vocab_size: int) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class Masked:
    """Tokens that are hidden, from all that is left of their documents (Devlin et al. 2019, "BERT", section 3.1).

    Each token of `tokens` is chosen with probability `rate`. Of those chosen, `masked` are replaced by mask_token,
    `random` by any of `tokens`, the rest stay; the loss is taken at those chosen alone.
    """

    rate: float = 0.15
    """Share of the tokens that is chosen."""
    masked: float = 0.8
    """Share of those that become mask_token."""
    random: float = 0.1
    """Share of those that become another token, drawn from all alike."""
    mask_token: int = 3
    """Id that stands for a hidden token; as it is, that of data.tokenizer=dna."""
    tokens: tuple[int, int] = (7, 12)
    """First id of those that are chosen, and the one behind their last; as it is, A C G T N of data.tokenizer=dna."""

    reads_ahead = True

    def __post_init__(self):
        check_fields(self)
        require(0 < self.rate <= 1, f"rate ({self.rate}) must be in (0, 1]")
        for name in ("masked", "random"):
            require(0 <= getattr(self, name) <= 1, f"{name} ({getattr(self, name)}) must be in [0, 1]")
        total = self.masked + self.random
        require(total <= 1 + 1e-9, f"masked ({self.masked}) and random ({self.random}) must add up to at most 1")
        low, high = self.tokens
        require(0 <= low < high, f"tokens ({low} {high}) must be a first id and the one behind the last")
        require(
            self.mask_token >= 0 and not low <= self.mask_token < high,
            f"mask_token ({self.mask_token}) must be an id, and none of tokens ({low} {high})",
        )

    def prepare(self, batch: Batch, key: Callable[[], jax.Array]) -> Batch:
        """See Objective. What has no target to begin with, as padding and prefix tokens, is never chosen."""
        tokens_BT, (low, high) = batch["tokens"], self.tokens
        for_chosen, for_kind, for_token = jax.random.split(key(), 3)
        may_BT = (batch["targets"] >= 0) & (tokens_BT >= low) & (tokens_BT < high)
        chosen_BT = may_BT & (jax.random.uniform(for_chosen, tokens_BT.shape) < self.rate)
        kind_BT = jax.random.uniform(for_kind, tokens_BT.shape)
        drawn_BT = jax.random.randint(for_token, tokens_BT.shape, low, high, tokens_BT.dtype)
        seen_BT = jnp.where(kind_BT < self.masked + self.random, drawn_BT, tokens_BT)
        seen_BT = jnp.where(kind_BT < self.masked, self.mask_token, seen_BT)
        return batch | {
            "tokens": jnp.where(chosen_BT, seen_BT, tokens_BT), "targets": jnp.where(chosen_BT, tokens_BT, -1),
        }  # fmt: skip

    def check(self, vocab_size: int) -> None:
        """See Objective."""
        for name, value in (("mask_token", self.mask_token), ("tokens", self.tokens[1] - 1)):
            require(value < vocab_size, f"{name} ({value}) is no token of model.vocab_size ({vocab_size})")


AnyObjective = NextToken | Masked
OBJECTIVES: tuple[type[AnyObjective], ...] = get_args(AnyObjective)
