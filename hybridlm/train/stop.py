# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: the first asks the loop to finish its step and save, a second one leaves at once."""

import os
import signal
import socket
import sys
import threading
import time

ECHO_SECONDS = 1.0
"""A signal this soon after the first is the same one: `timeout` and some shells send it to process and group alike."""


class StopRequest:
    """While entered, SIGINT and SIGTERM set `signum` instead of raising.

    Before `arm()`, while there is nothing to save, the first signal leaves at once too. A thread reads the signals, so
    that this works while the main thread waits inside a compilation, and no callback can swallow an exception.
    """

    def __init__(self):
        self.signum: int | None = None
        self._armed = False

    def arm(self) -> None:
        """From here on there is something to save."""
        self._armed = True

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            self._previous = None  # signals belong to the program that called us from a thread
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        if self._previous is None:
            return
        signal.set_wakeup_fd(self._previous_fd)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._write.close()
        self._thread.join()
        self._read.close()

    def _watch(self):
        asked = float("-inf")
        while received := self._read.recv(1):
            signum = received[0]
            if signum not in (signal.SIGINT, signal.SIGTERM):
                continue
            if not self._armed:
                _leave(signum, "stopped before the first step: nothing new to save")
            if self.signum is not None:
                if time.monotonic() - asked < ECHO_SECONDS:
                    continue
                _leave(signum, "stopped at once, without saving")
            self.signum, asked = signum, time.monotonic()
            print("\nfinishing this step, then saving; once more to leave at once", flush=True)

    def agreed(self, step: int, every: int) -> bool:
        """Whether to stop after this step: all processes agree, those of a cluster at every `every`-th step."""
        import jax

        if jax.process_count() == 1:
            return self.signum is not None
        if step % every:
            return False
        import numpy as np
        from jax.experimental.multihost_utils import process_allgather

        signums = process_allgather(np.int32(self.signum or 0))
        self.signum = int(signums.max()) or None
        return self.signum is not None


def _leave(signum: int, why: str) -> None:
    show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""  # the live line hides it
    print(f"\n{show_cursor}{why}", flush=True)
    os._exit(128 + signum)
