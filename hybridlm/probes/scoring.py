# SPDX-License-Identifier: Apache-2.0
"""How well a model, or any function that gives logits, does at a task.

Axis letters: B rows, T tokens of a row, N answers of a row, D model, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm.errors import require
from hybridlm.model.model import HybridLM
from hybridlm.probes.task import Examples, Task
from hybridlm.probes.tokenised import inner

Logits = Callable[[np.ndarray], Any]
"""tokens_BT -> logits [B, T, V], an array of NumPy or JAX."""
Count = tuple[int, int]
"""(right, asked)."""
SIZES = ("vocab_size", "tokens")
"""Fields of a task that are its vocabulary."""


@dataclass(frozen=True)
class Score:
    """What was right: the likeliest token of all the vocabulary is the answer."""

    length: int
    right: int
    asked: int
    rows: int
    """Rows in which something was asked."""
    whole: int
    """Those in which all was right."""
    by: Mapping[str, Mapping[int, Count]]
    """Facet of the task -> its values, in order -> counts."""

    @property
    def accuracy(self) -> float:
        """Share of the answers."""
        return self.right / self.asked if self.asked else math.nan

    def accuracies(self, facet: str) -> dict[int, float]:
        """Accuracy by the values of a facet; ConfigError for one that the task does not have."""
        require(facet in self.by, f"facet ({facet!r}) is none of this task: {', '.join(self.by) or 'it has none'}")
        return {value: right / asked for value, (right, asked) in self.by[facet].items()}


def score(
    model: HybridLM | Logits, task: Task, length: int, *, rows: int = 16, batches: int = 4, seed: int = 0
) -> Score:
    """Scores `batches` batches of `rows` rows of `length` tokens: those of the seed, from step 0.

    Of a HybridLM logits are made at the answers alone, on the devices where its parameters are; a second score of one
    shape compiles nothing. Raises ConfigError, one line, for a task that the model or the length cannot hold.
    """
    require(batches >= 1, f"batches ({batches}) must be at least 1")
    task.check(length)
    read, counts = _reader(model, task), Counts(length)
    for step in range(batches):
        examples = task.batch(seed, step, rows, length)
        at_BN, real_BN = places(examples.scored_BT)
        counts.add(examples, at_BN, real_BN, read(examples.tokens_BT, at_BN))
    return counts.score()


class Counts:
    """What was right so far, of rows of one length."""

    def __init__(self, length: int):
        self._length = length
        self._right = self._asked = self._rows = self._whole = 0
        self._by: dict[str, dict[int, list[int]]] = {}

    def add(self, examples: Examples, at_BN: np.ndarray, real_BN: np.ndarray, likeliest_BN: np.ndarray) -> None:
        """More rows. at_BN, real_BN: of `places`. likeliest_BN: what a model thinks comes behind those."""
        wanted_BN = np.take_along_axis(examples.targets_BT, at_BN, axis=1)
        right_BN = (likeliest_BN == wanted_BN) & real_BN
        in_row = real_BN.any(axis=1)
        self._right, self._asked = self._right + int(right_BN.sum()), self._asked + int(real_BN.sum())
        self._rows += int(in_row.sum())
        self._whole += int(((right_BN == real_BN).all(axis=1) & in_row).sum())
        for name, values_BT in examples.facets.items():
            values_BN = np.take_along_axis(np.asarray(values_BT), at_BN, axis=1)
            for value in np.unique(values_BN[real_BN]).tolist():
                counts = self._by.setdefault(name, {}).setdefault(value, [0, 0])
                here_BN = (values_BN == value) & real_BN
                counts[0] += int((right_BN & here_BN).sum())
                counts[1] += int(here_BN.sum())

    def score(self) -> Score:
        """All of them."""
        by = {name: {v: (counts[v][0], counts[v][1]) for v in sorted(counts)} for name, counts in self._by.items()}
        return Score(self._length, self._right, self._asked, self._rows, self._whole, by)


def heat_map(scores: Sequence[Score], facet: str = "depth") -> tuple[list[int], list[int], np.ndarray]:
    """(lengths, values of the facet, accuracy [lengths, values]) of scores at several lengths; NaN where none asked."""
    values = sorted({value for one in scores for value in one.accuracies(facet)})
    accuracy = [[one.accuracies(facet).get(value, math.nan) for value in values] for one in scores]
    return [one.length for one in scores], values, np.array(accuracy)


def state_bits(model: HybridLM) -> int | None:
    """Bits that the model carries from token to token, as its cache keeps them, for `Task.fixed_state`; None where they
    grow with the text, as keys and values of attention do. ConfigError for a model that sees ahead."""
    cache = nnx.eval_shape(lambda model: model.init_cache(1, 1), model)
    if cache.limit is not None:
        return None
    return sum(8 * leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(cache.groups))


def _reader(model: HybridLM | Logits, task: Task) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(tokens_BT, at_BN) -> the likeliest tokens behind those at these places, [B, N]."""
    if not isinstance(model, HybridLM):
        return partial(_likeliest_of, model, task)
    check_vocabulary(model.config.vocab_size, task)
    ahead = model.config.sees_ahead
    require(not ahead, f"a model that sees ahead reads the answers: {ahead}")
    graphdef, state = nnx.split(model)
    return lambda tokens_BT, at_BN: np.asarray(_likeliest(graphdef, state, jnp.asarray(tokens_BT), jnp.asarray(at_BN)))


@partial(jax.jit, static_argnums=0)
def _likeliest(graphdef: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array, at_BN: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    x_BND = jnp.take_along_axis(model.hidden(tokens_BT), at_BN[..., None], axis=1)
    return model.logits(x_BND).argmax(axis=-1)


def _likeliest_of(logits_of: Logits, task: Task, tokens_BT: np.ndarray, at_BN: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits_of(tokens_BT))
    fits = logits.ndim == 3 and logits.shape[:2] == tokens_BT.shape
    require(fits, f"logits {logits.shape} must have the shape (rows, tokens, vocabulary) of tokens {tokens_BT.shape}")
    check_vocabulary(logits.shape[2], task)
    return np.take_along_axis(logits.argmax(axis=2), at_BN, axis=1)


def check_vocabulary(size: int, task: Task) -> None:
    """ConfigError where a model of so many tokens cannot read a task."""
    made: Any = inner(task)
    needed = task.vocab_size
    own = [f.name for f in fields(made) if f.name in SIZES and getattr(made, f.name) == needed]
    said = f"{type(made).__name__} needs a vocabulary of {needed} tokens, the model has {size}: make the task's smaller"
    require(needed <= size, said + "".join(f", as by {field}={size}" for field in own))


def places(scored_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(at_BN, real_BN): places of the answers of each row, filled up to one number, a power of two or all of a row, so
    that few shapes are compiled; and which of them are."""
    counts_B = scored_BT.sum(axis=1)
    n = min(1 << max(int(counts_B.max()) - 1, 0).bit_length(), scored_BT.shape[1])
    at_BN = np.argsort(~scored_BT, axis=1, kind="stable")[:, :n]
    return at_BN, np.arange(n) < counts_B[:, None]
