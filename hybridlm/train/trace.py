# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps of a run by jax.profiler."""

from pathlib import Path

import jax

from hybridlm import storage
from hybridlm.train.objects import Outbox


class Trace:
    """Traces the steps from the first to the last of run.profile_steps, into the run's folder."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        """steps: None traces nothing."""
        self._first, self._last = steps or (0, 0)
        self._folder = folder
        self._outbox = Outbox(folder) if storage.in_bucket(folder) else None
        self._running = False

    def turns(self, step: int) -> bool:
        """Whether the trace begins or ends between this step and the next."""
        return step + 1 == self._first or (self._running and step >= self._last)

    def turn(self, step: int) -> None:
        """Begins or ends the trace if that is due between this step, which is complete, and the next."""
        if self._running and step >= self._last:
            self.close()
        elif step + 1 == self._first:
            jax.profiler.start_trace(str(self._outbox.folder if self._outbox else self._folder))
            self._running = True

    def close(self) -> None:
        """Ends the trace if it runs."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._outbox is not None:
                self._outbox.send()
