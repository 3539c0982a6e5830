# SPDX-License-Identifier: Apache-2.0
"""Worker processes end when their parent does, however it ends and however far their start has come.

Python sends a new process its configuration, then the function that it calls, whose modules take seconds to import. The
guard travels in the configuration, so that it watches before the first of them is imported.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator

NAME = "hybridlm_guard"
WORKER_NAME = "grain-process-prefetch"
POLL_SECONDS = 0.5
CLOSE_SECONDS = 5.0


class Guard:
    """Unpickled in a new process, it watches the process that pickled it."""

    def __reduce__(self):
        return watch, (os.getpid(),)


def watch(parent: int) -> None:
    """Leaves Ctrl-C to the parent, and ends this process once that is no more."""
    if parent == os.getpid():
        return
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Processes that are started inside carry a guard."""
    settings = multiprocessing.current_process()._config
    settings[NAME] = Guard()
    try:
        yield
    finally:
        settings.pop(NAME, None)


class Guarded:
    """An iterator of Grain's that reads in worker processes, which carry a guard and do not hold up its end."""

    def __init__(self, iterator):
        self._iterator = iterator

    def __next__(self):
        with guarded():  # they are started when the first element is asked for
            return next(self._iterator)

    def close(self) -> None:
        """Stops the processes; kills those that do not stop soon, as one that hangs, for which Grain waits longer."""
        killer = threading.Timer(CLOSE_SECONDS, kill_workers)
        killer.daemon = True
        with contextlib.suppress(RuntimeError):  # at the end of the interpreter no thread begins
            killer.start()
        self._iterator.close()
        killer.cancel()


def kill_workers() -> None:
    """Ends Grain's worker processes of this process, stopped ones too."""
    for process in multiprocessing.active_children():
        if process.name.startswith(WORKER_NAME):
            process.kill()
