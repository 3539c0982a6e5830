# SPDX-License-Identifier: Apache-2.0
"""Entries of the token cache: folders that are whole, verified when read, and built again where they are not.

An entry is `CACHE_DIR/KEY/` with its files and `stats.json`, which holds the size and hash of each of them and a hash
of itself. It is written in a temporary folder and renamed into place when whole; a lock lets one process build what
several ask for, and where locks do not work the first rename wins. An interrupted build leaves nothing that is ever
read. All of an entry is hashed when it is opened, in threads: a changed bit is one line, and the entry is built anew.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hybridlm import storage
from hybridlm.data.identity import content_hashes, digest_of
from hybridlm.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock, the first rename wins
    fcntl = None

STATS = "stats.json"
ABANDONED_SECONDS = 3600.0

logger = logging.getLogger("hybridlm.data")


def find_or_build(cache: Path, key: str, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    """(folder, stats) of an entry; `build(folder)` fills one and returns its stats, to which hashes of files are added.

    Raises ConfigError where the cache folder cannot be written; nothing half-written stays.
    """
    with _cache_errors(cache):
        if storage.in_bucket(cache):
            return _find_in_bucket(cache, key, build)
        return _find_or_build(cache, key, build)


def local_cache(cache: Path) -> Path:
    """The folder of this machine that holds a cache, or the copies of one in a bucket."""
    return storage.local("tokens", cache)


def find_entry(cache: Path, key: str, stats: dict) -> Path | None:
    """The folder of an entry that another host has opened, `stats` its own, in this host's cache; None without one.

    Raises ConfigError where this host's entry is another one.
    """
    if storage.in_bucket(cache):
        with _cache_errors(cache):
            _copy_of_bucket(cache, key)
        cache = local_cache(cache)
    found = _sound_entry(cache / key)
    if found is not None and found != stats:
        raise ConfigError(f"{cache / key} holds other tokens on this host than on the first: remove it here, or there")
    return None if found is None else cache / key


def copy_entry(cache: Path, key: str, stats: dict, parts: Iterator[tuple[str, bytes]]) -> None:
    """Writes the entry of another host to this host's cache, whole or not at all.

    parts: (name, the next bytes) of its files, one file after the other. ConfigError where it cannot be written. No
    lock is taken: who waited for one would hold up all that the parts come from.
    """
    cache, prefix = local_cache(cache), f".copy-{key}-{socket.gethostname()}-"
    with _cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        for former in cache.glob(f"{prefix}*"):
            written = max(path.stat().st_mtime for path in [former, *former.iterdir()])
            if time.time() - written > ABANDONED_SECONDS:  # a killed process left it
                shutil.rmtree(former, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
        try:
            with contextlib.ExitStack() as opened:
                files = {name: opened.enter_context(open(scratch / name, "wb")) for name in stats["files"]}
                for name, part in parts:
                    files[name].write(part)
            (scratch / STATS).write_bytes(_encoded(stats))
            scratch.chmod(0o755)
            try:
                whole = read_entry(scratch) is not None
            except Damaged:
                whole = False
            if whole:
                _publish(scratch, cache / key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if not whole or find_entry(cache, key, stats) is None:
            raise OSError(errno.EIO, "what the first host sent is not all there")


@contextlib.contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """An OSError inside as the ConfigError that says what to change."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"no space left for the token cache under {cache}: free some or set data.cache_dir"
            ) from error
        raise ConfigError(
            f"cannot write the token cache under {cache} ({error.strerror or error}): set data.cache_dir"
        ) from error


def map_array(path: Path, dtype: str, offset: int = 0) -> np.ndarray:
    """The values of a file from a byte on, mapped and not read."""
    # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r", offset=offset) if path.stat().st_size > offset else np.zeros(0, dtype)


class Damaged(Exception):
    """An entry that is there and not what was written; says what is wrong."""


