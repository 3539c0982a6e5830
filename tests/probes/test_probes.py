# SPDX-License-Identifier: Apache-2.0
"""Tasks against solvers that read tokens alone and against guesses, their facets, and what cannot be."""

import re
import zlib
from dataclasses import replace

import numpy as np
import pytest

from hybridlm import probes
from hybridlm.errors import ConfigError
from hybridlm.probes import (
    MQAR,
    PROBES,
    InContextRegression,
    InductionHeads,
    Needle,
    NShotClassification,
    Phonebook,
    SelectiveCopying,
    StateTracking,
    StringCopying,
    VariableTracking,
)
from tests.probes.solvers import SOLVERS

CASES = {
    "mqar": (MQAR(pairs=5, vocab_size=32), 41),
    "mqar plain": (MQAR(pairs=3, vocab_size=12, random_filler=False, power=1.0), 12),
    "selective_copying": (SelectiveCopying(memorise=7, vocab_size=9), 50),
    "selective_copying, no noise": (SelectiveCopying(memorise=4), 8),
    "induction_heads": (InductionHeads(), 40),
    "induction_heads, shortest": (InductionHeads(vocab_size=4), 3),
    "copying": (StringCopying(), 41),
    "copying, even": (StringCopying(letters=3), 40),
    "phonebook": (Phonebook(), 300),
    "phonebook of 4": (Phonebook(entries=4), 300),
    "needle": (Needle(), 400),
    "needle, 3 keys": (Needle(needles=3, depths=(10, 90)), 333),
    "needle, tokens": (Needle(needles=4, over="tokens", tokens=64, digits=3), 61),
    "variable_tracking": (VariableTracking(), 400),
    "variable_tracking, 3 chains": (VariableTracking(hops=2, chains=3), 417),
    "Z2": (StateTracking("Z2"), 33),
    "Z60": (StateTracking("Z60"), 17),
    "S3": (StateTracking("S3"), 17),
    "A4xZ5": (StateTracking("A4xZ5"), 9),
    "A5": (StateTracking("A5"), 9),
    "S5": (StateTracking("S5"), 9),
    "regression": (InContextRegression(inputs=3), 49),
    "regression, one input": (InContextRegression(inputs=1, most_x=3, most_w=5), 13),
    "classification": (NShotClassification(), 80),
    "classification, exact": (NShotClassification(classes=7, width=2, noise=0, symbols=9), 61),
}
"""Name -> (task, length)."""
each = pytest.mark.parametrize("name", CASES)


@each
def test_a_solver_that_reads_tokens_alone_is_always_right(name):
    task, length = CASES[name]
    solve, n = SOLVERS[type(task).__name__], 0
    for step in range(2):
        examples = task.batch(3, step, 4, length)
        for row, targets in zip(examples.tokens_BT.tolist(), examples.targets_BT.tolist(), strict=True):
            places = [t for t, target in enumerate(targets) if target != probes.UNSCORED]
            assert places
            n += len(places)
            for t in places:
                assert solve(task, row[: t + 1]) == targets[t], (step, row, t)
    assert n >= 8


@each
def test_a_guess_is_right_by_chance(name):
    task, length = CASES[name]
    rng = np.random.default_rng(0)
    right, n = 0, 0
    for step in range(8):
        targets = task.batch(1, step, 64, length).targets_BT
        targets = targets[targets != probes.UNSCORED]
        right, n = right + int((rng.choice(task.answers, len(targets)) == targets).sum()), n + len(targets)
        assert np.isin(targets, task.answers).all()
    p = task.chance(length)
    assert abs(right / n - p) <= 4 * np.sqrt(p * (1 - p) / n), (right, n)


