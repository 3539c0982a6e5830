# SPDX-License-Identifier: Apache-2.0
"""Tasks in text: rows of bytes, as the byte tokenizer numbers them, that end in the answer; words to make text of."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from hybridlm.probes.task import Examples, unscored

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


def hide(hay: Sequence[int], gaps: Sequence[int], pieces: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
    """Hay with pieces in it, each at the gap nearest to its share of the hay; pieces at one gap stand as given.

    gaps: places between tokens of the hay, in order, where it may be cut. pieces: (0.0 .. 1.0, tokens).
    """
    at = [int(np.abs(np.asarray(gaps) - share * len(hay)).argmin()) for share, _ in pieces]
    found: list[int] = []
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
