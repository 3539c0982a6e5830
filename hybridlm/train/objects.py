# SPDX-License-Identifier: Apache-2.0
"""What grows while a run goes on, in a bucket, where nothing is appended to: an object for each start of the run.

An object is written anew, whole, from time to time and when asked for. What others write as files (TensorBoard, the
profiler) is written on this machine first.
"""

import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hybridlm import storage
from hybridlm.errors import RunError

SEND_SECONDS = 30.0
"""Between two times that an object is written anew, longer where it is large: a megabyte a second is sent at most."""
BYTES_PER_SECOND = 1 << 20
_NAME = re.compile(r"(\d{6})-after-(\d+)\.jsonl")


def read_parts(folder: Path) -> list[tuple[int | None, bytes]]:
    """(the step that a start went on after, what it wrote) of all starts of a run, the first one first.

    Before them, with None, the metrics.jsonl of a run that was on a disk before.
    """
    single = folder.with_name("metrics.jsonl")
    before = [(None, storage.read_bytes(single))] if storage.exists(single) else []
    found = sorted(name for name in storage.names(folder) if _NAME.fullmatch(name))
    return before + [(int(_NAME.fullmatch(name)[2]), storage.read_bytes(folder / name)) for name in found]


class Outbox:
    """A folder of this machine whose files are sent into a folder in a bucket: those that came or changed since."""

    def __init__(self, target: Path):
        """target: the folder in the bucket. What lies in the outbox by now is of earlier starts and stays there."""
        self.target, self.folder = target, storage.scratch("outbox", target)
        self._sent = self._versions()

    def send(self) -> None:
        """Sends what is new."""
        for file, version in self._versions().items():
            if self._sent.get(file) != version:
                storage.copy(file, self.target / file.relative_to(self.folder).as_posix())
                self._sent[file] = version

    def _versions(self) -> dict[Path, tuple[int, int | str]]:
        return {file: storage.version(file) for file in sorted(self.folder.rglob("*")) if file.is_file()}


class Objects:
    """Lines of this start of a run."""

    def __init__(self, folder: Path, after: int, along: Callable[[], None] = lambda: None):
        """folder: of the objects. after: the step that is gone on from. along: called behind each sending of the lines,
        by the thread that sends."""
        numbers = [int(found[1]) for name in storage.names(folder) if (found := _NAME.fullmatch(name))]
        self._path = folder / f"{max(numbers, default=0) + 1:06d}-after-{after}.jsonl"
        self._along = along
        self._lines: list[bytes] = []
        self._size, self._due = 0, time.monotonic() + SEND_SECONDS
        self._sender = ThreadPoolExecutor(1, "metrics to bucket")
        self._sending: Future | None = None
        self.flush()

    def write(self, line: bytes) -> int:
        """Adds a line, to be sent later. RunError where an earlier one could not be."""
        self._lines.append(line)
        self._size += len(line)
        if time.monotonic() >= self._due and (self._sending is None or self._sending.done()):
            self._wait()
            self._start()
        return len(line)

    def flush(self) -> None:
        """Sends everything, and returns when it is there. RunError, one line, where that fails."""
        self._wait()
        self._start()
        self._wait()

    def close(self) -> None:
        """flush, and an end."""
        try:
            self.flush()
        finally:
            self._sender.shutdown()

    def _start(self) -> None:
        self._due = time.monotonic() + max(SEND_SECONDS, self._size / BYTES_PER_SECOND)
        self._sending = self._sender.submit(self._send, b"".join(self._lines))

    def _wait(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            try:
                sending.result()
            except OSError as error:
                raise RunError(f"cannot write {error.filename or self._path}: {error.strerror}") from error

    def _send(self, content: bytes) -> None:
        storage.write_bytes(self._path, content)
        self._along()
