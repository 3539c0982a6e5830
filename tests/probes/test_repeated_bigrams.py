# SPDX-License-Identifier: Apache-2.0
"""Repeated bigrams against loops over pairs; frequent ones against counts of all text."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from hybridlm.data.documents import READ_ONLY
from hybridlm.errors import ConfigError
from hybridlm.probes import repeated_bigrams
from hybridlm.probes.repeated_bigrams import RepeatedBigrams, check_ids, frequent_pairs, hits_of, pairs_of


def rows(seed: int, room: int = 0, vocab: int = 5) -> dict[str, np.ndarray]:
    """Packed rows of documents of few different tokens, some of them not trained on, padding at the end."""
    rng = np.random.default_rng(seed)
    found = {name: [] for name in ("tokens", "targets", "segment_ids", "positions")}
    for _ in range(6):
        row = {name: [] for name in found}
        for number in range(1, rng.integers(2, 5)):
            text = rng.integers(0, vocab, rng.integers(2, 12)).tolist()
            row["tokens"] += [0] * room + text[:-1]
            row["targets"] += [-1] * room + [-1 if rng.random() < 0.2 else token for token in text[1:]]
            row["segment_ids"] += [number] * (room + len(text) - 1)
            row["positions"] += range(room + len(text) - 1)
        for name, fill in (("tokens", 0), ("targets", -1), ("segment_ids", 0), ("positions", 0)):
            found[name].append([*row[name], *[fill] * 60][:40])
    return {name: np.array(value, np.int32) for name, value in found.items()}


def by_hand(batch, frequent: set, room: int) -> np.ndarray:
    hits = np.zeros(batch["tokens"].shape, int)
    for row in range(len(hits)):
        seen: set = set()
        tokens, targets, ids, at = (batch[name][row] for name in ("tokens", "targets", "segment_ids", "positions"))
        for t in range(len(tokens)):
            if ids[t] == 0 or at[t] < room:
                continue
            following = targets[t]
            if following < 0 and t + 1 < len(tokens) and ids[t + 1] == ids[t]:
                following = tokens[t + 1]
            if following < 0:
                continue
            pair = (ids[t], tokens[t], following)
            if targets[t] >= 0 and pair in seen and pair[1:] not in frequent:
                hits[row, t] = 1
            seen.add(pair)
    return hits


@pytest.mark.parametrize("room", [0, 2])
def test_hits_are_pairs_that_stood_in_the_document(room):
    frequent = {(0, 1), (2, 2), (4, 0)}
    numbers = np.sort(pairs_of(*np.array(sorted(frequent)).T))
    n = 0
    for seed in range(20):
        batch = rows(seed, room)
        hits = hits_of(batch, numbers, room)
        np.testing.assert_array_equal(hits, by_hand(batch, frequent, room))
        np.testing.assert_array_equal(hits_of(batch, numbers[:0], room), by_hand(batch, set(), room))
        n += int(hits.sum())
    assert n > 50


def corpus_of(tokens: np.ndarray):
    read = SimpleNamespace(reader=tokens)
    return SimpleNamespace(
        split=lambda name: read, stats={"train": {"tokens": len(tokens)}}, tokenizer=SimpleNamespace(vocab_size=9)
    )


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32"])
def test_frequent_pairs_are_those_that_come_often(dtype, monkeypatch):
    """Counted in many pieces; ids that are read alone count as what they are."""
    monkeypatch.setattr(repeated_bigrams, "PIECE", 64)
    monkeypatch.setattr(repeated_bigrams, "AT_ONCE", 128)
    tokens = np.random.default_rng(0).choice(9, 3001, p=np.arange(1, 10) / 45).astype(dtype)
    marked = tokens.copy()
    if dtype == "uint32":
        marked[::3] |= READ_ONLY
    counts = Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    for least in (30, 60):
        found = frequent_pairs(RepeatedBigrams(frequent=least), corpus_of(marked))
        expected = sorted((a << 21) + b for (a, b), n in counts.items() if n >= least)
        assert found.tolist() == expected and 0 < len(expected) < 81
    assert len(frequent_pairs(RepeatedBigrams(frequent=0), corpus_of(marked))) == 0
    # of a third of the text, a third as often is frequent
    some = frequent_pairs(RepeatedBigrams(frequent=60, counted=1000), corpus_of(marked))
    starts = [int(i * 47 / 15) * 64 for i in range(15)]
    part = Counter(pair for s in starts for pair in zip(tokens[s : s + 64].tolist(), tokens[s + 1 : s + 65].tolist()))
    share = 15 * 64 / 3000
    assert some.tolist() == sorted((a << 21) + b for (a, b), n in part.items() if n >= 60 * share)


def test_what_cannot_be_is_one_line():
    with pytest.raises(ConfigError, match=r"^frequent \(-1\) must not be negative"):
        RepeatedBigrams(frequent=-1)
    with pytest.raises(ConfigError, match=r"^counted \(0\) must be positive"):
        RepeatedBigrams(counted=0)
    with pytest.raises(ConfigError, match="tokens are more than 2097152"):
        check_ids(2**21 + 1)
