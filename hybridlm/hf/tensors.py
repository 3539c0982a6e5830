# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, read and written one tensor at a time.

Of a file in a bucket, header and tensors are read by their ranges.

A file is eight bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from hybridlm import storage
from hybridlm.errors import ConfigError, require
from hybridlm.hf.inside import check_file, files_like, has_file

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
"""Types of weights; files with others (integers, eight-bit floats) are quantised and are not read."""
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8", np.dtype(np.int64): "I64",
}  # fmt: skip
"""What a type that is written is called."""
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000
"""Bytes, as of the format's own library."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        """The tensor, read from the file, which may be cut meanwhile: ConfigError."""
        return self.open_rows(slice(0, self.shape[0])) if self.shape else self.open_rows(slice(0, 1)).reshape(())

    def open_rows(self, rows: slice) -> np.ndarray:
        """As `open`, but these rows (along axis 0) alone; the single number of a tensor without axes is its row."""
        n_rows, *row = self.shape or (1,)
        shape, dtype = (len(range(n_rows)[rows]), *row), DTYPES[self.dtype]
        if 0 in shape:
            return np.zeros(shape, dtype)
        start = self.offset + range(n_rows)[rows].start * math.prod(row) * dtype.itemsize
        n_bytes = math.prod(shape) * dtype.itemsize
        content = storage.read_range(self.file, start, start + n_bytes)
        require(len(content) == n_bytes, f"{self.file} was cut short while it was read")
        return np.frombuffer(content, dtype).reshape(shape)

    @property
    def n_bytes(self) -> int:
        """Size of a tensor of a type in DTYPES."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def equals(self, other: "Entry") -> bool:
        """Whether two tensors hold the same numbers, in one shape and type."""
        alike = self.shape == other.shape and self.dtype == other.dtype and self.dtype in DTYPES
        return alike and np.array_equal(self.open(), other.open())


@dataclass(frozen=True)
class Rows:
    """Rows of several tensors that stand one behind the other, as an Entry of their own."""

    entries: tuple[Entry, ...]
    start: int
    """The first of all their rows that is one of these."""
    shape: tuple[int, ...]

    @property
    def file(self) -> Path:
        """That of the first tensor."""
        return self.entries[0].file

    @property
    def dtype(self) -> str:
        """That of the first tensor."""
        return self.entries[0].dtype

    @property
    def n_bytes(self) -> int:
        """Size of these rows."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def open(self) -> np.ndarray:
        """All of these rows."""
        return self.open_rows(slice(0, self.shape[0]))

    def open_rows(self, rows: slice) -> np.ndarray:
        """Some of these rows."""
        first, last, parts, before = self.start + rows.start, self.start + rows.stop, [], 0
        for entry in self.entries:
            n_rows = entry.shape[0]
            parts.append(
                entry.open_rows(slice(min(max(first - before, 0), n_rows), min(max(last - before, 0), n_rows)))
            )
            before += n_rows
        return np.concatenate(parts)


def recut(entries: list[Entry], shapes: list[tuple[int, ...]]) -> list[Entry | Rows]:
    """The rows of tensors as they would be in tensors of these shapes; the tensors themselves where that cannot be."""
    kinds, row = {entry.dtype for entry in entries}, shapes[0][1:]
    total = sum(entry.shape[0] for entry in entries if entry.shape[1:] == row)
    if [entry.shape for entry in entries] == shapes or total != sum(s[0] for s in shapes) or not kinds <= set(DTYPES):
        return entries
    starts = [sum(shape[0] for shape in shapes[:i]) for i in range(len(shapes))]
    return [Rows(tuple(entries), start, shape) for start, shape in zip(starts, shapes, strict=True)]


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint folder. ConfigError for missing, cut or overlapping files and doubled names."""
    entries: dict[str, Entry] = {}
    for file, names in _files(folder).items():
        for name, entry in read_header(file).items():
            if names is None or name in names:
                require(name not in entries, f"{folder} has the tensor {name} in two files")
                entries[name] = entry
    return entries


