# SPDX-License-Identifier: Apache-2.0
"""Ends a run that hangs: stacks of all threads in a file, one line, exit code 75."""

import faulthandler
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridlm.errors import Exit
from hybridlm.train.ending import leave

LONGEST_STEPS = 5
"""A step may take this many times the longest one so far, where that is more than the limit."""
PATIENCE = 10
"""Compiling, evaluating the first batch and saving may take this many times the limit."""
WRITING_SECONDS = 20
"""The file of stacks may hang as well, on the same disk as the run."""


class Watchdog:
    """While entered, a thread counts the seconds since the last step.

    Time in which the whole process stood still (Ctrl-Z, a suspended machine) does not count.
    """

    def __init__(self, seconds: float, file: Path, resume: str, tick: float = 1.0):
        """seconds: without a finished step; 0: never. file: for the stacks. resume: the command that goes on."""
        self._limit, self._file, self._resume = seconds, file, resume
        self._tick = min(tick, seconds / 10) if seconds else tick
        self._doing: str | None = None
        self._allowed = 0.0
        self._waited = self._longest = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self):
        if self._limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._closed.set()

    def step(self) -> None:
        """A step was finished; the next one is waited for."""
        with self._lock:
            if self._doing == "step":
                self._longest = max(self._longest, self._waited)
            self._begin("step", max(self._limit, LONGEST_STEPS * self._longest))

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Something else than a step, such as compiling or saving; afterwards a step is waited for."""
        with self._lock:
            self._begin(what, PATIENCE * self._limit)
        try:
            yield
        finally:
            with self._lock:
                self._begin("step", max(self._limit, LONGEST_STEPS * self._longest))

    def progress(self) -> None:
        """What is being done got on: another batch."""
        with self._lock:
            self._waited = 0.0

    def rest(self) -> None:
        """Nothing is waited for."""
        with self._lock:
            self._doing = None

    def _begin(self, what: str, allowed: float) -> None:
        self._doing, self._allowed, self._waited = what, allowed, 0.0

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            with self._lock:
                self._waited += min(now - before, 2 * self._tick)
                late = self._doing if self._doing and self._waited > self._allowed else None
                waited = self._waited
            before = now
            if late:
                self._end(late, waited)

    def _end(self, what: str, waited: float) -> None:
        writing = threading.Thread(target=self._write_stacks, daemon=True)
        writing.start()
        writing.join(WRITING_SECONDS)
        where = f"stacks of all threads: {self._file}"
        if writing.is_alive():
            where = f"the stacks of all threads are above, {self._file} cannot be written"
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        done = "no step was finished" if what == "step" else f"{what} did not get on"
        leave(
            Exit.AGAIN,
            f"error: {done} for {waited:.0f} s (run.watchdog {self._limit:g}); {where}; to resume: {self._resume}",
        )

    def _write_stacks(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
