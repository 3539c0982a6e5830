# SPDX-License-Identifier: Apache-2.0
"""Best-fit packing against one that takes piece after piece."""

import bisect
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hybridlm.data.fitting import FitRows, best_fit
from hybridlm.data.packing import PairRows
from tests.data.test_data_packing import lay

LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=60)


def naive_rooms(lengths, seq_len) -> list[int]:
    """Room left in each row, ascending, when each piece goes into the row with the least room for it."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else seq_len
        bisect.insort(rooms, room - length)
    return rooms


@given(lengths=LENGTHS, seq_len=st.integers(1, 17), seed=st.integers(0, 2**63))
@example(lengths=[2] * 100, seq_len=7, seed=1)
@example(lengths=[100], seq_len=3, seed=2)
@example(lengths=[1, 0], seq_len=3, seed=2)
def test_rows_hold_what_one_by_one_packing_holds(lengths, seq_len, seed):
    starts = np.cumsum([0, *lengths])
    documents = [list(range(start, start + n)) for start, n in zip(starts, lengths)]  # every token distinct
    rows = FitRows(lay(documents), seq_len, seed)
    pieces = [min(seq_len, n - 1 - cut) for n in lengths for cut in range(0, n - 1, seq_len)]
    made = [rows[r] for r in range(len(rows))]
    assert sorted(int((row["segment_ids"] == 0).sum()) for row in made) == naive_rooms(pieces, seq_len)
    seen, segments = [], []
    for row in made:
        real = row["segment_ids"] > 0
        assert (row["targets"][real] == row["tokens"][real] + 1).all() and (row["targets"][~real] == -1).all()
        assert not row["tokens"][~real].any() and real[: real.sum()].all()
        seen += row["tokens"][real].tolist()
        for segment in range(1, row["segment_ids"].max(initial=0) + 1):
            here = row["segment_ids"] == segment
            np.testing.assert_array_equal(row["positions"][here], np.arange(here.sum()))
            np.testing.assert_array_equal(row["tokens"][here] - row["tokens"][here][0], np.arange(here.sum()))
            segments.append(int(here.sum()))
    assert sorted(seen) == [t for d in documents for t in d[:-1]]  # each pair of each document once
    assert Counter(segments) == Counter(pieces)  # no document is cut that a row could hold


def test_the_plan_does_not_grow_with_the_corpus():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6, 1.2, 3_000_000).astype(int) + 1, 4096)
    plan = best_fit(np.bincount(lengths, minlength=4097))
    assert len(plan.slots) < 10 * 4096
    assert lengths.sum() / (int(plan.row_ends[-1]) * 4096) > 0.9999


def test_rows_are_random_access_and_change_with_the_seed():
    documents = lay([[i] * (1 + i % 9) for i in range(200)])
    rows = FitRows(documents, 16, seed=5)
    again = pickle.loads(pickle.dumps(rows))
    for r in reversed(range(len(rows))):
        for field, value in rows[r].items():
            np.testing.assert_array_equal(value, again[r][field])
    other = FitRows(documents, 16, seed=6)
    assert len(other) == len(rows) and any((rows[r]["tokens"] != other[r]["tokens"]).any() for r in range(len(rows)))
    with pytest.raises(IndexError, match="row"):
        rows[len(rows)]
    with pytest.raises(ValueError, match=r"seq_len \(0\)"):
        FitRows(documents, 0, seed=0)


@pytest.mark.parametrize("kind", [PairRows, FitRows])
def test_a_large_index_is_sorted_in_files_and_is_the_same(kind, tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    documents = lay([[int(t)] * int(n) for t, n in zip(rng.integers(0, 999, 1000), rng.integers(0, 60, 1000))])
    in_memory = kind(documents, 32, 7)
    monkeypatch.setattr("hybridlm.data.order.BUCKET", 60)
    monkeypatch.setattr("hybridlm.data.documents.in_chunks.__defaults__", (34,))
    mapped = pickle.loads(pickle.dumps(kind(documents, 32, 7, tmp_path, "these")))  # as a worker gets it
    assert len(mapped) == len(in_memory) and [entry.name for entry in tmp_path.glob("order-*") if entry.is_dir()]
    for r in range(len(mapped)):
        for field, value in in_memory[r].items():
            np.testing.assert_array_equal(value, mapped[r][field], f"row {r}, {field}")
    assert kind(documents, 32, 8, tmp_path, "these").n_pairs == mapped.n_pairs
    assert len([entry for entry in tmp_path.glob("order-*") if entry.is_dir()]) == 2  # another seed, another index
