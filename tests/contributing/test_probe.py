# SPDX-License-Identifier: Apache-2.0
"""A probe: a frozen dataclass. docs/contributing/probe.md quotes it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from hybridlm.errors import ConfigError, require
from hybridlm.fields import check_fields
from hybridlm.probes import UNSCORED, Examples, score
from hybridlm.probes.bounds import listed
from hybridlm.probes.task import begin, check_fits


@dataclass(frozen=True)
class First:
    """The first token of the row is asked at its end."""

    vocab_size: int = 16
    """Different tokens, all drawn alike."""

    is_text: ClassVar[bool] = False

    def __post_init__(self):
        check_fields(self)
        require(self.vocab_size >= 2, f"vocab_size ({self.vocab_size}) must be at least 2")

    @property
    def answers(self) -> np.ndarray:
        return np.arange(self.vocab_size, dtype=np.int32)

    def check(self, length: int) -> None:
        check_fits(length, 2, "a first token and a last one")

    def batch(self, seed: int, step: int, rows: int, length: int) -> Examples:
        rng = begin(self, seed, step, rows, length)
        tokens_BT = rng.integers(0, self.vocab_size, (rows, length), dtype=np.int32)
        targets_BT = np.full_like(tokens_BT, UNSCORED)
        targets_BT[:, -1] = tokens_BT[:, 0]
        return Examples(tokens_BT, targets_BT, {"first": np.repeat(tokens_BT[:, :1], length, axis=1)})

    def chance(self, length: int) -> float:
        return 1 / self.vocab_size

    def fixed_state(self, length: int, bits: float) -> float:
        return listed(bits, self.vocab_size)


def test_it_is_scored():
    task = First(vocab_size=4)
    always_1 = lambda tokens_BT: np.eye(4)[np.ones_like(tokens_BT)]
    found = score(always_1, task, length=9, rows=200)
    assert found.accuracies("first") == {0: 0, 1: 1, 2: 0, 3: 0}
    assert found.accuracy == pytest.approx(task.chance(9), abs=0.05) and task.fixed_state(9, bits=1) == 0.5


def test_what_does_not_fit_is_one_line():
    with pytest.raises(ConfigError, match=r"^length \(1\) must be at least 2 for a first token and a last one"):
        First().batch(0, 0, rows=1, length=1)