def read_entry(folder: Path) -> dict | None:
    """The stats of an entry all of whose bytes are as they were written; None where there is none.

    Raises Damaged.
    """
    try:
        raw = storage.read_bytes(folder / STATS)
    except FileNotFoundError as error:
        if folder.is_dir():
            raise Damaged(f"{STATS} is missing") from error
        return None
    except NotADirectoryError:
        return None
    try:
        stats = json.loads(raw)
        check = stats.pop("check")
        # the text itself, so that not even a space may differ
        whole = check == digest_of(stats) and raw == _encoded(stats)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{STATS} is not as it was written")
    for name, (size, _) in stats["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise Damaged(f"{name} is missing or cut")
    names = list(stats["files"])
    try:
        hashes = content_hashes([folder / name for name in names])
    except ConfigError as error:
        raise Damaged(str(error)) from error
    for name, digest in zip(names, hashes):
        if digest != stats["files"][name][1]:
            raise Damaged(f"{name} is not as it was written")
    return stats


def _encoded(stats: dict) -> bytes:
    return json.dumps({**stats, "check": digest_of(stats)}, indent=1).encode()


def _sound_entry(folder: Path) -> dict | None:
    """The stats; None where the entry is missing, or damaged, which is said in one line."""
    try:
        return read_entry(folder)
    except Damaged as error:
        logger.warning("token cache %s is damaged (%s): it is built again", folder, error)
        return None


def _find_or_build(cache: Path, key: str, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    entry = cache / key
    stats = _sound_entry(entry)
    if stats is not None:
        return entry, stats
    cache.mkdir(parents=True, exist_ok=True)
    prefix = f".tmp-{key}-{socket.gethostname()}-"
    with _lock(cache / f"{key}.lock") as locked:
        with contextlib.suppress(Damaged):  # said above
            stats = read_entry(entry)  # built while this process waited
        if stats is not None:
            return entry, stats
        if locked:  # nobody else on this machine builds this entry: what is there, a killed process left
            for stale in cache.glob(f"{prefix}*"):
                shutil.rmtree(stale, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
        try:
            stats = build(scratch)
            names = sorted(path.name for path in scratch.iterdir())
            hashes = content_hashes([scratch / name for name in names])
            stats["files"] = {n: [(scratch / n).stat().st_size, digest] for n, digest in zip(names, hashes)}
            stats = json.loads(json.dumps(stats))
            (scratch / STATS).write_bytes(_encoded(stats))
            scratch.chmod(0o755)
            _publish(scratch, entry)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return entry, stats


def _find_in_bucket(cache: Path, key: str, build: Callable[[Path], dict]) -> tuple[Path, dict]:
    """The copy on this machine of an entry in a bucket, which gets it where it has none, or a damaged one."""
    storage.check(cache, "data.cache_dir")
    if whole := _copy_of_bucket(cache, key):
        return whole

    def check_and_build(folder: Path) -> dict:
        storage.check(cache, "data.cache_dir", write=True)
        return build(folder)

    found = _find_or_build(local_cache(cache), key, check_and_build)
    storage.publish(found[0], cache / key)
    return found


def _copy_of_bucket(cache: Path, key: str) -> tuple[Path, dict] | None:
    """(folder, stats) of the copy on this machine of an entry that a bucket has, copied now unless it is there."""
    here = local_cache(cache)
    if not storage.is_published(cache / key):
        return None
    stats = _sound_entry(here / key)
    if stats is None:
        here.mkdir(parents=True, exist_ok=True)
        with _lock(here / f"{key}.lock"):
            scratch = Path(tempfile.mkdtemp(prefix=f".tmp-{key}-{socket.gethostname()}-", dir=here))
            try:
                if storage.fetch(cache / key, scratch) and _sound_entry(scratch) is not None:
                    scratch.chmod(0o755)
                    _publish(scratch, here / key)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        stats = _sound_entry(here / key)
    return None if stats is None else (here / key, stats)


def _publish(scratch: Path, entry: Path) -> None:
    try:
        os.replace(scratch, entry)
    except OSError:
        with contextlib.suppress(Damaged):
            if read_entry(entry) is not None:
                return  # another machine was faster
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)  # a damaged entry
        else:
            entry.unlink(missing_ok=True)
        os.replace(scratch, entry)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock on a file, released by the system if the process dies; False where locks do not work."""
    with open(path, "a") as file:
        locked = False
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
            except OSError as error:
                logger.info(
                    "no file locks under %s (%s): several processes may tokenise the same text", path.parent, error
                )
        yield locked
