# SPDX-License-Identifier: Apache-2.0
"""The bound of a fixed state against the best of all machines there are, in cases small enough to try them all."""

import itertools
import math
from collections import Counter, defaultdict

import pytest

from hybridlm.probes import (
    MQAR,
    InContextRegression,
    InductionHeads,
    Needle,
    NShotClassification,
    SelectiveCopying,
    StateTracking,
    StringCopying,
)
from hybridlm.probes.bounds import fano
from tests.probes.test_probes import CASES


def best(answers: list[tuple], states: int, shown: bool) -> float:
    """Mean accuracy of the best machine: of every map from what is to be remembered (all as likely) to a state, with
    the likeliest answer in each state. shown: the answers before the one that is asked are read, too."""
    n, found = len(answers[0]), 0
    for state_of in itertools.product(range(states), repeat=len(answers)):
        right = 0
        for i in range(n):
            counts = defaultdict(Counter)
            for state, answer in zip(state_of, answers, strict=True):
                counts[state, answer[:i] if shown else ()][answer[i]] += 1
            right += sum(max(of_state.values()) for of_state in counts.values())
        found = max(found, right)
    return found / n / len(answers)


words = lambda choices, n: list(itertools.product(range(choices), repeat=n))
orders = lambda choices, n: list(itertools.permutations(range(choices), n))
TINY = {
    "mqar": (MQAR(pairs=2, vocab_size=6), 8, orders(3, 2), False),
    "selective_copying": (SelectiveCopying(memorise=2, vocab_size=5), 9, words(3, 2), False),
    "induction_heads": (InductionHeads(vocab_size=4), 9, words(3, 1), False),
    "copying": (StringCopying(letters=2), 7, words(2, 3), True),
    "needle": (Needle(over="tokens", tokens=8, digits=2), 9, words(2, 2), True),
    "two needles": (Needle(needles=2, over="tokens", tokens=8, digits=1), 9, words(2, 2), False),
    "regression": (InContextRegression(inputs=1, most_x=1, most_w=1), 9, words(3, 1), False),
    "classification": (NShotClassification(classes=3), 80, orders(3, 3), False),
}
"""Name -> (task, length, all that may have to be remembered, whether earlier answers are shown)."""
EXACT = ("induction_heads", "regression")


@pytest.mark.parametrize("name", TINY)
def test_no_machine_is_better(name):
    task, length, answers, shown = TINY[name]
    for states in (1, 2, 3):
        if states ** len(answers) > 20_000:
            continue
        bound, found = task.fixed_state(length, math.log2(states)), best(answers, states, shown)
        assert found <= bound + 1e-9, (states, found, bound)
        assert bound - found <= (1e-9 if name in EXACT else 0.34), (states, found, bound)
    assert task.fixed_state(length, math.log2(len(answers))) == 1


@pytest.mark.parametrize("choices", [2, 3, 26])
def test_fano_is_exact_where_all_mistakes_are_as_likely(choices):
    """An answer that is right with probability p, and else any other alike, has as many bits left as the bound says."""
    for p in (0.99, 0.7, 0.55):
        left = -sum(q * math.log2(q) for q in [p, *[(1 - p) / (choices - 1)] * (choices - 1)])
        for n in (1, 40):
            assert fano(n * (math.log2(choices) - left), n, choices, n * math.log2(choices)) == pytest.approx(p)


def test_products_need_the_product_before():
    """Two elements of S3: a machine whose state is told by the first, and which then sees the second."""
    task, products = StateTracking("S3"), orders(3, 3)
    index = {p: i for i, p in enumerate(products)}
    times = lambda a, b: index[tuple(products[b][i] for i in products[a])]
    for states in (1, 2):
        found = 0
        for state_of in itertools.product(range(states), repeat=6):
            counts = defaultdict(Counter)
            for a, b in itertools.product(range(6), repeat=2):
                counts[state_of[a], b][times(a, b)] += 1
            found = max(found, sum(max(of.values()) for of in counts.values()) / 36)
        assert task.fixed_state(2, math.log2(states)) == pytest.approx((1 + found) / 2)
    assert StateTracking("Z2").fixed_state(64, 1) == 1 and StateTracking("Z2").fixed_state(64, 0) == 65 / 128


@pytest.mark.parametrize("name", CASES)
def test_more_state_is_no_worse(name):
    """From at least chance without a state to all with a large one, and never back."""
    task, length = CASES[name]
    bounds = [task.fixed_state(length, bits) for bits in (0, 1, 2, 5, 10, 30, 100, 300, 1000, 10_000)]
    assert task.chance(length) - 1e-9 <= bounds[0] and bounds == sorted(bounds) and bounds[-1] == 1
    assert bounds[0] < 1


def test_what_has_to_be_remembered():
    """Bits from which on nothing is lost: all numbers that may be asked."""
    for task, length, bits in (
        (MQAR(pairs=2, vocab_size=6), 8, math.log2(6)),
        (SelectiveCopying(), 64, 16 * math.log2(14)),
        (StringCopying(), 41, 20 * math.log2(26)),
        (Needle(needles=3), 400, 3 * math.log2(9 * 10**6)),
        (CASES["phonebook of 4"][0], 300, 2 * math.log2(4 * 10**9)),
        (CASES["variable_tracking"][0], 400, sum(math.log2(26**5 - i) for i in range(5))),
    ):
        assert task.fixed_state(length, bits * 1.000001) == 1
        assert task.fixed_state(length, bits * 0.9) < 1
