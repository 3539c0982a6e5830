# SPDX-License-Identifier: Apache-2.0
"""Pattern strings as groups of repeated units and as nested loops, so that programs do not grow with depth.

Groups say where parameters are stored: a stored run's parameters depend on `groups` and `places`. Loops say how the
model is run, and may be cut otherwise: a unit may itself hold runs, so fewer sublayers are compiled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, groupby


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
    best: list[tuple[int, int, tuple[Group, ...]]] = [(0, 0, ())] * (
        n + 1
    )  # of each suffix: total unit length, number of groups, the groups
    for start in reversed(range(n)):
        candidates: list[tuple[int, int, tuple[Group, ...]]] = []
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


@dataclass(frozen=True)
class Spot:
    """A sublayer of the program: compiled once, run at several depths."""

    symbol: str
    """What it is."""
    depths: tuple[int, ...]
    """Indices into the pattern, in the order in which they are run."""
    number: int
    """Index among the spots of the program."""


@dataclass(frozen=True)
class Loop:
    """Parts that are run one after the other, `repeats` times."""

    parts: tuple["Loop | Spot", ...]
    repeats: int

    def spots(self) -> list[Spot]:
        """The sublayers inside, in the order in which the first repeat runs them."""
        return [spot for part in self.parts for spot in (part.spots() if isinstance(part, Loop) else [part])]


@cache
def loops(pattern: str, unroll: int = 1) -> tuple[Loop, ...]:
    """The program of a pattern: nested loops with the fewest spots, of such with the fewest loops.

    unroll: loops of up to so many repeats are written out.
    """
    parts = _unrolled(_nest(pattern)[1], unroll)
    numbers = count()
    program, start = [], 0
    for repeats, inside in _merged(parts):
        program.append(_placed(inside, repeats, [start], numbers))
        start += repeats * _length(inside)
    return tuple(program)


def spans(program: Sequence[Loop], length: int) -> list[tuple[Loop, ...]]:
    """The program cut into runs of at least `length` sublayers, the last perhaps of fewer; loops of more than one
    repeat are not cut."""
    made: list[list[Loop | Spot]] = [[]]
    room = length
    for part in (part for loop in program for part in (loop.parts if loop.repeats == 1 else [loop])):
        if room <= 0:
            made.append([])
            room = length
        made[-1].append(part)
        room -= 1 if isinstance(part, Spot) else sum(len(spot.depths) for spot in part.spots())
    return [(Loop(tuple(parts), 1),) for parts in made]


def spots(pattern: str, unroll: int = 1) -> list[Spot]:
    """The sublayers of the program, by their numbers."""
    return [spot for loop in loops(pattern, unroll) for spot in loop.spots()]


@cache
def _nest(pattern: str) -> tuple[tuple[int, int], tuple]:
    """((spots, loops), parts) of the cheapest program; a part is a symbol or (repeats, parts)."""
    n = len(pattern)
    best: list[tuple[tuple[int, int], tuple]] = [((0, 0), ())] * (n + 1)  # of each suffix
    for start in reversed(range(n)):
        (n_spots, n_loops), rest = best[start + 1]
        candidates: list[tuple[tuple[int, int], tuple]] = [((n_spots + 1, n_loops), (pattern[start], *rest))]
        for length in range(1, (n - start) // 2 + 1):
            unit, stop = pattern[start : start + length], start + length
            while pattern[stop : stop + length] == unit:
                stop += length
                (unit_spots, unit_loops), inside = _nest(unit)
                (n_spots, n_loops), rest = best[stop]
                part = ((stop - start) // length, inside)
                candidates.append(((unit_spots + n_spots, unit_loops + n_loops + 1), (part, *rest)))
        best[start] = min(candidates, key=lambda candidate: candidate[0])
    return best[0]


def _unrolled(parts: tuple, unroll: int) -> tuple:
    """Parts with the loops of up to so many repeats written out."""
    made: list = []
    for part in parts:
        if isinstance(part, str):
            made.append(part)
            continue
        repeats, inside = part[0], _unrolled(part[1], unroll)
        made += inside * repeats if repeats <= unroll else [(repeats, inside)]
    return tuple(made)


def _merged(parts: tuple) -> list:
    """Neighbouring symbols as one loop of one repeat."""
    return [
        part
        for is_symbol, run in groupby(parts, lambda part: isinstance(part, str))
        for part in ([(1, tuple(run))] if is_symbol else run)
    ]


def _length(parts: tuple) -> int:
    """Sublayers run by parts."""
    return sum(1 if isinstance(part, str) else part[0] * _length(part[1]) for part in parts)


def _placed(parts: tuple, repeats: int, starts: list[int], numbers: Iterator[int]) -> Loop:
    """Parts as a loop that is begun at each of the depths `starts`."""
    size = _length(parts)
    made: list[Spot | Loop] = []
    starts = [start + i * size for start in starts for i in range(repeats)]
    offset = 0
    for part in parts:
        here = [start + offset for start in starts]
        if isinstance(part, str):
            made.append(Spot(part, tuple(here), next(numbers)))
        else:
            made.append(_placed(part[1], part[0], here, numbers))
        offset += _length((part,))
    return Loop(tuple(made), repeats)
