# SPDX-License-Identifier: Apache-2.0
"""Batches taken and compared, files of tokens as other programs write them, damage."""

import itertools
from pathlib import Path

import numpy as np

from hybridlm.data.packing import FIELDS


def take(loader, n):
    """The next n batches; closes the loader."""
    with loader:
        return list(itertools.islice(loader, n))


def check_equal(actual, expected):
    """Batches equal to the bit."""
    assert len(actual) == len(expected)
    for n, (a, b) in enumerate(zip(actual, expected)):
        for field in FIELDS:
            np.testing.assert_array_equal(a[field], b[field], f"batch {n}, {field}")


def join(parts):
    """The global batches of the batches of each host."""
    return [{field: np.concatenate([part[field] for part in hosts]) for field in FIELDS} for hosts in zip(*parts)]


def pairs_of(batches):
    """Every (token, target) of batches, sorted."""
    tokens, targets = (np.concatenate([batch[field].ravel() for batch in batches]) for field in ("tokens", "targets"))
    real = targets >= 0
    return sorted(zip(tokens[real].tolist(), targets[real].tolist()))


def all_pairs(split):
    """Every (token, next token) of a split's documents, sorted."""
    offsets = np.asarray(split.offsets[:])
    documents = np.split(split.tokens[np.arange(offsets[-1])], offsets[1:-1])
    return sorted(pair for d in documents for pair in zip(d[:-1].tolist(), d[1:].tolist()))


def write_megatron(prefix: Path, documents, dtype="uint16", code=8):
    """As Megatron-LM's indexed_dataset.py writes: each document as two sequences, where it is long enough."""
    sequences = [part for d in documents for part in (np.array_split(d, 2) if len(d) > 3 else [np.asarray(d)])]
    marks = np.cumsum([0] + [2 if len(d) > 3 else 1 for d in documents])
    lengths = np.array([len(s) for s in sequences], np.int32)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    prefix.with_name(prefix.name + ".bin").write_bytes(b"".join(np.asarray(s, dtype).tobytes() for s in sequences))
    header = b"MMIDIDX\0\0" + np.uint64(1).tobytes() + np.uint8(code).tobytes()
    counts = np.array([len(sequences), len(marks)], np.uint64).tobytes()
    body = lengths.tobytes() + pointers.tobytes() + marks.astype(np.int64).tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(header + counts + body)


def write_nanogpt(path: Path, documents, header=False):
    """As nanoGPT's prepare.py, or with the header of llm.c."""
    tokens = np.concatenate([np.asarray(d, np.uint16) for d in documents])
    words = np.zeros(256, np.int32)
    words[:3] = 20240520, 1, len(tokens)
    path.write_bytes((words.tobytes() if header else b"") + tokens.tobytes())


def flip(file: Path, rng: np.random.Generator) -> None:
    """Changes one bit of a file."""
    raw = bytearray(file.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    file.write_bytes(raw)


def mutate(raw: bytes, rng: np.random.Generator) -> bytes:
    """Some other bytes: flipped, cut, emptied, doubled, exchanged."""
    data = bytearray(raw)
    kind = int(rng.integers(6))
    at = int(rng.integers(len(data))) if data else 0
    if kind == 0:
        return b""
    if kind == 1:
        return bytes(data[:at])
    if kind == 2:
        return bytes(data[:at] + data[at : at + 9] + data[at:])
    if kind == 3:
        return bytes(data[:at] + rng.bytes(int(rng.integers(1, 20))) + data[at + 5 :])
    if kind == 4:
        return rng.bytes(int(rng.integers(1, 400)))
    for _ in range(int(rng.integers(1, 30))):
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    return bytes(data)
