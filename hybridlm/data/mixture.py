# SPDX-License-Identifier: Apache-2.0
"""Rows of several sources in fixed shares, in closed form: row k of a mixture is row j of source i.

Within a period the rows of each source lie as evenly as they can, so that any stretch of the mixture has the shares of
its weights to within a row. Where a source has given all that it may, the others share its rows from there on.
Written out, because the order has to outlive versions of libraries, and a checkpoint has to know how far each source
was read.
"""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hybridlm.errors import require

SHARES = 100_000
"""Weights count to this part of their sum."""


class _Stretch(NamedTuple):
    """From row `start` on the sources take turns by one table."""

    start: int
    given: tuple[int, ...]
    """Rows that each source gave before."""
    source: np.ndarray
    """Of each row of a period, int64 [period]."""
    rank: np.ndarray
    """Which of its source's rows in the period it is."""
    each: np.ndarray
    """Rows of each source in a period, int64 [sources]."""


class Mixture:
    """Where each row of a mixture comes from."""

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]):
        """limits: rows that each source gives at most; None: without end."""
        self._stretches: list[_Stretch] = []
        self.length: int | None = 0
        """Rows until all sources are used up; None: without end."""
        given, start = (0,) * len(weights), 0
        while True:
            active = [limit is None or n < limit for n, limit in zip(given, limits)]
            if not any(active):
                self.length = start
                return
            self._stretches.append(_stretch(start, given, [w if a else 0.0 for w, a in zip(weights, active)]))
            ends = [
                self._place(source, limit)
                for source, limit in enumerate(limits)
                if limit is not None and active[source]
            ]
            if not ends:
                self.length = None
                return
            start = min(ends)
            given = self.counts(start)

    def at(self, row: int) -> tuple[int, int]:
        """(source, which of its rows) of a row."""
        stretch = self._stretch_of(row)
        period, place = divmod(row - stretch.start, len(stretch.source))
        source = int(stretch.source[place])
        return source, stretch.given[source] + period * int(stretch.each[source]) + int(stretch.rank[place])

    def counts(self, row: int) -> tuple[int, ...]:
        """How many rows of each source come before a row."""
        if not self._stretches:
            return ()
        stretch = self._stretch_of(row)
        period, place = divmod(row - stretch.start, len(stretch.source))
        begun = np.bincount(stretch.source[:place], minlength=len(stretch.each))
        return tuple(int(n) for n in np.array(stretch.given) + period * stretch.each + begun)

    def _stretch_of(self, row: int) -> _Stretch:
        return self._stretches[bisect.bisect_right(self._stretches, row, key=lambda stretch: stretch.start) - 1]

    def _place(self, source: int, limit: int) -> int:
        """The row after the last one that a source may give, in the newest stretch."""
        stretch = self._stretches[-1]
        period, rank = divmod(limit - stretch.given[source] - 1, int(stretch.each[source]))
        place = int(np.flatnonzero(stretch.source == source)[rank])
        return stretch.start + period * len(stretch.source) + place + 1


def _stretch(start: int, given: tuple[int, ...], weights: Sequence[float]) -> _Stretch:
    each = np.array(shares(weights), np.int64)
    each //= math.gcd(*each.tolist())
    source = np.repeat(np.arange(len(each)), each)
    rank = np.arange(len(source)) - np.repeat(np.cumsum(each) - each, each)
    order = np.lexsort((source, (rank + 0.5) / each[source]))
    return _Stretch(start, given, source[order], rank[order], each)


def shares(weights: Sequence[float]) -> list[int]:
    """Whole numbers with the sum SHARES, in the proportions of the weights; ConfigError for one that comes to none."""
    total = sum(weights)
    exact = [SHARES * weight / total for weight in weights]
    whole = [math.floor(share) for share in exact]
    largest = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in largest[: SHARES - sum(whole)]:
        whole[i] += 1
    for weight, share in zip(weights, whole):
        require(share or not weight, f"data.weights ({weight}) is less than 1/{SHARES} of their sum: leave it out")
    return whole