def _files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The files of a checkpoint and which of their tensors count (None: all).

    As transformers reads a folder: model.safetensors alone where there is one, as an index beside it is of an earlier
    model; else what the index lists; else all files.
    """
    index, single = folder / INDEX, folder / "model.safetensors"
    if has_file(folder, single.name):
        return {single: None}
    if has_file(folder, INDEX):
        listed: dict[Path, set[str]] = {}
        for tensor, name in _weight_map(index).items():
            listed.setdefault(folder / name, set()).add(tensor)
        for file in listed:
            require(has_file(folder, file.name), f"{file} is named by {INDEX} and missing")
        return {file: frozenset(names) for file, names in listed.items()}
    files = files_like(folder, "*.safetensors")
    require(bool(files), f"{folder} has no safetensors files: what is loaded is model.safetensors or {INDEX}")
    return dict.fromkeys(files)


def shards_of(folder: Path) -> set[Path]:
    """The files that a folder's index lists."""
    return {folder / name for name in _weight_map(folder / INDEX).values()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file of an index; ConfigError for files that are not in its folder."""
    try:
        values = json.loads(storage.read_bytes(index))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{index} cannot be read: {error}") from error
    files = values.get("weight_map") if isinstance(values, dict) else None
    require(isinstance(files, dict) and len(files) > 0, f"{index} has no weight_map")
    for name in files.values():
        plain = isinstance(name, str) and name != "" and Path(name).name == name
        require(plain, f"{index}: weight_map names {name!r}, which is no file of its folder")
    return files


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file. ConfigError where it is damaged."""
    check_file(file)
    try:
        size = storage.size(file)
        (length,) = struct.unpack("<Q", storage.read_range(file, 0, 8))
        fits = length <= min(size - 8, LONGEST_HEADER)
        header = json.loads(storage.read_range(file, 8, 8 + length)) if fits else None
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    require(fits, f"{file} is cut short or no safetensors file")
    require(isinstance(header, dict), f"{file} has a damaged header: no JSON object")
    room = size - 8 - length
    tensors = {name: spec for name, spec in header.items() if name != "__metadata__"}
    entries = {name: _entry(file, name, spec, 8 + length, room) for name, spec in tensors.items()}
    _check_apart(file, entries)
    return entries


def _check_apart(file: Path, entries: dict[str, Entry]) -> None:
    """ConfigError where two tensors share bytes."""
    known = [(entry.offset, entry.n_bytes, name) for name, entry in entries.items() if entry.dtype in DTYPES]
    end = 0
    for offset, n_bytes, name in sorted(known):
        require(offset >= end or n_bytes == 0, f"{file} is damaged at the tensor {name}: it lies in another one")
        end = max(end, offset + n_bytes)


def _entry(file: Path, name: str, spec: Any, start: int, room: int) -> Entry:
    """A tensor of a header. start: where the data are in the file; room: how many bytes."""
    damaged = f"{file} is cut short or damaged at the tensor {name}"
    match spec:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            require(all(type(size) is int and size >= 0 for size in shape), damaged)
            entry = Entry(file, start + first, dtype, tuple(shape))
            fits = dtype not in DTYPES or (0 <= first <= last <= room and last - first == entry.n_bytes)
            require(fits, damaged)
            return entry
    raise ConfigError(damaged)


@dataclass(frozen=True)
class Source:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]
    """The array, of that shape."""

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path, tensors: Iterable[Source], max_bytes: int, progress: Callable[[str, int, int], None] | None = None,
    mark: str | None = None,
) -> None:  # fmt: skip
    """Files of at most `max_bytes` (a tensor is never split) and, for more than one, their index.

    Tensors are made one at a time, in order. progress: called with (name, bytes written, bytes of all) after each.
    mark: becomes part of the files' names, and there is an index for one file, too.
    """
    shards: list[list[Source]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.n_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.n_bytes
    names = ["model.safetensors"]
    indexed = len(shards) > 1 or mark is not None
    if indexed:
        stem = "model" if mark is None else f"model-{mark}"
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    done, total = 0, sum(tensor.n_bytes for shard in shards for tensor in shard)
    for name, shard in zip(names, shards, strict=True):
        with storage.writing(folder / name) as stream:
            for tensor in _write_file(stream, shard):
                done += tensor.n_bytes
                if progress is not None:
                    progress(tensor.name, done, total)
    if indexed:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        storage.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_file(stream: BinaryIO, shard: list[Source]) -> Iterator[Source]:
    """Writes the content of one file; yields each tensor when it is written."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        offsets = [offset, offset + tensor.n_bytes]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for tensor in shard:
        array = np.ascontiguousarray(tensor.make().astype(tensor.dtype, copy=False))
        fits = array.shape == tensor.shape
        require(fits, f"tensor {tensor.name}: {array.shape} was made where {tensor.shape} was announced")
        stream.write(array.reshape(-1).view(np.uint8).data)
        yield tensor
