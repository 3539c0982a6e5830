# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM, SIGHUP: the first asks the loop to finish its step and save, a second one leaves at once."""

import signal
import socket
import sys
import threading
import time

from hybridlm.errors import print_line
from hybridlm.train.ending import leave

ECHO_SECONDS = 1.0
"""A signal this soon after the first is the same one: `timeout` and some shells send it to process and group alike."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOTHING_TO_SAVE = "stopped before the first step: nothing new to save"


class StopRequest:
    """While entered, the signals set `signum` instead of raising; one that the caller ignores (nohup) stays ignored.

    Before `arm()`, while there is nothing to save, the first signal leaves at once too. A thread reads the signals, so
    that this works while the main thread waits inside a compilation, and no callback can swallow an exception.

    Several processes stop together: whichever gets a signal tells the others, and all stop at their next call of
    `agreed()` after the latest that any of them has reached. (JAX's own `reached_preemption_sync_point` does the same
    for SIGTERM alone, looks for it once a second, knows no second signal and no end before the first step.)
    """

    def __init__(self):
        self.signum: int | None = None
        self._armed = False
        self._peers = None
        self._turns, self._last = 0, None
        self._turn = threading.Lock()

    def arm(self) -> None:
        """From here on there is something to save."""
        self._armed = True

    def join(self, peers) -> None:
        """From here on the processes of a run (train/peers.py) stop together."""
        peers.start(self._stop_together)
        self._peers = peers if peers.count > 1 else None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            self._previous = None  # signals belong to the program that called us from a thread
            return self
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        wanted = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) is not signal.SIG_IGN]
        self._previous = {s: signal.signal(s, lambda *_: None) for s in wanted}
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
        asked = None
        while received := self._read.recv(1):
            signum = received[0]
            if signum not in SIGNALS:
                continue
            if asked is not None:
                if time.monotonic() - asked < ECHO_SECONDS:
                    continue
                if self._peers is not None:
                    self._peers.fail(128 + signum, "stopped at once, without saving")
                leave(128 + signum, "\nstopped at once, without saving", sys.stdout)
            asked = time.monotonic()
            self.ask(signum)
            print_line("\nfinishing this step, then saving; once more to leave at once", sys.stdout)

    def ask(self, signum: int) -> None:
        """What a signal does; leaves at once where there is nothing to save."""
        if self._peers is not None:
            self._peers.tell_to_stop(signum)
        elif not self._armed:
            leave(128 + signum, f"\n{NOTHING_TO_SAVE}", sys.stdout)
        elif self.signum is None:
            self.signum = signum

    def agreed(self) -> bool:
        """Whether to stop now; every process of a run calls this equally often, once a step or batch."""
        if self._peers is None:
            return self.signum is not None
        with self._turn:  # held while the processes agree
            self._turns += 1
            return self._last is not None and self._turns > self._last

    def _stop_together(self, signum: int) -> None:
        """In a thread of each process: finds the latest turn of all. Until then none can begin another."""
        with self._turn:
            last = self._peers.latest(self._turns)
            if last == 0:  # nobody has finished a step: all are free to leave
                self._peers.leave_together(128 + signum, NOTHING_TO_SAVE)
            self.signum, self._last = signum, last
