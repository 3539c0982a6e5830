# SPDX-License-Identifier: Apache-2.0
"""Stacks over groups and over spots hold the same numbers."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridlm.model import stacks
from hybridlm.model.pattern import groups, places, spots
from pallas_kernels.platform import assume_platform

PATTERNS = st.one_of(
    st.text("M-", min_size=1, max_size=10), st.sampled_from(["MM*-MM*-a", "M-M-M*-M-M-M*-M-", "a--MM---"])
)


def by_group(pattern: str) -> list:
    """Trees whose numbers say their depth."""
    made = [[np.zeros((group.repeats, 2)) for _ in group.unit] for group in groups(pattern)]
    for depth, place in enumerate(places(pattern)):
        made[place.group][place.position][place.repeat] = depth
    return jax.tree.map(lambda a: {"w": a, "b": a[:, 0]}, made)


@given(PATTERNS, st.integers(1, 8))
@settings(max_examples=30)
def test_there_and_back(pattern, unroll):
    stored = by_group(pattern)
    stacked = stacks.stack(pattern, unroll, stored)
    for spot, tree in zip(spots(pattern, unroll), stacked, strict=True):
        np.testing.assert_array_equal(tree["b"], spot.depths)
        np.testing.assert_array_equal(tree["w"], np.repeat(np.array(spot.depths)[:, None], 2, 1))
    jax.tree.map(np.testing.assert_array_equal, stacks.spread(pattern, unroll, stacked), stored)


def test_two_large_arrays_are_added_up_on_gpus():
    numbers = np.random.default_rng(0).normal(size=(2, 3, stacks.LARGE)).astype("f")
    stored = [[{"large": numbers, "small": numbers[:, 0, :4]}] * 2]
    spread, stacked = jax.jit(lambda trees: stacks.spread("M-M-", 4, trees)), stacks.stack("M-M-", 4, stored)
    with assume_platform("gpu"):
        assert str(spread.trace(stacked).jaxpr).count(" pad[") == 4  # two of each position's large one
        jax.tree.map(np.testing.assert_array_equal, spread(stacked), stored)
