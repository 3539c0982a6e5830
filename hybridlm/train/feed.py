# SPDX-License-Identifier: Apache-2.0
"""Batches of the training text for the loop, which can stop while one is waited for, and outlives a dead reader."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TextIO

from hybridlm.errors import AgainError, ConfigError, RunError
from hybridlm.train.batches import Batches
from hybridlm.train.ending import leave

ATTEMPTS = 3
"""Of reading one batch; each begins with fresh workers."""
LOOKS = 0.05  # seconds between two looks for a stop
GRACE = 1.0  # seconds that a batch which nobody wants any more may take, before its reader counts as stuck


class Feed:
    """The batches of a run, one after the other, read and put on the devices in a thread of its own: the next one while
    a step is computed.

    A batch that cannot be read, because a worker process died, is read again by new workers. One that does not come
    within half of `patience` seconds is, too: the workers are killed. Where that does not help, RunError or, where it
    just does not come, AgainError; the state of the run is whole then, and can be saved.
    """

    def __init__(self, batches: Batches, patience: float, stopped: Callable[[], bool], say: Callable[[str], None]):
        """patience: seconds for a batch; 0: for ever. stopped: whether the run was told to stop. say: shows a line."""
        self._batches, self._patience, self._stopped, self._say = batches, patience, stopped, say
        self._asked, self._given = SimpleQueue(), SimpleQueue()
        self._state = batches.loader.get_state()
        self._is_asked = False  # for a batch that was not taken yet
        self._answer: tuple | None = None  # which came before it was fetched
        threading.Thread(target=self._read, name="feed", daemon=True).start()

    def next(self, last: bool = False) -> dict[str, Any] | None:
        """The next batch, on the devices; None where the run was told to stop before it came.

        last: no other will be asked for, so that none is read ahead."""
        for attempt in range(ATTEMPTS):
            batch, state, error = self._fetch(self._stopped)
            if error is None:
                if batch is not None:
                    self._state = state
                    if not last:
                        self._ask()
                return batch
            if self._stopped():  # a signal to the whole group ends the workers, too
                return None
            if isinstance(error, ConfigError | RunError):
                raise error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if attempt + 1 < ATTEMPTS:
                self._say(f"a batch cannot be read ({reason}): once more with new workers")
        raise RunError(f"a batch cannot be read, {ATTEMPTS} times in a row ({reason})") from error

    def state(self) -> dict:
        """The loader's, without a batch that was read but not handed out."""
        return self._state

    def go_back(self, state: dict, left_out: int) -> None:
        """Goes on from a checkpoint's state, without the batches that would come next there."""
        if self._is_asked:  # what was read ahead is of the other way
            self._fetch(lambda: False)
        self._batches.loader.set_state(state)
        self._batches.loader.skip(left_out)
        self._state = self._batches.loader.get_state()

    @property
    def stuck(self) -> bool:
        """Whether the reader still waits for a batch that nobody wants any more, and that does not come now."""
        if self._is_asked and self._answer is None:
            try:
                self._answer = self._given.get(timeout=GRACE)
            except Empty:
                return True
        return False

    def leave_if_stuck(self, code: int, line: str, stream: TextIO | None = None) -> None:
        """Ends the process where its orderly end would wait for the reader, too; see `leave`."""
        if self.stuck:
            _kill_workers()
            leave(code, line, stream)

    def close(self) -> None:
        """Ends the thread, once it has what it waits for: a batch that is coming is waited for."""
        self._asked.put(False)
        _ = self.stuck

    def _ask(self) -> None:
        if not self._is_asked:
            self._is_asked = True
            self._asked.put(True)

    def _fetch(self, stopped: Callable[[], bool]) -> tuple[Any, Any, Exception | None]:
        """(batch on the devices, the loader's state behind it, None), or (None, None, what went wrong or None where it
        stopped)."""
        self._ask()
        began, killed = time.monotonic(), False
        while True:
            try:
                answer = self._answer or self._given.get(timeout=LOOKS)
            except Empty:
                waited = time.monotonic() - began
                if stopped():
                    return None, None, None
                if self._patience and waited > self._patience / 2 and not killed:
                    _kill_workers()
                    killed = True
                if self._patience and waited > self._patience:
                    raise AgainError(f"no batch of text came for {waited:.0f} s (run.watchdog)") from None
            else:
                self._is_asked, self._answer = False, None
                return answer

    def _read(self) -> None:
        while self._asked.get():
            try:
                batch, state = next(self._batches.loader), self._batches.loader.get_state()
            except Exception as error:
                self._given.put((None, None, error))
                continue
            try:
                self._given.put((self._batches.put(batch), state, None))
            except Exception as error:  # it was read: to read on would leave it out
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                self._given.put((None, None, RunError(f"a batch cannot be put on the devices: {reason}")))


def _kill_workers() -> None:
    """Kills the processes that read text: one that stands still takes no other signal."""
    for process in multiprocessing.active_children():
        process.kill()
