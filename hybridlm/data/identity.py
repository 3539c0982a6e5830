# SPDX-License-Identifier: Apache-2.0
"""What a file is: a hash of its bytes, never its name, its size or its date.

The hash is XXH3 (128 bits) over those of pieces, so that threads share one large file: faster than any disk, and as
good as any against what happens by itself. Hashing again what was hashed at an earlier start can be left out where the
system tells of every change: see `Remembered`.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from xxhash import xxh3_128

from hybridlm import storage
from hybridlm.errors import ConfigError

PIECE = 64 << 20
READ = 1 << 20
MAX_THREADS = 16
SETTLED_SECONDS = 120.0
"""A change time has to be older than this: a mapped page that is written twice changes it once, until it is written
back, which Linux does after 35 seconds at most."""
KEEPS_CHANGE_TIMES = frozenset(("ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs"))
"""File systems of this machine alone, on which each write sets the change time by this machine's clock."""
MEMORY = "contents.json"
MOST_REMEMBERED = 200_000


def digest_of(value) -> str:
    """Of JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def threads() -> int:
    """How many read and hash at once."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def content_hashes(
    files: Sequence[Path], memory: Path | None = None, progress: Callable[[int], None] = lambda n_bytes: None
) -> list[str]:
    """The hash of each file's bytes, read in threads.

    memory: folder of what earlier calls found; None: read all. progress: called with the numbers of bytes read. Raises
    ConfigError, one line, for a file that cannot be read or is written to meanwhile. Of an object in a bucket, nothing
    is read: its store keeps a hash, or what else changes with the content.
    """
    if any(map(storage.in_bucket, files)):
        return _object_hashes(files)
    known = Remembered(memory)
    before = [_status(file) for file in files]
    found = [known.get(status) for status in before]
    missing = [index for index, digest in enumerate(found) if digest is None]
    with ThreadPoolExecutor(threads()) as pool:
        pending = {
            index: [
                pool.submit(_hash_piece, files[index], start, progress)
                for start in range(0, max(before[index].st_size, 1), PIECE)
            ]
            for index in missing
        }
        try:
            for index in missing:
                found[index] = xxh3_128(b"".join(piece.result() for piece in pending[index])).hexdigest()
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise ConfigError(f"cannot read {error.filename or files[index]}: {error.strerror or error}") from error
        except BaseException:  # Ctrl-C does not wait for what was not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for index in missing:
        after = _status(files[index])
        if _facts(after) != _facts(before[index]):
            raise ConfigError(f"{files[index]} is written to while it is read: start again when it is whole")
        known.add(after, found[index])
    known.save()
    return found


def _object_hashes(files: Sequence[Path]) -> list[str]:
    """Of files some of which are in buckets."""
    try:
        versions = iter(storage.versions(file for file in files if storage.in_bucket(file)))
        return [digest_of(next(versions)) if storage.in_bucket(file) else content_hash(file) for file in files]
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error


def content_hash(file: Path) -> str:
    """Of one file, read now."""
    return content_hashes([file])[0]


def _hash_piece(file: Path, start: int, progress: Callable[[int], None]) -> bytes:
    state = xxh3_128()
    with storage.open_file(file, 0) as stream:
        stream.seek(start)
        left, buffer = PIECE, memoryview(bytearray(READ))
        while left:
            n = stream.readinto(buffer[: min(READ, left)])
            if not n:
                break
            state.update(buffer[:n])
            left -= n
            progress(n)
    return state.digest()


def _status(file: Path) -> os.stat_result:
    try:
        return os.stat(file)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error


def _facts(status: os.stat_result) -> str:
    values = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return ":".join(map(str, values))


class Remembered:
    """Hashes of files by device, inode, size, time of writing and time of change.

    The time of change is the one that no program can set: whatever writes, replaces or renames a file sets it to now,
    `rsync -t`, `cp -p` and `tar` included. Where a file system is not known to keep it by this machine's clock (those
    of a network, images, overlays), and for files that changed just now, nothing is remembered.
    """

    def __init__(self, folder: Path | None):
        self._file = folder / MEMORY if folder is not None else None
        self._known: dict[str, str] = {}
        self._changed = False
        if self._file is not None:
            self._known = _read_memory(self._file)

    def get(self, status: os.stat_result) -> str | None:
        """The hash; None where it has to be made."""
        return self._known.get(_facts(status)) if _settled(status) else None

    def add(self, status: os.stat_result, digest: str) -> None:
        """A hash that was made just now."""
        if self._file is not None and _settled(status):
            self._known[_facts(status)] = digest
            self._changed = True

    def save(self) -> None:
        """Writes what was added, whole or not at all; a folder that cannot be written costs the next start time."""
        if not self._changed:
            return
        known = dict(list((_read_memory(self._file) | self._known).items())[-MOST_REMEMBERED:])
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=".contents-", dir=self._file.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({"known": known, "check": digest_of(known)}, stream)
            os.replace(part, self._file)
        except OSError:
            return


def _read_memory(file: Path) -> dict[str, str]:
    try:
        stored = json.loads(storage.read_bytes(file))
        return stored["known"] if stored["check"] == digest_of(stored["known"]) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _settled(status: os.stat_result) -> bool:
    age = time.time() - status.st_ctime_ns / 1e9
    return age > SETTLED_SECONDS and status.st_dev in _trusted_devices()


@cache
def _trusted_devices() -> frozenset[int]:
    """Devices whose file systems are in KEEPS_CHANGE_TIMES; none where the system does not tell."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
            return frozenset(_device_of_mounts(lines))
    except OSError:
        return frozenset()


def _device_of_mounts(lines: Iterable[str]) -> Iterable[int]:
    for line in lines:
        own, _, about = line.partition(" - ")
        if about.split(" ")[0] in KEEPS_CHANGE_TIMES:
            major, _, minor = own.split(" ")[2].partition(":")
            yield os.makedev(int(major), int(minor))
