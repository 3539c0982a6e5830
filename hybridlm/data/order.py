# SPDX-License-Identifier: Apache-2.0
"""Documents, or pieces of them, in an order drawn from the seed: what rows are packed from.

An order is two arrays, in memory for a corpus of a few million documents and read from the cache folder beyond that:
it is sorted in buckets, so that a corpus of any size takes a bounded share of memory.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybridlm.data.cache import find_or_build
from hybridlm.data.documents import Documents, in_chunks
from hybridlm.data.identity import digest_of
from hybridlm.data.numbers import Numbers

BUCKET = 1 << 22
"""Most items that are sorted at once, 32 bytes each and as much again to sort."""
FORMAT = 1
ARRAYS = ("starts", "ends")


class Order(NamedTuple):
    """Runs of pairs (token, next token), one after the other."""

    starts: np.ndarray | Numbers
    """Position of each one's first token, int64."""
    ends: np.ndarray | Numbers
    """Pairs up to the end of each, int64: a prefix sum."""
    counts: np.ndarray
    """How many there are of each rank, int64."""
    folder: Path | None = None
    """Where both are read from; None: in memory."""


class Items(NamedTuple):
    """A chunk of what is put in order: by `rank` first (int64), by `keys` within it (uint64)."""

    ranks: np.ndarray
    keys: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def whole_documents(documents: Documents, seed: int) -> Iterator[Items]:
    """Each document that has a pair, all of one rank."""
    for low, offsets in in_chunks(documents.offsets):
        n_pairs = np.diff(offsets) - 1
        kept = np.flatnonzero(n_pairs > 0)
        yield Items(np.zeros(len(kept), np.int64), permutation_keys(kept + low, seed), offsets[kept], n_pairs[kept])


def pieces(documents: Documents, seed: int, seq_len: int) -> Iterator[Items]:
    """Documents cut every seq_len pairs, the longest pieces first."""
    for _, offsets in in_chunks(documents.offsets):
        n_pairs = np.maximum(np.diff(offsets) - 1, 0)
        counts = -(-n_pairs // seq_len)
        number = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)  # within a document
        starts = np.repeat(offsets[:-1], counts) + number * seq_len
        lengths = np.minimum(np.repeat(n_pairs, counts) - number * seq_len, seq_len)
        yield Items(seq_len - lengths, permutation_keys(starts, seed), starts, lengths)


def open_order(folder: Path, counts: np.ndarray) -> Order:
    """One that make_order has made in a folder."""
    return Order(*(Numbers(folder / f"{name}.int64", "int64") for name in ARRAYS), counts, folder)


def make_order(items: Callable[[], Iterator[Items]], identity: list, cache: Path | None) -> Order:
    """The order of all items.

    items: gives the chunks, the same each time. identity: JSON that says all that they depend on. cache: folder for
    orders of more than BUCKET items; None: everything in memory.
    """
    counts = np.zeros(1, np.int64)
    for chunk in items():
        added = np.bincount(chunk.ranks)
        counts = np.pad(counts, (0, max(len(added) - len(counts), 0)))
        counts[: len(added)] += added
    if cache is None or counts.sum() <= BUCKET:
        chunks = list(items())
        whole = Items(*(np.concatenate([chunk[field] for chunk in chunks]) for field in range(4))) if chunks else None
        if whole is None:
            return Order(np.zeros(0, np.int64), np.zeros(0, np.int64), counts)
        whole = _sorted(whole)
        return Order(whole.starts, np.cumsum(whole.lengths), counts)
    key = "order-" + digest_of([FORMAT, *identity])
    folder, _ = find_or_build(cache, key, functools.partial(_write, items, counts))
    return open_order(folder, counts)


def permutation_keys(indices: np.ndarray, seed: int) -> np.ndarray:
    """uint64 keys whose order is a permutation: SplitMix64 (Steele et al. 2014) of index and seed.

    Written out, because NumPy's own permutations may change between its versions, and with them every batch.
    """
    keys = np.asarray(indices).astype(np.uint64) ^ _mix(np.full(1, seed % 2**64, np.uint64))
    return _mix(keys)


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _sorted(items: Items) -> Items:
    order = np.lexsort((items.keys, items.ranks))
    return Items(*(field[order] for field in items))


def _write(items: Callable[[], Iterator[Items]], counts: np.ndarray, folder: Path) -> dict:
    """Sorts through files: an item's bucket follows from its rank and key, in their order; then bucket by bucket."""
    total, before = int(counts.sum()), np.cumsum(counts) - counts
    n_buckets = -(-2 * total // BUCKET)  # half full on average, for the spread of the keys
    with contextlib.ExitStack() as opened:
        buckets = [opened.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(n_buckets)]
        for chunk in items():
            place = before[chunk.ranks] + counts[chunk.ranks] * (chunk.keys.astype(np.float64) / 2**64)
            bucket_of = np.minimum((place * (n_buckets / total)).astype(np.int64), n_buckets - 1)
            by_bucket = bucket_of.argsort(kind="stable")
            rows = np.stack([field.astype(np.int64) for field in chunk], axis=1)[by_bucket]
            cuts = np.searchsorted(bucket_of[by_bucket], np.arange(1, n_buckets))
            for bucket, part in zip(buckets, np.split(rows, cuts)):
                bucket.write(part.tobytes())
        starts, ends = (opened.enter_context(open(folder / f"{name}.int64", "wb")) for name in ARRAYS)
        end = 0
        for bucket in buckets:
            bucket.seek(0)
            columns = np.frombuffer(bucket.read(), np.int64).reshape(-1, 4).T
            part = _sorted(Items(columns[0], columns[1].astype(np.uint64), columns[2], columns[3]))
            starts.write(part.starts.tobytes())
            ends.write((end + np.cumsum(part.lengths)).tobytes())
            end += int(part.lengths.sum())
    return {"items": total}
