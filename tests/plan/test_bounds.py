# SPDX-License-Identifier: Apache-2.0
"""Between which times a step lies: never upside down, and what devices send is what no algorithm can do without."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.plan.bounds import bounds, cost, on_the_wire
from hybridlm.plan.classes import CLASSES
from hybridlm.plan.collectives import KINDS, Collective
from hybridlm.plan.slices import read_devices
from hybridlm.plan.work import Counts, Work

NUMBERS = st.floats(0, 1e15)
SOURCES = st.sampled_from(["M.Mamba2/project/x", "E.MoE/experts/x", "optimizer/x", "x"])
GROUPS = st.sampled_from([(0, 1), (0, 1, 2, 3), (0, 32), tuple(range(64)), (0, 8)])


@given(
    st.dictionaries(st.sampled_from(CLASSES), st.tuples(NUMBERS, NUMBERS)),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 10**12), SOURCES, GROUPS), max_size=5),
    st.sampled_from(["2xv5e:4x8", "v5p:4x4x4", "h100:64", "tpu7x:2x4x4"]),
)
def test_the_lower_end_is_lower(work, exchanges, words):
    devices = read_devices(words)
    counts = Counts()
    for name, (flops, size) in work.items():
        counts.by_class[name].add(Work(flops, size))
    made = [Collective(kind, "", 2, size, "", source, group) for kind, size, source, group in exchanges]
    found = bounds(counts, made, devices)
    assert 0 <= found.lower <= found.upper * (1 + 1e-12)
    peak = devices.peaks
    assert found.lower * peak.tflops * 1e12 >= sum(flops for flops, _ in work.values()) * (1 - 1e-12)
    assert found.lower * peak.gbs * 1e9 >= sum(size for _, size in work.values()) * (1 - 1e-12)
    if found.lower:
        price = cost(found, devices, 10**6, 1e12, 1e12, 2.5)
        assert price.price[0] == pytest.approx(2.5 * devices.chips * 1e6 * found.lower / 3600)
        assert price.mfu[0] == pytest.approx(1e12 / (found.lower * peak.tflops * 1e12))


def test_on_the_wire():
    """On a ring of n, each device sends n - 1 of n parts to gather or scatter, and both to reduce for all."""
    for n in (2, 4, 7):
        part = 1000
        sent = sum(part for _ in range(n - 1))
        assert on_the_wire("all-gather", n * part, n) == pytest.approx(sent)
        assert on_the_wire("reduce-scatter", n * part, n) == pytest.approx(sent)
        assert on_the_wire("all-reduce", n * part, n) == pytest.approx(2 * sent)
    assert on_the_wire("all-reduce", 5, 1) == 0
    assert on_the_wire("collective-permute", 5, 2) == 5


def test_what_crosses_is_on_the_network():
    """A byte between slices takes the network's time, one within a slice the links'."""
    devices = read_devices("2xv5e:4x8")
    within, across = (
        bounds(Counts(), [Collective("all-gather", "", 1, 2 * 10**9, "", "x", group)], devices).upper
        for group in ((0, 1), (0, 32))
    )
    assert within == pytest.approx(1e9 / 100e9)  # two of four links of 50 GB/s
    assert across == pytest.approx(1e9 / 3.125e9)


def test_devices_without_peaks():
    with pytest.raises(ValueError, match=r"cpu:8.*no peaks"):
        bounds(Counts(), [], read_devices("cpu:8"))
