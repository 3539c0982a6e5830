# SPDX-License-Identifier: Apache-2.0
"""Pattern strings as groups of repeated units: what the model scans over, so that programs do not grow with depth."""

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Group:
    """`repeats` copies of the symbols `unit`, one after the other: one scan of length `repeats`."""

    unit: str
    """Symbols of one repeat; each is compiled once."""
    repeats: int
    """Times the unit is run, with parameters of its own each time."""

    @property
    def depth(self) -> int:
        """Sublayers of the group."""
        return len(self.unit) * self.repeats


@dataclass(frozen=True)
class Place:
    """Where a sublayer of the pattern lives."""

    group: int
    """Index into `groups(pattern)`."""
    position: int
    """Index into the group's unit."""
    repeat: int
    """Index along the stacked axis of its parameters."""


def shortest_period(pattern: str) -> int:
    """Length of the shortest unit whose repetition is the whole pattern; len(pattern) where there is none shorter."""
    return (pattern + pattern).index(pattern, 1)


@cache
def groups(pattern: str) -> tuple[Group, ...]:
    """Groups whose expansion is `pattern`.

    A periodic pattern is one group with its shortest period. Any other is cut so that the units' total length, which is
    what is compiled, is least; of such cuts, one with the fewest groups, the first as deep as possible.
    """
    period = shortest_period(pattern)
    if period < len(pattern):
        return (Group(pattern[:period], len(pattern) // period),)
    n = len(pattern)
    best = [(0, 0, ())] * (n + 1)  # of each suffix: total unit length, number of groups, the groups
    for start in reversed(range(n)):
        candidates = []
        for length in range(1, n - start + 1):
            unit = pattern[start : start + length]
            stop = start + length
            while True:
                cost, count, rest = best[stop]
                group = Group(unit, (stop - start) // length)
                candidates.append((length + cost, 1 + count, (group, *rest)))
                if pattern[stop : stop + length] != unit:
                    break
                stop += length
        best[start] = min(candidates, key=lambda candidate: (*candidate[:2], -candidate[2][0].depth))
    return best[0][2]


def places(pattern: str) -> tuple[Place, ...]:
    """The place of each sublayer of the pattern, first to last."""
    return tuple(
        Place(g, position, repeat)
        for g, group in enumerate(groups(pattern))
        for repeat in range(group.repeats)
        for position in range(len(group.unit))
    )
