# SPDX-License-Identifier: Apache-2.0
"""Copies on this machine of what lies in a bucket, and back: whole, and checked by size and hash."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from hybridlm.storage.files import PART_BYTES, copy, listing, read_bytes, reading, write_text, writing
from hybridlm.storage.paths import in_bucket

log = logging.getLogger(__name__)

_WHOLE = "whole.json"
"""Written last into a folder of a bucket that `publish` made: name -> [bytes, blake2b] of each file."""


def scratch(purpose: str, path: Path) -> Path:
    """The folder of this machine for copies of what lies in a bucket's folder, under $HYBRIDLM_SCRATCH (by default
    ~/.cache/hybridlm/buckets)."""
    base = Path(os.environ.get("HYBRIDLM_SCRATCH") or "~/.cache/hybridlm/buckets").expanduser()
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", os.fspath(path).partition("://")[2])[-40:]
    return base / purpose / f"{name}-{hashlib.blake2b(os.fspath(path).encode(), digest_size=6).hexdigest()}"


def local(purpose: str, folder: Path) -> Path:
    """Where this machine keeps what cannot lie in a bucket: the folder itself, or of one in a bucket its scratch."""
    return scratch(purpose, folder) if in_bucket(folder) else folder


def is_published(folder: Path) -> bool:
    """Whether a folder in a bucket holds all that `publish` put there."""
    try:
        read_bytes(folder / _WHOLE)
    except FileNotFoundError:
        return False
    return True


def publish(folder: Path, target: Path) -> None:
    """Copies the files of a folder of this machine into a folder in a bucket; others see all of them or none."""
    listed = {}
    for file in sorted(folder.iterdir()):
        listed[file.name] = [file.stat().st_size, _copy_hashed(file, target / file.name)]
    write_text(target / _WHOLE, json.dumps(listed))


def fetch(source: Path, folder: Path) -> bool:
    """Copies what `publish` put into a bucket into a folder of this machine.

    False, and nothing copied, where there is nothing, or where a file is not what was put there, which is logged.
    """
    try:
        listed = json.loads(read_bytes(source / _WHOLE))
    except FileNotFoundError:
        return False
    copies = {source / name: folder / Path(name).name for name in listed}
    for (far, here), (n_bytes, digest) in zip(copies.items(), listed.values(), strict=True):
        try:
            whole = _copy_hashed(far, here) == digest and here.stat().st_size == n_bytes
        except FileNotFoundError:
            whole = False
        if not whole:
            log.warning("%s is damaged: not used", far)
            for copied in copies.values():
                copied.unlink(missing_ok=True)
            return False
    return True


def mirror(source: Path, names: Iterable[str] | None = None) -> Path:
    """The copy on this machine of a folder in a bucket, or of these of its files, brought up to date by size and tag.

    OSError where it cannot be copied; one process of a machine copies, the others wait.
    """
    here = scratch("copies", source)
    here.mkdir(parents=True, exist_ok=True)
    found = listing(source)
    with open(here / ".lock", "a") as lock:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        known = here / ".versions.json"
        copied = json.loads(known.read_bytes()) if known.exists() else {}
        for name in found if names is None else names:
            if name not in found:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(source / name))
            target, version = here / name, list(found[name])
            if copied.get(name) != version or not target.exists() or target.stat().st_size != version[0]:
                target.parent.mkdir(parents=True, exist_ok=True)
                copy(source / name, target)
                copied[name] = version
                write_text(known, json.dumps(copied))
    return here


def _copy_hashed(source: Path, target: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with reading(source) as read, writing(target) as written:
        while part := read.read(PART_BYTES):
            digest.update(part)
            written.write(part)
    return digest.hexdigest()
