# SPDX-License-Identifier: Apache-2.0
"""Examples of a task packed into rows as training packs documents, each a document of its own.

Axis letters: E examples, N answers of an example, B rows of a batch, T tokens of a row, C places that are read at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybridlm.probes.scoring import places
from hybridlm.probes.task import Examples

AT_ONCE = 64
"""C: logits of so many places of each row are in memory at once."""


@dataclass(frozen=True)
class Shape:
    """Of the batches of a program."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Asked:
    """Places of a batch that are read together, and what they are of."""

    at_BC: np.ndarray
    """int32; 0 where a row has no more of them."""
    row_n: np.ndarray
    """Of each that is one, its row in at_BC ..."""
    column_n: np.ndarray
    """... and column; ..."""
    example_n: np.ndarray
    """... the example that it is of ..."""
    answer_n: np.ndarray
    """... and the number of its answer."""


class Packed:
    """Examples in batches; a row has as many as fit."""

    def __init__(self, examples: Examples, shape: Shape, room: int = 0):
        """room: cells in front of each example, for the prefix tokens of a model."""
        self.examples, self.shape, self._room = examples, shape, room
        self._span = examples.tokens_BT.shape[1] + room
        self._a_batch = shape.rows * (shape.tokens // self._span)
        self.at_EN, self.real_EN = places(examples.scored_BT)

    def __len__(self) -> int:
        return -(-len(self.at_EN) // self._a_batch)

    def batches(self) -> Iterator[tuple[dict[str, np.ndarray], list[Asked]]]:
        """(int32 [B, T] `tokens`, `segment_ids`, `positions`; what is asked of them), one after the other."""
        return zip(self._inputs, self._asked)

    @cached_property
    def _places_E(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(batch, row, first token) of each example; rows fill up together."""
        batch, within = np.divmod(np.arange(len(self.at_EN)), self._a_batch)
        slot, row = np.divmod(within, self.shape.rows)
        return batch, row, slot * self._span

    @cached_property
    def _inputs(self) -> list[dict[str, np.ndarray]]:
        B, T = self.shape.rows, self.shape.tokens
        names = ("tokens", "segment_ids", "positions")
        found = [{name: np.zeros((B, T), np.int32) for name in names} for _ in range(len(self))]
        for example, (batch, row, start) in enumerate(zip(*self._places_E)):
            cells, stop = found[batch], start + self._span
            cells["tokens"][row, start + self._room : stop] = self.examples.tokens_BT[example]
            cells["segment_ids"][row, start:stop] = start // self._span + 1
            cells["positions"][row, start:stop] = np.arange(self._span)
        return found

    @cached_property
    def _asked(self) -> list[list[Asked]]:
        batch_E, row_E, start_E = self._places_E
        example, answer = np.nonzero(self.real_EN)
        batch, row = batch_E[example], row_E[example]
        at = start_E[example] + self._room + self.at_EN[example, answer]
        return [self._of_batch(*(a[batch == i] for a in (row, at, example, answer))) for i in range(len(self))]

    def _of_batch(self, row, at, example, answer) -> list[Asked]:
        """In as many reads as the row needs that has most."""
        order = np.argsort(row, kind="stable")
        row, at, example, answer = (a[order] for a in (row, at, example, answer))
        number = np.arange(len(row)) - np.searchsorted(row, row)  # of an answer in its row
        found = []
        for first in range(0, int(number.max(initial=-1)) + 1, AT_ONCE):
            here = (number >= first) & (number < first + AT_ONCE)
            column = number[here] - first
            at_BC = np.zeros((self.shape.rows, AT_ONCE), np.int32)
            at_BC[row[here], column] = at[here]
            found.append(Asked(at_BC, row[here], column, example[here], answer[here]))
        return found
