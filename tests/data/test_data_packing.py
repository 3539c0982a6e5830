# SPDX-License-Identifier: Apache-2.0
"""Packed rows against a naive packing of Python lists."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hybridlm.data.packing import FIELDS, PairRows, permutation_keys

MASK = 2**64 - 1


def split_mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def naive_rows(documents: list[list[int]], seq_len: int, seed: int) -> list[dict[str, list[int]]]:
    order = sorted(range(len(documents)), key=lambda d: split_mix(d ^ split_mix(seed)))
    pairs = [(d, i) for d in order for i in range(len(documents[d]) - 1)]
    rows = []
    for cut in range(0, len(pairs), seq_len):
        row = {field: [] for field in FIELDS}
        before, segment, position = None, 0, 0
        for document, i in pairs[cut : cut + seq_len]:
            segment, position = (segment, position + 1) if document == before else (segment + 1, 0)
            before = document
            cell = (documents[document][i], documents[document][i + 1], segment, position)
            for field, value in zip(FIELDS, cell):
                row[field].append(value)
        missing = seq_len - len(row["tokens"])
        rows.append({field: row[field] + [-1 if field == "targets" else 0] * missing for field in FIELDS})
    return rows


def lay(documents: list[list[int]], dtype=np.uint16):
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    return SimpleNamespace(reader=np.array([t for d in documents for t in d], dtype), offsets=offsets)


LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=60)


@given(lengths=LENGTHS, seq_len=st.integers(1, 17), seed=st.integers(0, 2**63))
@example(lengths=[1] * 50 + [2] + [1] * 50 + [9], seq_len=4, seed=0)
@example(lengths=[2] * 100, seq_len=7, seed=1)
@example(lengths=[100], seq_len=3, seed=2)
@example(lengths=[5, 5, 5], seq_len=4, seed=3)
def test_rows_equal_naive_packing(lengths, seq_len, seed):
    starts = np.cumsum([0, *lengths])
    documents = [list(range(start, start + n)) for start, n in zip(starts, lengths)]  # every token distinct
    rows = PairRows(lay(documents), seq_len, seed)
    expected = naive_rows(documents, seq_len, seed)
    assert len(rows) == len(expected)
    seen = []
    for row, naive in zip([rows[r] for r in range(len(rows))], expected):
        for field in FIELDS:
            assert row[field].dtype == np.int32
            np.testing.assert_array_equal(row[field], naive[field], field)
        real = row["segment_ids"] > 0
        np.testing.assert_array_equal(real, row["targets"] >= 0)
        seen += list(zip(row["tokens"][real].tolist(), row["targets"][real].tolist()))
    assert sorted(seen) == [(t, t + 1) for d in documents for t in d[:-1]]  # each pair of each document once


def test_rows_are_random_access_and_picklable():
    import pickle

    documents = [[i] * (i % 9) for i in range(200)]
    rows = PairRows(lay(documents), 16, seed=5)
    again = pickle.loads(pickle.dumps(rows))
    for r in reversed(range(len(rows))):
        for field in FIELDS:
            np.testing.assert_array_equal(rows[r][field], again[r][field])
    with pytest.raises(IndexError, match="row"):
        rows[len(rows)]
    with pytest.raises(ValueError, match=r"seq_len \(0\)"):
        PairRows(lay(documents), 0, seed=0)


def test_seed_changes_the_order():
    documents = lay([[i, i] for i in range(300)])
    orders = [np.concatenate([PairRows(documents, 50, seed)[r]["tokens"] for r in range(6)]) for seed in (0, 1)]
    assert (orders[0] != orders[1]).mean() > 0.9
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(300))


def test_permutation_is_fixed_for_all_time():
    assert permutation_keys(np.arange(6), 0).argsort().tolist() == [
        i for _, i in sorted((split_mix(i ^ split_mix(0)), i) for i in range(6))
    ]
    assert split_mix(0) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 of seed 0, as published


def test_a_row_of_many_tiny_documents_is_fast():
    import time

    n = 1_000_000
    documents = SimpleNamespace(reader=np.ones(2 * n, np.uint16), offsets=np.arange(0, 2 * n + 1, 2))
    rows = PairRows(documents, 4096, seed=0)
    began = time.perf_counter()
    for r in range(100):
        rows[r]
    assert time.perf_counter() - began < 2  # 4096 documents a row; per-document Python takes ten times as long
    np.testing.assert_array_equal(rows[3]["segment_ids"], np.arange(1, 4097))
    assert not rows[3]["positions"].any()
