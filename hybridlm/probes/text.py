# SPDX-License-Identifier: Apache-2.0
"""Tasks in text: rows of letters that end in the answer, as bytes or (`tokenised`) any tokens; words to make text of.

A story is a row of text before it has its length: what is hidden in it, the question, the answer. All texts are ASCII,
so that letters are bytes.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hybridlm.probes.task import Examples, Task, begin, unscored

BYTES = 256
"""Tokens of text; bos and eos of the byte tokenizer stand behind them."""
DIGITS = np.frombuffer(b"0123456789", np.uint8).astype(np.int32)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The haystack of RULER's own noise."""

_FIRST = (
    "Ada Alan Amina Anton Beatriz Carl Chidi Clara Dmitri Elena Emeka Fatima Grace Hana Igor Ines "
    "Jonas Kenji Leila Marta Noor Oscar Priya Rosa Samir Sofia Tariq Ursula Viktor Wanda Yusuf Zoe"
)
_LAST = (
    "Abbott Banerjee Castillo Dubois Eriksen Fischer Garcia Haddad Ivanova Jensen Kowalski Larsen Moreau Nakamura "
    "Okafor Petrov Quinn Rossi Santos Tanaka Ueda Vargas Weber Xu Yamada Zhang Novak Khan Silva Mbeki Lindqvist Osei"
)
NAMES = [f"{first} {last}" for first, last in itertools.product(_FIRST.split(), _LAST.split())]

_QUALITIES = (
    "amber brisk calm distant eager faint gentle hollow idle jolly keen lively mellow narrow ornate pale quiet rapid "
    "silver timid upper vivid wooden young"
)
_THINGS = (
    "anchor basket candle desert engine forest garden hammer island jacket kettle ladder meadow needle orchard pillow "
    "quarry ribbon saddle temple urchin valley window zipper"
)
KEYS = [f"{quality}-{thing}" for quality, thing in itertools.product(_QUALITIES.split(), _THINGS.split())]


@dataclass(frozen=True)
class Story:
    """A row of text: hay that fills it up, with pieces hidden in it, and a question that ends in the answer."""

    hay: str
    """Said over and over, each time to its end; of the first time, as many letters as fit."""
    behind: str
    """Signs behind which hay may be cut."""
    pieces: Sequence[tuple[float, str]]
    """(share of the hay that stands before it, 0.0 .. 1.0; what is hidden there)."""
    question: str
    """With the answer at its end."""
    asked: Sequence[bool]
    """Of each letter of the answer, whether it is scored: signs between are not."""
    facets: Mapping[str, Sequence[int]]
    """By name, of each letter of the answer."""

    def text(self, size: int) -> str:
        """The row of so many letters."""
        hay = repeated(self.hay, size - sum(len(piece) for _, piece in self.pieces) - len(self.question))
        gaps = cuts(hay, self.behind) if self.pieces else []
        return "".join(hide(hay, gaps, self.pieces)) + self.question


class TextTask(Task, Protocol):
    """A task in text; as a `Task`, it has rows of bytes."""

    @property
    def letters(self) -> str:
        """Of which answers are made."""

    @property
    def least(self) -> tuple[int, str]:
        """(letters of the shortest row that can be, less the last one; the fields that make it so long)."""

    def stories(self, rng: np.random.Generator, step: int, rows: int, size: int) -> list[Story]:
        """Rows for `size` letters each, the ones after those of the steps before."""

    def askable(self, length: int) -> tuple[int, float]:
        """(letters, bits together) of all answers that may be asked of a row of `length` + 1 letters."""


def in_bytes(task: TextTask, seed: int, step: int, rows: int, length: int) -> Examples:
    """`Task.batch` of a task in text."""
    stories = task.stories(begin(task, seed, step, rows, length), step, rows, length + 1)
    found = [list(story.text(length + 1).encode()) for story in stories]
    facets = {name: np.array([story.facets[name] for story in stories]) for name in stories[0].facets}
    return ending(found, np.array(stories[0].asked), facets)


def longest(words: Iterable[str]) -> int:
    """Letters of the longest."""
    return max(map(len, words))


def number(rng: np.random.Generator, first: str, digits: int) -> str:
    """A number of so many digits, the first of which is one of `first`."""
    return rng.choice(list(first)) + "".join(map(str, rng.integers(0, 10, digits - 1)))


def ending(rows: Sequence[Sequence[int]], asked_N: np.ndarray, facets: Mapping[str, np.ndarray]) -> Examples:
    """Examples of rows of one token more than they are to have, whose last N tokens are the answer.

    asked_N: bool, which of them are scored: signs between are not. facets: int [B, N] or [B, 1] or [N].
    """
    row_BT = np.array(rows, np.int32)
    n, (count, length) = len(asked_N), row_BT[:, 1:].shape
    targets_BT = unscored(count, length)
    targets_BT[:, -n:][:, asked_N] = row_BT[:, -n:][:, asked_N]
    of_tokens = {}
    for name, values in facets.items():
        of_tokens[name] = np.zeros((count, length), np.int32)
        of_tokens[name][:, -n:] = values
    return Examples(row_BT[:, :-1].copy(), targets_BT, of_tokens)


def hide(hay: Sequence, gaps: Sequence[int], pieces: Sequence[tuple[float, Sequence]]) -> list:
    """Hay with pieces in it, each at the gap nearest to its share of the hay; pieces at one gap stand as given.

    Of tokens, or of letters. gaps: places between them in the hay, in order, where it may be cut. pieces: (0.0 .. 1.0,
    tokens).
    """
    at = [int(np.abs(np.asarray(gaps) - share * len(hay)).argmin()) for share, _ in pieces]
    found: list[Any] = []
    before = 0
    for i in sorted(range(len(pieces)), key=lambda i: at[i]):
        found += [*hay[before : gaps[at[i]]], *pieces[i][1]]
        before = gaps[at[i]]
    return [*found, *hay[before:]]


def repeated(text: str, size: int) -> str:
    """The last `size` letters of a text that is said over and over, each time to its end."""
    return (text * (size // len(text) + 1))[len(text) * (size // len(text) + 1) - size :]


def cuts(hay: str, behind: str) -> list[int]:
    """Where a text may be cut: at its ends, and behind each of these signs."""
    inner = (i + len(behind) for i in range(len(hay)) if hay.startswith(behind, i))
    return sorted({0, *inner, len(hay)})
