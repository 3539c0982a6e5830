# SPDX-License-Identifier: Apache-2.0
"""What the files of a checkpoint are to the byte: `manifest.json` beside them holds their lengths and checksums.

It is two lines, an object and the checksum of that line, so that it vouches for itself too. A file has one XXH3
checksum for each BLOCK of it: threads share a large file, and so do the hosts of a cluster, each of which reads every
n-th block.

Of a checkpoint that is written to a bucket, nothing is read again: the store's own tags, which change with the content,
stand for the checksums.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_64

from hybridlm import storage

NAME = "manifest.json"
FORMAT = 1
BLOCK = 32 << 20
"""Bytes of a file that one checksum covers."""
PIECE = 512 << 10
"""Bytes that are read at once: they are still in a core's cache when they are hashed."""
THREADS = 16
PART = "manifest-{}.part"
"""What one host found of the files that it wrote, until the manifest is written."""
OBJECTS = "objects"
"""The format of a manifest that has the store's tags."""

Sums = dict[str, list]
"""File name, relative to the checkpoint -> [bytes, [checksum of each block]]; of an object, [bytes, tag]."""


def seal(folder: Path) -> None:
    """Writes the manifest of all files under a folder, which do not change any more. OSError where that fails.

    What hosts said of their own files by `seal_part` is taken over.
    """
    if storage.in_bucket(folder):
        files = {name: found for name, found in storage.listing(folder).items() if name != NAME}
        storage.write_bytes(folder / NAME, vouched({"format": OBJECTS, "files": files}))
        return
    told = _collect_parts(folder)
    names = list(_files(folder))
    told = {name: told[name] for name in names if name in told and (folder / name).stat().st_size == told[name][0]}
    sums = told | checksums(folder, [name for name in names if name not in told])
    with open(folder / NAME, "wb") as file:
        file.write(vouched({"format": FORMAT, "block": BLOCK, "files": dict(sorted(sums.items()))}))
        file.flush()
        os.fsync(file.fileno())


def seal_part(folder: Path, names: Mapping[str, str], process: int) -> None:
    """Leaves the checksums of files that this process wrote for the one that writes the manifest.

    names: of the files now -> once the folder is final.
    """
    sums = {names[name]: value for name, value in checksums(folder, names).items()}
    part = folder / PART.format(process)
    beside = part.with_suffix(".new")
    beside.write_text(json.dumps(sums), encoding="utf-8")
    beside.replace(part)


def verify(
    folder: Path, share: tuple[int, int] = (0, 1), read: Callable[[str], bool] = lambda name: True
) -> str | None:
    """What is wrong with the files under a folder, in a few words; None: nothing.

    share: (i, n) reads the i-th of n shares of the bytes; the manifest, and whether the files are all there and can be
    opened, is looked at in each. read: whether a file of a name is going to be read; others are not looked at.
    FileNotFoundError where there is no manifest.
    """
    try:
        values = _read(folder)
        files = {name: value for name, value in values["files"].items() if read(name)}
        found = storage.listing(folder) if storage.in_bucket(folder) else None
        sizes = {name: _size(folder, name, found) for name in files}
    except _Damaged as damaged:
        return str(damaged)
    for name, (length, _) in files.items():
        if sizes[name] != length:
            return f"{name} has {sizes[name]} bytes instead of {length}"
    if values["format"] == OBJECTS:
        tags = None if found is None else {name: tag for name, (_, tag) in found.items()}
        parts = [(name, tag) for name, (_, tag) in files.items()]
        differs = lambda name, tag: not _is_object(folder / name, tag, None if tags is None else tags[name])
    else:
        parts = [(name, (i, of_block)) for name, (_, sums) in files.items() for i, of_block in enumerate(sums)]
        length = lambda name, i: min(BLOCK, sizes[name] - i * BLOCK)
        differs = lambda name, part: _block(folder / name, part[0] * BLOCK, length(name, part[0])) != part[1]

    def problem(part: tuple[str, Any]) -> str | None:
        try:
            return f"{part[0]} differs from its checksum" if differs(*part) else None
        except OSError as error:
            return f"{part[0]} cannot be read: {error.strerror or error}"

    with ThreadPoolExecutor(_threads()) as pool:
        return next((told for told in pool.map(problem, parts[share[0] :: share[1]]) if told), None)


