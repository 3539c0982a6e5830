# SPDX-License-Identifier: Apache-2.0
"""Who uses a run's folder in a bucket, where nothing can be locked: an object that its owner renews.

It says who holds it and since when, and every change of it names the state that it changes. Who finds one that is not
renewed takes it over: after STALE_SECONDS, measured on its own clock; at once where the owner's process is known to be
gone, or where the object is older than clocks are wrong. An owner that was held up for so long asks before it writes.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from hybridlm.errors import RunError
from hybridlm.storage.cell import Cell

RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0
"""Without a renewal for so long, the lease is anybody's."""
POLL_SECONDS = 3.0
OLD_SECONDS = 600.0
"""Of an object by its own time and this machine's: more than clocks differ."""
log = logging.getLogger(__name__)


class Lease:
    """The lease of a folder: a context manager that takes it, renews it from a thread, and lets it go."""

    def __init__(self, path: Path, say: Callable[[str], object] = print):
        """path: of the object. say: told where the lease of a process that may be gone has to run out first."""
        self._path, self._say, self._cell = path, say, Cell(path)
        self._state: bytes | None = None  # of the object as this process wrote it; None: it is another's
        self._token, self._renewed = uuid.uuid4().hex, 0.0
        self._changing, self._over = threading.Lock(), threading.Event()

    def __enter__(self):
        """RunError where somebody else renews it; OSError where the bucket does not answer."""
        content, seen = self._cell.read()
        since, told = time.monotonic(), False
        while not (self._is_free(content, since) and self._write(seen)):
            if not told:
                self._say(
                    f"{self._path.parent} is held by {_owner(content)}: {STALE_SECONDS:.0f} s to see if that is gone"
                )
                told = True
            time.sleep(POLL_SECONDS)
            content, state = self._cell.read()
            if content is not None and state != seen:
                raise RunError(f"{self._path.parent} is in use by {_owner(content)}; another run goes to --run.dir=NEW")
            seen = state
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        with self._changing:
            if self._state is not None:
                try:
                    self._cell.clear(self._state)
                except OSError as error:
                    log.warning("%s could not be removed (%s): it runs out by itself", self._path, error.strerror)

    def check(self) -> None:
        """RunError where the folder may be another's: to be asked before anything is written there."""
        if time.monotonic() - self._renewed > STALE_SECONDS / 2:
            self._renew()
        if self._state is None:
            raise RunError(f"{self._path.parent} was taken over by another process, or deleted: this one ends")
        if (silent := time.monotonic() - self._renewed) > STALE_SECONDS:
            raise RunError(f"{self._path} could not be renewed for {silent:.0f} s: the folder may be another's by now")

    def _is_free(self, content: bytes | None, since: float) -> bool:
        return content is None or time.monotonic() - since >= STALE_SECONDS or _is_gone(content)

    def _keep(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            self._renew()

    def _renew(self) -> None:
        """Writes the time anew; an answer that does not come is no loss as long as nobody else takes the object."""
        with self._changing:
            if self._state is None:
                return
            try:
                self._write(self._state)
            except OSError as error:
                log.warning("%s could not be renewed: %s", self._path, error.strerror)

    def _write(self, state: bytes) -> bool:
        """Takes or renews it where it is in this state still."""
        holder = {"owner": f"process {os.getpid()} on {socket.gethostname()}", "process": _process(os.getpid())}
        began = time.monotonic()
        written = self._cell.swap(state, json.dumps({**holder, "token": self._token, "time": time.time()}).encode())
        if written is None:  # or it was, the answer was lost, and the request was made again
            content, state = self._cell.read()
            written = state if _read(content).get("token") == self._token else None
        self._state = written
        if written is not None:
            self._renewed = began
        return written is not None


def _read(content: bytes | None) -> dict:
    try:
        values = json.loads(content)
    except (TypeError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def holder_of(content: bytes) -> tuple[str, float]:
    """(who wrote the object, when by its own clock: seconds since 1970, or 0 where it does not say, or is gone)."""
    written = _read(content).get("time")
    known = isinstance(written, int | float) and not _is_gone(content)
    return _owner(content), float(written) if known else 0.0


def _owner(content: bytes | None) -> str:
    return str(_read(content).get("owner", "another process"))


def _is_gone(content: bytes) -> bool:
    """Whether the object is old, or its owner was a process of this machine that is no more."""
    values = _read(content)
    written = values.get("time")
    if isinstance(written, int | float) and time.time() - written > OLD_SECONDS:
        return True
    match values.get("process"):
        case [str(place), int(pid), str(started)]:
            here = _process(pid)
            ours = _process(os.getpid())
            return ours is not None and ours[0] == place and (here is None or here[2] != started)
    return False


def _process(pid: int) -> list | None:
    """[this start of the machine and the processes that it sees, pid, when it was started]; None where there is none,
    or where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return [place, pid, started]
