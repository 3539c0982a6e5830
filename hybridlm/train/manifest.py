# SPDX-License-Identifier: Apache-2.0
"""What the files of a checkpoint are to the byte: `manifest.json` beside them holds their lengths and checksums.

It is two lines, an object and the checksum of that line, so that it vouches for itself too. A file has one XXH3
checksum for each BLOCK of it: threads share a large file, and so do the hosts of a cluster, each of which reads every
n-th block.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xxhash import xxh3_64

NAME = "manifest.json"
FORMAT = 1
BLOCK = 32 << 20
"""Bytes of a file that one checksum covers."""
PIECE = 512 << 10
"""Bytes that are read at once: they are still in a core's cache when they are hashed."""
THREADS = 4
PART = "manifest-{}.part"
"""What one host found of the files that it wrote, until the manifest is written."""

Sums = dict[str, list]
"""File name, relative to the checkpoint -> [bytes, [checksum of each block]]."""


def seal(folder: Path) -> None:
    """Writes the manifest of all files under a folder, which do not change any more. OSError where that fails.

    What hosts said of their own files by `seal_part` is taken over.
    """
    told = _collect_parts(folder)
    names = list(_files(folder))
    told = {name: told[name] for name in names if name in told and (folder / name).stat().st_size == told[name][0]}
    sums = told | checksums(folder, [name for name in names if name not in told])
    line = json.dumps({"format": FORMAT, "block": BLOCK, "files": dict(sorted(sums.items()))}).encode()
    with open(folder / NAME, "wb") as file:
        file.write(line + b"\n" + _checksum(line).encode() + b"\n")
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


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files under a folder, in a few words; None: nothing.

    share: (i, n) reads the i-th of n shares of the bytes; the manifest, and whether the files are all there and can be
    opened, is looked at in each. FileNotFoundError where there is no manifest.
    """
    try:
        files = _read(folder)
        sizes = {name: _size(folder, name) for name in files}
    except _Damaged as damaged:
        return str(damaged)
    for name, (length, _) in files.items():
        if sizes[name] != length:
            return f"{name} has {sizes[name]} bytes instead of {length}"
    blocks = [(name, i, of_block) for name, (_, sums) in files.items() for i, of_block in enumerate(sums)]
    mine = blocks[share[0] :: share[1]]

    def differs(block: tuple[str, int, str]) -> str | None:
        name, i, expected = block
        try:
            found = _block(folder / name, i * BLOCK, min(BLOCK, sizes[name] - i * BLOCK))
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        return None if found == expected else f"{name} differs from its checksum"

    with ThreadPoolExecutor(_threads()) as pool:
        return next((problem for problem in pool.map(differs, mine) if problem), None)


def is_sealed(folder: Path) -> bool:
    """Whether the folder has a manifest, sound or not."""
    return (folder / NAME).exists()


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


def _read(folder: Path) -> Mapping[str, tuple[int, list[str]]]:
    """The files that the manifest lists."""
    try:
        content = (folder / NAME).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _Damaged(f"{NAME} cannot be read: {error.strerror or error}") from error
    line, _, rest = content.partition(b"\n")
    if rest != _checksum(line).encode() + b"\n":
        raise _Damaged(f"{NAME} is damaged")
    values = json.loads(line)  # as it was written: its checksum says so
    if values["format"] != FORMAT or values["block"] != BLOCK:
        raise _Damaged(f"{NAME} is of format {values['format']}, which this version does not read")
    return values["files"]


def _size(folder: Path, name: str) -> int:
    """Bytes of a file that can be opened and read."""
    try:
        with open(folder / name, "rb", buffering=0) as file:
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
            told |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    return told


def _checksum(content: bytes) -> str:
    return xxh3_64(content).hexdigest()


def _block(path: Path, start: int, length: int) -> str:
    """Checksum of a range of a file, or of what is there of it."""
    digest, buffer = xxh3_64(), memoryview(bytearray(min(PIECE, length)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while length and (n := file.readinto(buffer[: min(PIECE, length)])):
            digest.update(buffer[:n])
            length -= n
    return digest.hexdigest()


def _threads() -> int:
    return min(THREADS, os.cpu_count() or 1)
