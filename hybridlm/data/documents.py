# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents in files: their tokens by position, and where each of them starts."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from hybridlm.data.cache import map_array
from hybridlm.data.numbers import Numbers

READ_ONLY = 1 << 31
"""Bit of an id that a model reads and is not trained to predict. Files of 32 bits can hold it; others have none."""


class Tokens(Protocol):
    """The ids of all documents in a row, which may lie in many files; some may be READ_ONLY."""

    def __getitem__(self, where: np.ndarray) -> np.ndarray:
        """Those at the positions `where`, int64 [n], which are short of runs: neighbours are mostly consecutive."""


class Offsets(Protocol):
    """int64 [documents + 1]: where each document starts, and the end of the last."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


class Documents(Protocol):
    """Document d is reader[offsets[d]:offsets[d + 1]]. Pickles as paths, never as content."""

    reader: Tokens
    offsets: Offsets


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens [start, start + length) of a file of them."""

    path: Path
    dtype: str
    start: int = 0
    length: int | None = None
    """None: to the end."""
    header: int = 0
    """Bytes before the first token."""

    def __len__(self) -> int:
        if self.length is not None:
            return self.length
        return (self.path.stat().st_size - self.header) // np.dtype(self.dtype).itemsize - self.start

    def read(self) -> Numbers:
        """The tokens, read where they are asked for."""
        return Numbers(self.path, self.dtype, self.start, len(self), self.header)

    def map(self) -> np.ndarray:
        """The tokens, mapped: to look at."""
        whole = map_array(self.path, self.dtype, self.header)
        return whole[self.start : None if self.length is None else self.start + self.length]


@dataclasses.dataclass(frozen=True)
class Split:
    """The documents of one split in files of plain numbers, mapped on first use."""

    pieces: tuple[Piece, ...]
    """What, end to end, are the tokens."""
    offsets_file: Path

    @functools.cached_property
    def reader(self) -> Tokens:
        """What batches are read by."""
        readers = [piece.read() for piece in self.pieces]
        return readers[0] if len(readers) == 1 else Joined(readers)

    @functools.cached_property
    def tokens(self) -> np.ndarray | Tokens:
        """Ids of all documents in a row, [tokens], mapped: to look at. Where the disk fails, or somebody cuts the file,
        a mapped file ends the process."""
        mapped = [piece.map() for piece in self.pieces]
        return mapped[0] if len(mapped) == 1 else Joined(mapped)

    @functools.cached_property
    def offsets(self) -> Numbers:
        """Where each document starts in `tokens`, and the end: int64 [documents + 1]."""
        return Numbers(self.offsets_file, "int64")

    def __reduce__(self):
        return Split, (self.pieces, self.offsets_file)


class Joined:
    """Tokens of several places end to end, without a copy."""

    def __init__(self, parts: Sequence):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.dtype = np.result_type(*(part.dtype for part in parts)) if parts else np.dtype("uint16")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, where: np.ndarray) -> np.ndarray:
        taken = np.empty(len(where), self.dtype)
        part_of = np.searchsorted(self._ends, where, side="right")
        for part in np.unique(part_of):
            here = part_of == part
            taken[here] = self._parts[part][where[here] - (self._ends[part - 1] if part else 0)]
        return taken


class JoinedOffsets:
    """Where documents of several places start once these lie end to end; read where it is asked for."""

    def __init__(self, documents: Sequence[int], tokens: Sequence[int], offsets: Callable[[int], Offsets]):
        """How many documents and tokens each place has, and its own offsets by its number."""
        self._documents = np.concatenate([[0], np.cumsum(documents, dtype=np.int64)])
        self._tokens = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
        self._offsets = offsets

    def __len__(self) -> int:
        return int(self._documents[-1]) + 1

    def __getitem__(self, part: slice) -> np.ndarray:
        low, high, _ = part.indices(len(self))
        parts = [np.zeros(1, np.int64)] if low == 0 < high else []  # else offset i is the end of document i - 1
        first, last = max(low - 1, 0), high - 1
        for place in range(int(np.searchsorted(self._documents, first, side="right")) - 1, len(self._documents) - 1):
            before, after = int(self._documents[place]), int(self._documents[place + 1])
            if before >= last:
                break
            if before < after:
                ends = self._offsets(place)[max(first - before, 0) + 1 : min(last, after) - before + 1]
                parts.append(np.asarray(ends) + self._tokens[place])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def __array__(self, dtype=None, copy=None):
        return self[:].astype(dtype or np.int64)


@dataclasses.dataclass(frozen=True)
class Joint:
    """The documents of several sources end to end."""

    parts: tuple[Documents, ...]

    @functools.cached_property
    def reader(self) -> Tokens:
        """What batches are read by."""
        return Joined([part.reader for part in self.parts])

    @property
    def tokens(self) -> Tokens:
        """Ids of all documents in a row."""
        return self.reader

    @functools.cached_property
    def offsets(self) -> JoinedOffsets:
        """Where each document starts: int64 [documents + 1]."""
        documents = [len(part.offsets) - 1 for part in self.parts]
        tokens = [len(part.reader) for part in self.parts]
        return JoinedOffsets(documents, tokens, lambda place: self.parts[place].offsets)

    def __reduce__(self):
        return Joint, (self.parts,)


def in_chunks(offsets: Offsets, size: int = 1 << 20):
    """(number of the first document, offsets of up to `size` documents and their end) of all documents, in order."""
    for low in range(0, len(offsets) - 1, size):
        yield low, np.asarray(offsets[low : low + size + 1])