@each
def test_a_batch_is_a_function_of_seed_and_step(name):
    task, length = CASES[name]
    first = task.batch(7, 2, 5, length)
    np.random.default_rng(0).random(9)
    again = replace(task).batch(7, 2, 5, length)
    for array in (first.tokens_BT, first.targets_BT, *first.facets.values()):
        assert array.shape == (5, length) and array.dtype == np.int32
    assert (first.tokens_BT == again.tokens_BT).all() and (first.targets_BT == again.targets_BT).all()
    assert all((first.facets[facet] == again.facets[facet]).all() for facet in first.facets)
    assert first.tokens_BT.min() >= 0 and first.tokens_BT.max() < task.vocab_size
    assert (first.scored_BT == (first.targets_BT >= 0)).all()
    for other in (task.batch(8, 2, 5, length), task.batch(7, 3, 5, length)):
        assert (first.tokens_BT != other.tokens_BT).any()


@pytest.mark.parametrize("name", PROBES)
def test_the_table_has_tasks_that_fit_a_row(name):
    task = PROBES[name]
    examples = task.batch(0, 0, 2, 1024)
    assert examples.scored_BT.any(axis=1).all()
    assert {type(task).__name__ for task in PROBES.values()} == set(SOLVERS)


DRAWN = {
    "mqar": 2008918976, "selective_copying": 27936355, "induction_heads": 3441327018, "copying": 1553888992,
    "phonebook": 2974297108, "needle": 3684455444, "needle_multikey": 3777624028, "variable_tracking": 3352319751,
    "parity": 432986296, "s5": 1005921552, "regression": 3137321182, "classification": 2127998202,
}  # fmt: skip
"""Checksums of batches, the same with NumPy 2.4 and 2.5: scores of two versions compare while they stand."""


@pytest.mark.parametrize("name", PROBES)
def test_batches_are_those_of_before(name):
    examples = PROBES[name].batch(1, 2, 3, 600)
    assert zlib.crc32(examples.tokens_BT.tobytes() + examples.targets_BT.tobytes()) == DRAWN[name]


# Facets and layout --------------------------------------------------------------------------------------------------


def facet_of(task, length, name, rows=64):
    examples = task.batch(0, 0, rows, length)
    return examples, examples.facets[name]


def test_distances_of_mqar_are_from_the_key_to_its_query():
    task, length = MQAR(pairs=6, vocab_size=64, random_filler=False), 64
    examples, distance = facet_of(task, length, "distance")
    for row, (tokens, scored) in enumerate(zip(examples.tokens_BT, examples.scored_BT, strict=True)):
        for t in np.flatnonzero(scored):
            first = int(np.flatnonzero(tokens == tokens[t])[0])
            assert distance[row, t] <= t - first < 2 * distance[row, t]
            assert (tokens == tokens[t]).sum() == 2 and first < 12 and t % 2 == 0