def _is_object(path: Path, tag: str, found: str | None) -> bool:
    """Whether a file is the object that had a tag. found: its tag now, which another store may have made anew; None: it
    is on a disk, where a tag that is no checksum of the content says nothing."""
    if found == tag:
        return True
    if not tag.startswith("md5:"):
        return found is None
    digest = hashlib.md5(usedforsecurity=False)
    with storage.reading(path) as file:
        while part := file.read(PIECE):
            digest.update(part)
    return f"md5:{digest.hexdigest()}" == tag


def find_odd(folder: Path) -> str | None:
    """Something under a folder that is neither a file nor a folder, as a pipe, for which a read would wait for ever."""
    if storage.in_bucket(folder):
        return None
    odd = (path for path in sorted(folder.rglob("*")) if not path.is_file() and not path.is_dir())
    return next((path.relative_to(folder).as_posix() for path in odd), None)


def is_sealed(folder: Path) -> bool:
    """Whether the folder has a manifest, sound or not."""
    return storage.exists(folder / NAME)


def checksums(folder: Path, names: Iterable[str]) -> Sums:
    """Lengths and checksums of files under a folder."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    blocks = [(name, start) for name, size in sizes.items() for start in range(0, size, BLOCK)]
    with ThreadPoolExecutor(_threads()) as pool:
        found = pool.map(lambda b: _block(folder / b[0], b[1], min(BLOCK, sizes[b[0]] - b[1])), blocks)
        sums: Sums = {name: [size, []] for name, size in sizes.items()}
        for (name, _), of_block in zip(blocks, found, strict=True):
            sums[name][1].append(of_block)
    return sums


class _Damaged(Exception):
    """What is wrong, in a few words."""


def vouched(values: dict) -> bytes:
    """A manifest's content."""
    line = json.dumps(values).encode()
    return line + b"\n" + _checksum(line).encode() + b"\n"


def of_vouched(content: bytes) -> dict | None:
    """The object of such lines; None where a bit of them has changed."""
    line, _, rest = content.partition(b"\n")
    return json.loads(line) if rest == _checksum(line).encode() + b"\n" else None


def _read(folder: Path) -> dict:
    """What the manifest says."""
    try:
        content = storage.read_bytes(folder / NAME)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _Damaged(f"{NAME} cannot be read: {error.strerror or error}") from error
    values = of_vouched(content)
    if values is None:
        raise _Damaged(f"{NAME} is damaged")
    if values["format"] != OBJECTS and (values["format"] != FORMAT or values["block"] != BLOCK):
        raise _Damaged(f"{NAME} is of format {values['format']}, which this version does not read")
    return values


def _size(folder: Path, name: str, found: Mapping[str, tuple[int, str]] | None) -> int:
    """Bytes of a file that can be opened and read; of an object, as it was found in its bucket."""
    if found is not None:
        if name not in found:
            raise _Damaged(f"{name} is missing")
        return found[name][0]
    try:
        with storage.open_file(folder / name, 0) as file:
            file.read(1)
            return os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise _Damaged(f"{name} is missing") from None
    except OSError as error:
        raise _Damaged(f"{name} cannot be read: {error.strerror or error}") from error


def _files(folder: Path) -> Iterator[str]:
    """Names of all files under a folder, relative to it, but for the manifest and what leads to it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != NAME and not name.startswith("manifest-"):
            yield name


def _collect_parts(folder: Path) -> Sums:
    """What the hosts left, which is taken away."""
    told: Sums = {}
    for part in sorted(folder.glob("manifest-*")):
        if part.suffix == ".part":
            told |= json.loads(storage.read_bytes(part))
        part.unlink()
    return told


def _checksum(content: bytes) -> str:
    return xxh3_64(content).hexdigest()


def _block(path: Path, start: int, length: int) -> str:
    """Checksum of a range of a file, or of what is there of it."""
    if storage.in_bucket(path):
        return _checksum(storage.read_range(path, start, start + length))
    digest, buffer = xxh3_64(), memoryview(bytearray(min(PIECE, length)))
    with storage.open_file(path, 0) as file:
        file.seek(start)
        while length and (n := file.readinto(buffer[: min(PIECE, length)])):
            digest.update(buffer[:n])
            length -= n
    return digest.hexdigest()


def _threads() -> int:
    return min(THREADS, os.cpu_count() or 1)
