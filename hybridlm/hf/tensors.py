# SPDX-License-Identifier: Apache-2.0
"""Safetensors files, read and written one tensor at a time.

A file is eight bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from hybridlm.errors import ConfigError, require

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
"""Types of weights; files with others (integers, eight-bit floats) are quantised and are not read."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        """The tensor, mapped from the file: nothing is read before it is used, nothing stays after it is dropped."""
        if 0 in self.shape:
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape or (1,)).reshape(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of a tensor of a type in DTYPES."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def equals(self, other: "Entry") -> bool:
        """Whether two tensors hold the same numbers, in one shape and type."""
        alike = self.shape == other.shape and self.dtype == other.dtype and self.dtype in DTYPES
        return alike and np.array_equal(self.open(), other.open())


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint folder. ConfigError for missing, cut or overlapping files and doubled names."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        files = [folder / name for name in dict.fromkeys(weight_map.values())]
    elif single.is_file():
        files = [single]
    else:
        files = sorted(folder.glob("*.safetensors"))
    require(bool(files), f"{folder} has no safetensors files: what is loaded is model.safetensors or {INDEX}")
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            require(name not in entries, f"{folder} has the tensor {name} in two files")
            entries[name] = entry
    return entries


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error


def _read_header(file: Path) -> dict[str, Entry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            require(length <= size - 8, f"{file} is cut short or no safetensors file")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise ConfigError(f"{file} is named by {INDEX} and missing") from None
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    entries = {}
    for name, spec in header.items():
        if name == "__metadata__":
            continue
        start, stop = spec["data_offsets"]
        entry = Entry(file, 8 + length + start, spec["dtype"], tuple(spec["shape"]))
        if entry.dtype in DTYPES:
            fits = 0 <= start <= stop <= size - 8 - length and stop - start == entry.n_bytes
            require(fits, f"{file} is cut short or damaged at the tensor {name}")
        entries[name] = entry
    return entries


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
    folder: Path, tensors: Iterable[Source], max_bytes: int, progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Files of at most `max_bytes` (a tensor is never split) and, for more than one, their index.

    Tensors are made one at a time, in order. progress: called with (name, bytes written, bytes of all) after each.
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
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    done, total = 0, sum(tensor.n_bytes for shard in shards for tensor in shard)
    for name, shard in zip(names, shards, strict=True):
        part = folder / f"{name}.part"
        for tensor in _write_file(part, shard):
            done += tensor.n_bytes
            if progress is not None:
                progress(tensor.name, done, total)
        part.replace(folder / name)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(file: Path, shard: list[Source]) -> Iterator[Source]:
    """Writes one file; yields each tensor when it is written."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in shard:
        offsets = [offset, offset + tensor.n_bytes]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in shard:
            array = np.ascontiguousarray(tensor.make().astype(tensor.dtype, copy=False))
            fits = array.shape == tensor.shape
            require(fits, f"tensor {tensor.name}: {array.shape} was made where {tensor.shape} was announced")
            stream.write(array.reshape(-1).view(np.uint8).data)
            yield tensor
