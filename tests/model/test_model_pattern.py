# SPDX-License-Identifier: Apache-2.0
"""Patterns as groups: they spell the pattern, compile the least, and keep one scan for what is periodic."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.model.pattern import Group, groups, places, shortest_period

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
