# SPDX-License-Identifier: Apache-2.0
"""Writing tokenised shards; `hybridlm.data.shards` says what they are and reads them."""

import contextlib
import os
import zlib
from pathlib import Path

import numpy as np

from hybridlm.data.identity import content_hash
from hybridlm.data.shards import SUFFIX, index_bytes, index_name
from hybridlm.errors import RunError

OPTIONS = "group_size:1,uncompressed"
"""One record a chunk: records are read one by one, in any order."""


class ShardWriter:
    """One shard and its index, under names that end in `.part` until it is closed."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, record_tokens: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._file, self._dtype = folder / f"{name}{SUFFIX}", dtype
        self._part = self._file.with_name(self._file.name + ".part")
        self._record_tokens = record_tokens
        self._rest = np.zeros(0, dtype)
        self._documents: list[int] = [0]
        self._checks: list[int] = []
        self.tokens = 0
        """Taken so far."""
        with self._explained():
            self._writer = ArrayRecordWriter(str(self._part), OPTIONS)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Tokens of documents end to end, and the lengths of those that end with them: none where a document goes on
        with the next call."""
        self.tokens += len(tokens)
        self._documents += (self._documents[-1] + np.cumsum(lengths)).tolist()
        whole = np.concatenate([self._rest, tokens.astype(self._dtype)])
        cut = len(whole) // self._record_tokens * self._record_tokens
        for low in range(0, cut, self._record_tokens):
            self._write(whole[low : low + self._record_tokens])
        self._rest = whole[cut:]

    def _write(self, tokens: np.ndarray) -> None:
        raw = tokens.tobytes()
        with self._explained():
            self._writer.write(raw)
        self._checks.append(zlib.crc32(raw))

    def close(self) -> dict:
        """Ends the shard; what a manifest says of it."""
        if len(self._rest):
            self._write(self._rest)
        with self._explained():
            self._writer.close()
            if not self._part.exists() or not self._part.stat().st_size:
                raise OSError("it was not written")
        about = {
            "file": self._file.name,
            "documents": len(self._documents) - 1,
            "records": len(self._checks),
            "tokens": self.tokens,
            "size": self._part.stat().st_size,
            "hash": content_hash(self._part),
        }
        index = self._file.with_name(index_name(about))
        part = index.with_name(index.name + ".part")
        part.write_bytes(index_bytes(np.array(self._documents), np.array(self._checks, np.uint32)))
        os.replace(part, index)
        os.replace(self._part, self._file)
        return about | {"index_hash": content_hash(index)}

    def abandon(self) -> None:
        """Leaves nothing."""
        with contextlib.suppress(Exception):
            self._writer.close()
        self._part.unlink(missing_ok=True)

    def _explained(self):
        return _Explained(self._file)


class _Explained:
    """An error of the writing library as one line that names the file."""

    def __init__(self, file: Path):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is not None and isinstance(error, RuntimeError | ValueError | OSError):
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            raise RunError(f"cannot write {self._file}: {reason}") from error
