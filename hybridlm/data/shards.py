# SPDX-License-Identifier: Apache-2.0
"""Tokenised shards, which `hybridlm tokenize` writes: a folder with ArrayRecord files, their indices and a manifest.

The tokens of a shard, uint16 or uint32, are its documents end to end, cut into records of `record_tokens` each. Beside
`NAME.array_record` lies `NAME.index` with two arrays: where each document starts, and the end of the last (int64), and
a CRC-32 of each record (uint32). `manifest.json` has counts, the hash of each index and shard, the tokenizer, and a
hash of itself.

Records are not documents because the time that the container's reader takes for one grows with their number.

Identity is the hash of the indices, hence of lengths and content. Opening reads the indices, not the shards; each
record is held against its CRC when it is read, which finds damage and exchanged files, and Grain's reader checks its
chunks.
"""

import functools
import json
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm import storage
from hybridlm.data.documents import JoinedOffsets
from hybridlm.data.identity import content_hashes, digest_of
from hybridlm.data.numbers import Numbers
from hybridlm.errors import ConfigError, DataError

MANIFEST = "manifest.json"
FORMAT, CHAT_FORMAT = 1, 2
"""Of shards of text, and of those whose ids may be READ_ONLY."""
SUFFIX = ".array_record"
SPARE_FILES = 256


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder of shards; ConfigError, one line, where it is no whole one."""
    file = folder / MANIFEST
    try:
        stored = json.loads(storage.read_bytes(file))
        check = stored.pop("check")
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no tokenised shards (no {MANIFEST})") from None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"{file} is no manifest of hybridlm tokenize: make the shards again") from None
    if check != digest_of(stored):
        raise ConfigError(f"{file} is not as it was written: make the shards again, or copy it again")
    if stored.get("format") not in (FORMAT, CHAT_FORMAT):
        known = f"{FORMAT} and {CHAT_FORMAT}"
        raise ConfigError(f"{file} is of format {stored.get('format')}, this version reads {known}")
    if wrong := _what_is_wrong(stored):
        raise ConfigError(f"{file}: {wrong}: make the shards again")
    return stored


def _what_is_wrong(manifest: Any) -> str:
    """The first thing that a manifest lacks or has of another kind; "" where all is there."""
    for path, kind in _KINDS.items():
        *above, last = path.split(".")
        nodes = [manifest]
        for name in above:
            nodes = [
                child for node in nodes for child in (node[name] if isinstance(node[name], list) else [node[name]])
            ]
        for node in nodes:
            if not isinstance(node, dict) or not isinstance(node.get(last), kind) or isinstance(node[last], bool):
                return f'"{path}" is missing or no {kind.__name__}'
            if kind is int and not 0 <= node[last] < 2**62:
                return f'"{path}" ({node[last]}) is no count'
            if last == "file" and Path(node[last]).name != node[last]:
                return f'"{path}" ({node[last]!r}) is no name of a file of the folder'
    if manifest["dtype"] not in ("uint16", "uint32") or not manifest["record_tokens"]:
        return f"dtype {manifest['dtype']!r} and record_tokens {manifest['record_tokens']} cannot be"
    return ""


_KINDS: dict[str, type] = {
    "dtype": str, "record_tokens": int, "plan": str, "tokenizer": dict, "tokenizer.name": str,
    "tokenizer.fingerprint": str, "skipped_files": int, "empty_documents": int, "splits": dict,
} | {
    f"splits.{split}{name}": kind
    for split in ("train", "val")
    for name, kind in {
        "": dict, ".documents": int, ".bytes": int, ".tokens": int, ".pairs": int, ".fingerprint": str, ".shards": list,
        ".shards.file": str, ".shards.documents": int, ".shards.records": int, ".shards.tokens": int,
        ".shards.size": int, ".shards.index_hash": str,
    }.items()
}  # fmt: skip
"""What a manifest has, by dotted names; a list stands for each of its members."""


def write_manifest(folder: Path, manifest: dict) -> None:
    """Whole or not at all."""
    part = folder / f"{MANIFEST}.part"
    part.write_text(json.dumps({**manifest, "check": digest_of(manifest)}, indent=1), encoding="utf-8")
    part.replace(folder / MANIFEST)


def check_shards(folder: Path, manifest: dict, split: str) -> None:
    """ConfigError, one line that names the file, where an index is not as the manifest tells or a shard is cut."""
    shards = manifest["splits"][split]["shards"]
    indices = [folder / index_name(shard) for shard in shards]
    for shard, hashed, index in zip(shards, content_hashes(indices), indices):
        if hashed != shard["index_hash"]:
            raise ConfigError(f"{index} is not as it was written: copy it again, or make the shards again")
        _check_size(folder / shard["file"], shard["size"])
        _check_size(index, 8 * (shard["documents"] + 1) + 4 * shard["records"])
        if shard["records"] != -(-shard["tokens"] // manifest["record_tokens"]):
            raise ConfigError(f"{folder / MANIFEST}: {shard['file']} cannot have {shard['records']} records")


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if found != size:
        raise ConfigError(f"{file} has {found} bytes instead of {size}: copy it again, or make the shards again")


def index_name(shard: dict) -> str:
    """The name of the index of a shard that a manifest tells of."""
    return shard["file"].removesuffix(SUFFIX) + ".index"


def index_bytes(document_starts: np.ndarray, checks: np.ndarray) -> bytes:
    """The content of an index."""
    return document_starts.astype("<i8").tobytes() + checks.astype("<u4").tobytes()


class _Index:
    """The index of one shard."""

    def __init__(self, file: Path, documents: int):
        cut = 8 * (documents + 1)
        self.document_starts = Numbers(file, "<i8", length=documents + 1)
        self.checks = Numbers(file, "<u4", header=cut)[:]  # few, and read at every batch


class ShardSplit:
    """The documents of one split of a folder of shards; pickles as the folder. Memory: a few numbers a shard."""

    def __init__(self, folder: Path, split: str, manifest: dict | None = None):
        self.folder, self.name = folder, split
        manifest = manifest or read_manifest(folder)
        self.dtype = np.dtype(manifest["dtype"])
        self._record_tokens: int = manifest["record_tokens"]
        self.fingerprint: str = manifest["splits"][split]["fingerprint"]
        self._shards = manifest["splits"][split]["shards"]
        counts = {key: [shard[key] for shard in self._shards] for key in ("records", "tokens")}
        self._before = {key: np.concatenate([[0], np.cumsum(n)]).astype(np.int64) for key, n in counts.items()}
        self._indices: dict[int, _Index] = {}
        self._lock = threading.Lock()

    def __reduce__(self):
        return ShardSplit, (self.folder, self.name)

    @property
    def reader(self) -> "ShardSplit":
        """By position: see __getitem__."""
        return self

    @property
    def tokens(self) -> "ShardSplit":
        """The same."""
        return self

    @property
    def offsets(self) -> JoinedOffsets:
        """Where each document starts: int64 [documents + 1]."""
        counts = ([shard[key] for shard in self._shards] for key in ("documents", "tokens"))
        return JoinedOffsets(*counts, lambda shard: self.index(shard).document_starts)

    def __len__(self) -> int:
        return int(self._before["tokens"][-1])

    def index(self, shard: int) -> _Index:
        """That of a shard."""
        if shard not in self._indices:
            about = self._shards[shard]
            file = self.folder / index_name(about)
            self._indices[shard] = _Index(file, about["documents"])
        return self._indices[shard]

    @functools.cached_property
    def _records(self):
        import grain.python as grain

        _allow_files(2 * len(self._shards))
        paths = [f"{self.folder / shard['file']}[0:{shard['records']}]" for shard in self._shards]
        return grain.ArrayRecordDataSource(paths)

    def __getitem__(self, where: np.ndarray) -> np.ndarray:
        """The tokens at the positions `where`, int64 [n], of the split's tokens end to end.

        Raises DataError, one line that names the shard, for a record that is not as it was written.
        """
        breaks = np.flatnonzero(np.diff(where) != 1) + 1
        firsts = np.concatenate([[0], breaks])
        counts = np.diff(np.concatenate([firsts, [len(where)]]))
        runs = [self._run(int(start), int(n)) for start, n in zip(where[firsts], counts)] if len(where) else []
        return np.concatenate(runs) if runs else np.zeros(0, self.dtype)

    def _run(self, start: int, n: int) -> np.ndarray:
        """n tokens from a position on: of one document mostly, so of few records."""
        size = self._record_tokens
        parts, stop = [], start + n
        while start < stop:
            shard = int(np.searchsorted(self._before["tokens"], start, side="right")) - 1
            base = int(self._before["tokens"][shard])
            record = (start - base) // size
            low = base + record * size
            taken = self._record(shard, record)[start - low : stop - low]
            parts.append(taken)
            start += len(taken)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _record(self, shard: int, record: int) -> np.ndarray:
        index = self.index(shard)
        try:
            raw = self._source()[int(self._before["records"][shard]) + record]
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            raise DataError(self._damaged(shard, str(error).strip().splitlines()[0])) from None
        if zlib.crc32(raw) != index.checks[record]:
            raise DataError(self._damaged(shard, f"record {record} is not what was written"))
        return np.frombuffer(raw, self.dtype)

    def _source(self):
        with self._lock:  # made once, by whichever thread comes first
            return self._records

    def _damaged(self, shard: int, reason: str) -> str:
        return f"{self.folder / self._shards[shard]['file']} is damaged ({reason}): copy it again, or make it again"


def _allow_files(n_files: int) -> None:
    """Raises this process's own limit of open files as far as the system lets it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n_files + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            raise ConfigError(
                f"{n_files} open files of shards are above this system's limit ({hard}): ulimit -n {wanted}"
            )