def test_gaps_of_mqar_follow_the_power_law():
    """The first query's place against weights j^(power - 1); with power 1 all places are as likely."""
    for power in (0.01, 1.0):
        task, length = MQAR(pairs=1, vocab_size=16, power=power), 22
        targets = np.concatenate([task.batch(0, step, 1000, length).targets_BT for step in range(4)])
        counts = np.bincount((targets.argmax(axis=1) - 2) // 2, minlength=10)
        weights = [j ** (power - 1) for j in range(1, 11)]
        expected = np.array([4000 * weight / sum(weights) for weight in weights])
        assert len(counts) == 10 and ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared, 9, p = 0.001


def test_places_of_copies():
    examples, place = facet_of(SelectiveCopying(memorise=5), 30, "place")
    assert (examples.scored_BT.nonzero()[1].reshape(64, 5) == np.arange(25, 30)).all()
    assert (place[:, 25:] == np.arange(5)).all() and (examples.tokens_BT[:, 25:] == 15).all()
    examples, place = facet_of(StringCopying(), 13, "place")
    assert place[examples.scored_BT].reshape(64, 6).tolist() == [[1, 2, 2, 4, 4, 4]] * 64


def test_the_distance_of_induction_heads():
    examples, distance = facet_of(InductionHeads(), 50, "distance")
    first = (examples.tokens_BT == 15).argmax(axis=1)
    assert ((examples.tokens_BT == 15).sum(axis=1) == 2).all() and len(set(first)) > 20
    assert ((distance[:, -1] <= 49 - first) & (49 - first < 2 * distance[:, -1])).all()


@pytest.mark.parametrize("over", ["bytes", "tokens"])
def test_needles_stand_at_each_depth_in_turn(over):
    depths = (0, 30, 60, 100)
    task, length = Needle(over=over, depths=depths), 3000
    for step in range(2):
        examples = task.batch(0, step, 6, length)
        for row, tokens in enumerate(examples.tokens_BT):
            wanted = depths[(6 * step + row) % 4]
            asked = examples.facets["depth"][row][examples.scored_BT[row]]
            assert asked.tolist() == [wanted] * 7
            if over == "bytes":
                text = bytes(tokens.tolist()).decode()
                needle = re.search(r"One of the special magic numbers for \S+ is: \d{7}\. ", text)
                at, size, question = needle.start(), len(needle[0]), text.index("\nThe special magic")
            else:
                at, size, question = tokens.tolist().index(0), 9, tokens.tolist().index(1)
            hay = question - size
            assert abs(100 * at / hay - wanted) <= (1.2 if over == "bytes" else 0.1), (wanted, at, hay)
            assert over == "tokens" or re.fullmatch(r".*\. |[^.]{,30}", text[:at])


def test_depths_and_entries_of_phonebooks():
    task = Phonebook(entries=6)
    examples = task.batch(0, 0, 40, 400)
    seen = set()
    for row, tokens in enumerate(examples.tokens_BT):
        book, examples_, name = bytes(tokens.tolist()).decode().lstrip("\n").split("\n\n")
        names = [line.split(": ")[0] for line in book.split("\n")]
        asked = name.split(": ")[0]
        assert len(names) == len(set(names)) == 6 and asked not in examples_ and examples_.count(": ") == 2
        depth = set(examples.facets["depth"][row][examples.scored_BT[row]].tolist())
        assert depth == {10 * (10 * names.index(asked) // 6)}
        seen |= depth
    assert len(seen) == 6 and examples.facets["entries"].max() == 6


def test_hops_of_variables():
    examples, hop = facet_of(VariableTracking(hops=2, chains=2), 400, "hop", rows=3)
    assert hop[examples.scored_BT].tolist() == 3 * [*5 * [0], *5 * [1], *5 * [2]]


def test_what_regression_asks_is_what_is_determined():
    """An x is asked where the rank of those before it does not grow by it, in exact arithmetic."""
    from fractions import Fraction

    def rank(vectors):
        rest, found = [[Fraction(v) for v in vector] for vector in vectors], 0
        for column in range(len(vectors[0]) if vectors else 0):
            pivot = next((row for row in rest if row[column]), None)
            if pivot is not None:
                rest.remove(pivot)
                found += 1
                rest = [[a - row[column] / pivot[column] * b for a, b in zip(row, pivot, strict=True)] for row in rest]
        return found

    task, length = InContextRegression(inputs=4, most_x=1), 49
    examples = task.batch(0, 0, 20, length)
    inputs = np.array([-1, 1])
    for tokens, scored, pairs in zip(examples.tokens_BT, examples.scored_BT, examples.facets["pairs"], strict=True):
        xs = [inputs[tokens[i : i + 4]].tolist() for i in range(0, 49, 5)]
        for i in range(len(xs)):
            assert scored[5 * i + 3] == (rank(xs[: i + 1]) == rank(xs[:i]))
            assert not scored[5 * i + 3] or pairs[5 * i + 3] <= i < 2 * pairs[5 * i + 3]
        assert scored.sum() == scored[3::5].sum() >= len(xs) - 4


def test_shots_are_items_of_the_class_before():
    task, length = NShotClassification(classes=3, noise=0, width=2, symbols=12), 60
    examples, shots = facet_of(task, length, "shots", rows=16)
    for row, tokens in enumerate(examples.tokens_BT):
        seen = {}
        for i in range(0, length, 3):
            item = tuple(tokens[i : i + 2].tolist())
            n = seen.get(item, 0)
            assert examples.scored_BT[row, i + 1] == (n > 0)
            assert not n or shots[row, i + 1] <= n < 2 * shots[row, i + 1]
            seen[item] = n + 1
        assert len(seen) <= 3


# What cannot be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MQAR(pairs=16, vocab_size=32), "pairs (16) above the 15 keys of vocab_size (32)"),
        (lambda: MQAR(pairs=0), "pairs (0) must be positive"),
        (lambda: MQAR(power=0.0), "power (0.0) must be positive"),
        (lambda: SelectiveCopying(vocab_size=2), "vocab_size (2) must be at least 3"),
        (lambda: InductionHeads(vocab_size=1), "vocab_size (1) must be at least 2"),
        (lambda: StringCopying(letters=-1), "letters (-1) must be positive"),
        (lambda: Phonebook(entries=2), "entries (2) must be at least 3"),
        (lambda: Phonebook(entries=1025), "entries (1025) must be at least 3, two of them examples, and at most 1024"),
        (lambda: Needle(depths=()), "depths (()) must be percents"),
        (lambda: Needle(depths=(0, 101)), "depths ((0, 101)) must be percents"),
        (lambda: Needle(over="words"), "over ('words') must be one of bytes, tokens"),
        (lambda: Needle(over="tokens", tokens=64, needles=21), "needles (21) above the 20 keys that there are"),
        (lambda: Needle(tokens=4), "tokens (4) must be at least 5"),
        (lambda: VariableTracking(hops=0), "hops (0) must be positive"),
        (lambda: VariableTracking(hops=99, chains=101), "must be at most 10000"),
        (lambda: StateTracking("S6"), "group ('S6') must be one of Z2, Z60, S3, A4xZ5, A5, S5"),
        (lambda: InContextRegression(inputs=8), "(inputs most_x^2)^(inputs - 1) must be at most 10^8"),
        (lambda: NShotClassification(width=4), "width (4) must be at least 5, 4 noise + 1"),
        (lambda: NShotClassification(noise=-1), "noise (-1) must be at least 0"),
        (lambda: NShotClassification(symbols=3), "symbols (3) must be at least classes (4)"),
        (lambda: MQAR().batch(-1, 0, 1, 64), "seed (-1) must be at least 0"),
        (lambda: MQAR().batch(0, 2**31, 1, 64), "step (2147483648) must be at least 0 and at most"),
        (lambda: MQAR().batch(0, 0, 0, 64), "rows (0) must be at least 1"),
        (lambda: MQAR().fixed_state(64, -1), "bits (-1) of a state must be at least 0"),
        (lambda: StateTracking().fixed_state(64, -0.5), "bits (-0.5) of a state must be at least 0"),
    ],
)
def test_what_cannot_be_is_one_line(make, told):
    with pytest.raises(ConfigError, match=re.escape(told)) as error:
        make()
    assert "\n" not in str(error.value)


LEAST = {
    "mqar": 20, "selective_copying": 14, "induction_heads": 3, "copying": 3, "phonebook of 4": 210, "needle": 152,
    "needle, tokens": 24, "variable_tracking": 180, "Z2": 1, "regression": 16, "classification": 34,
}  # fmt: skip
"""Name of a case -> tokens of the shortest row."""


@pytest.mark.parametrize("name", LEAST)
def test_the_shortest_row(name):
    """As long as said, and no shorter: it has all that is asked."""
    task, _ = CASES[name]
    examples = task.batch(0, 0, 8, LEAST[name])
    assert examples.scored_BT.any(axis=1).all()
    if LEAST[name] > 1:
        with pytest.raises(ConfigError, match=rf"length \({LEAST[name] - 1}\) must be at least {LEAST[name]} for"):
            task.batch(0, 0, 8, LEAST[name] - 1)
