# SPDX-License-Identifier: Apache-2.0
"""The contract of a probe: a task whose answer stands in the row itself, so that what a model remembers can be counted.

A task is a frozen dataclass in a file of `hybridlm/probes`, with its source in the docstring, and a line in
`probes.PROBES`. A batch is a function of (task, seed, step, rows, length) alone, on every machine.

Axis letters: B rows, T tokens of a row, N things of a row, as many as its task has (pairs, answers).
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hybridlm.errors import require
from hybridlm.fields import WHOLE

UNSCORED = -1
"""The target of a token behind which nothing is asked."""


@dataclass(frozen=True)
class Examples:
    """Rows of a task."""

    tokens_BT: np.ndarray
    """int32."""
    targets_BT: np.ndarray
    """int32: what is to be predicted of the tokens up to and with each; UNSCORED where nothing is asked."""
    facets: Mapping[str, np.ndarray]
    """What a score is split by, int32 [B, T] by name: `depth` in percent of the row, `distance` in tokens, ..."""

    @property
    def scored_BT(self) -> np.ndarray:
        """bool: where something is asked."""
        return self.targets_BT != UNSCORED


class Task(Protocol):
    """A frozen dataclass; numbers that cannot be are refused when it is made, in one line."""

    @property
    def is_text(self) -> bool:
        """Whether tokens are bytes of text, which mean something to a model with the byte tokenizer alone."""

    @property
    def vocab_size(self) -> int:
        """Tokens are below it."""

    @property
    def answers(self) -> np.ndarray:
        """The tokens among which a guess is made, int32 [n]."""

    def check(self, length: int) -> None:
        """ConfigError, naming the field, its value and the limit, where a row of so many tokens cannot hold it."""

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        """Rows of `length` tokens each. ConfigError as `check`, and for numbers that are none to draw by."""

    def chance(self, length: int) -> float:
        """Accuracy of a uniform guess among `answers`."""

    def fixed_state(self, length: int, bits: float) -> float:
        """No model that carries at most so many bits from each token to the next is right more often than this, on the
        mean over answers. An upper bound, see `bounds`; its docstring has the formula."""


def begin(task: Task, seed: int, step: int, rows: int, length: int) -> np.random.Generator:
    """The random numbers of a batch; ConfigError for arguments of `Task.batch` that cannot be."""
    for name, value, least in (("seed", seed, 0), ("step", step, 0), ("rows", rows, 1), ("length", length, 1)):
        require(least <= value <= WHOLE, f"{name} ({value}) must be at least {least} and at most {WHOLE}")
    task.check(length)
    return np.random.default_rng([seed, step, zlib.crc32(type(task).__name__.encode())])


def check_fits(length: int, least: int, what: str) -> None:
    """ConfigError where a row is too short for a task; what: the fields that make it so long, with their values."""
    require(length >= least, f"length ({length}) must be at least {least} for {what}: lengthen rows, or make that less")


def distinct(rng: np.random.Generator, rows: int, low: int, high: int, n: int) -> np.ndarray:
    """int32 [rows, n]: of each row n different numbers, low <= number < high, in random order."""
    order_BN = rng.random((rows, high - low)).argsort(axis=1)[:, :n]
    return (low + order_BN).astype(np.int32)


def unscored(rows: int, length: int) -> np.ndarray:
    """Targets of rows in which nothing is asked yet."""
    return np.full((rows, length), UNSCORED, np.int32)


def at_power(numbers: np.ndarray) -> np.ndarray:
    """The largest power of two that is not above each, int32; numbers of at least 1."""
    return (1 << (np.frexp(np.asarray(numbers, np.float64))[1] - 1)).astype(np.int32)


def log2_orders(choices: int, n: int) -> float:
    """Bits of n different things of `choices`, in order: log2(choices (choices - 1) ... (choices - n + 1))."""
    return (math.lgamma(choices + 1) - math.lgamma(choices - n + 1)) / math.log(2)
