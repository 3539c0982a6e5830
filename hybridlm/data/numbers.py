# SPDX-License-Identifier: Apache-2.0
"""Arrays in files, read where they are asked for and never mapped: a mapped file that somebody cuts, or whose disk
fails, ends the process by a signal; one that is read is an error in one line."""

import os
from pathlib import Path

import numpy as np

from hybridlm import storage
from hybridlm.errors import DataError


class Numbers:
    """The numbers of a file from one on. The file is open as long as this; pickle what it is made of."""

    def __init__(self, path: Path, dtype: str, start: int = 0, length: int | None = None, header: int = 0):
        """header: bytes before the first number of the file; start: number of the first one here; length: how many;
        None: to the end of the file as it is now."""
        self.path, self.dtype = path, np.dtype(dtype)
        self._file = storage.open_file(path, 0)
        self._first = header + start * self.dtype.itemsize
        there = (os.fstat(self._file.fileno()).st_size - self._first) // self.dtype.itemsize
        self._length = max(there, 0) if length is None else length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: int | slice | np.ndarray) -> np.ndarray:
        """One, some that follow each other, or those at positions, int64 [n], which are best short of runs.

        DataError, one line, for what cannot be read.
        """
        if isinstance(where, slice):
            low, high, step = where.indices(self._length)
            return self._read([(low, max(high - low, 0))])[::step]
        if isinstance(where, int | np.integer):
            at = int(where) + (self._length if where < 0 else 0)
            return self._read([(at, 1)])[0]
        if not len(where):
            return np.zeros(0, self.dtype)
        firsts = np.concatenate([[0], np.flatnonzero(np.diff(where) != 1) + 1, [len(where)]])  # of runs
        return self._read(list(zip(where[firsts[:-1]].tolist(), np.diff(firsts).tolist())))

    def __array__(self, dtype=None, copy=None):
        return self[:].astype(dtype or self.dtype)

    def tolist(self) -> list:
        """All of them."""
        return self[:].tolist()

    def _read(self, runs: list[tuple[int, int]]) -> np.ndarray:
        """(first, how many) of each run, end to end."""
        width, handle = self.dtype.itemsize, self._file.fileno()
        try:
            parts = [os.pread(handle, n * width, self._first + at * width) for at, n in runs]
            if len(runs) == 1 and 0 < len(parts[0]) < runs[0][1] * width:  # more than one read gives at once
                parts = self._read_on(parts, *runs[0])
            raw = parts[0] if len(parts) == 1 else b"".join(parts)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        if len(raw) != sum(n for _, n in runs) * width:
            raise DataError(f"{self.path} was cut while it was read")
        return np.frombuffer(raw, self.dtype)

    def _read_on(self, parts: list[bytes], at: int, n: int) -> list[bytes]:
        """The parts of a long run; what is missing at its end is missing in the file."""
        width, done = self.dtype.itemsize, len(parts[0])
        while part := os.pread(self._file.fileno(), n * width - done, self._first + at * width + done):
            parts.append(part)
            done += len(part)
        return parts
