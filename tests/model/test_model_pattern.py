# SPDX-License-Identifier: Apache-2.0
"""Patterns as groups and as nested loops: they spell the pattern, and compile the least."""

import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.config.find import read_config
from hybridlm.model.pattern import Group, Loop, groups, loops, places, shortest_period, spots

NEMOTRON_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"


def expand(cut) -> str:
    return "".join(group.unit * group.repeats for group in cut)


def cheapest(pattern: str) -> int:
    """Least total unit length over all ways to cut the pattern, each piece at its shortest period."""
    costs = []
    for n_cuts in range(len(pattern)):
        for cuts in itertools.combinations(range(1, len(pattern)), n_cuts):
            pieces = [pattern[i:j] for i, j in itertools.pairwise((0, *cuts, len(pattern)))]
            costs.append(sum(shortest_period(piece) for piece in pieces))
    return min(costs)


@given(st.text("M*-", min_size=1, max_size=40))
def test_expansion(pattern):
    assert expand(groups(pattern)) == pattern
    assert "".join(groups(pattern)[p.group].unit[p.position] for p in places(pattern)) == pattern


@given(st.text("ab", min_size=1, max_size=10))
def test_least_compiled_unless_periodic(pattern):
    cost = sum(len(group.unit) for group in groups(pattern))
    if shortest_period(pattern) < len(pattern):
        assert len(groups(pattern)) == 1
        assert cost == shortest_period(pattern)
    else:
        assert cost == cheapest(pattern)


@given(st.text("M*-", min_size=1, max_size=8), st.integers(2, 6))
def test_periodic_is_one_group_with_its_shortest_period(unit, repeats):
    (group,) = groups(unit * repeats)
    assert group.unit * group.repeats == unit * repeats
    assert len(group.unit) <= len(unit)
    assert shortest_period(group.unit) == len(group.unit)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("M", [("M", 1)]),
        ("M" * 48, [("M", 48)]),
        ("M-M-M-M*-" * 6, [("M-M-M-M*-", 6)]),
        ("M-M-M-*-", [("M-", 3), ("*-", 1)]),
    ],
)
def test_known(pattern, expected):
    assert groups(pattern) == tuple(Group(*group) for group in expected)


def test_irregular_published_order_has_few_groups():
    cut = groups(NEMOTRON_H_8B)
    assert expand(cut) == NEMOTRON_H_8B
    assert len(cut) <= 4
    assert sum(len(group.unit) for group in cut) <= 20


def test_depth_does_not_change_what_is_compiled():
    assert [g.unit for g in groups("M-*-" * 3)] == [g.unit for g in groups("M-*-" * 300)]


def test_places_name_repeats():
    found = [(p.group, p.position, p.repeat) for p in places("ababa")]
    assert found == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0)]


def steps(program, depth_of):
    """Symbols and depths in the order in which the program runs them; depth_of: how often each spot was run before."""
    for part in program:
        if isinstance(part, Loop):
            for _ in range(part.repeats):
                yield from steps(part.parts, depth_of)
        else:
            yield part.symbol, part.depths[depth_of.setdefault(part.number, 0)]
            depth_of[part.number] += 1


@functools.cache
def fewest_spots(pattern: str) -> int:
    """By cutting every piece in two at every place, and taking one repeat of every piece that is periodic."""
    costs = [fewest_spots(pattern[:i]) + fewest_spots(pattern[i:]) for i in range(1, len(pattern))]
    period = shortest_period(pattern)
    return min(
        [1] if len(pattern) == 1 else costs + ([fewest_spots(pattern[:period])] if period < len(pattern) else [])
    )


@given(st.text("M*-", min_size=1, max_size=24), st.integers(1, 6))
def test_loops_run_the_pattern(pattern, unroll):
    program = loops(pattern, unroll)
    assert list(steps(program, {})) == [(symbol, depth) for depth, symbol in enumerate(pattern)]
    assert [spot.number for spot in spots(pattern, unroll)] == list(range(len(spots(pattern, unroll))))
    repeats = [part.repeats for part in _loops_of(program) if part.repeats > 1]
    assert all(n > unroll for n in repeats)


def _loops_of(parts):
    for part in parts:
        if isinstance(part, Loop):
            yield part
            yield from _loops_of(part.parts)


@given(st.text("ab", min_size=1, max_size=12))
def test_loops_compile_the_least(pattern):
    assert len(spots(pattern)) == fewest_spots(pattern)


@pytest.mark.parametrize(
    ("name", "n_groups", "n_spots"),
    [
        ("hybrid_1b", 16, 4),
        ("hybrid_125m", 12, 4),
        ("hybrid_8b", 13, 7),
        ("nemotron_h:47b", 24, 20),
        ("mamba2_1b", 1, 1),
    ],
)
def test_sublayers_compiled(name, n_groups, n_spots):
    pattern = read_config(name).model.pattern
    assert sum(len(group.unit) for group in groups(pattern)) == n_groups
    assert len(spots(pattern)) == n_spots
    assert len(spots(pattern, unroll=len(pattern))) == len(pattern)
