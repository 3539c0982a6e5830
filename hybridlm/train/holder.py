# SPDX-License-Identifier: Apache-2.0
"""Who uses a run's folder now, asked from outside: nothing is taken, written or waited for."""

import fcntl
import os
import time
from pathlib import Path

from hybridlm import storage
from hybridlm.train.lease import STALE_SECONDS, holder_of


def holder(folder: Path) -> str | None:
    """`process 12 on host` of the run in a folder; None where none runs there.

    A folder of this machine is locked as long as its process lives, whatever becomes of it. In a bucket a lease that
    was not renewed for STALE_SECONDS, by this machine's clock, counts as left behind.
    """
    if storage.in_bucket(folder):
        return _of_lease(folder / "lock")
    if any(_is_locked(path) for path in (folder, folder / "lock")):
        try:
            return storage.read_bytes(folder / "lock").decode("utf-8", "replace") or "another process"
        except OSError:
            return "another process"
    return None


def _of_lease(lock: Path) -> str | None:
    try:
        content = storage.read_bytes(lock)
    except FileNotFoundError:
        return None
    owner, written = holder_of(content)
    return owner if time.time() - written <= STALE_SECONDS else None


def _is_locked(path: Path) -> bool:
    """Whether a process has locked a file or folder for itself."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(number)
    return False
