# SPDX-License-Identifier: Apache-2.0
"""A train step that is compiled while parameters are drawn or read: the longest part of a start waits for nothing."""

import threading
import time
from concurrent.futures import Future

import jax
import numpy as np
from jax.sharding import Mesh

from hybridlm.lazy import no_collections
from hybridlm.train.base import Base
from hybridlm.train.kept_step import KeptStep, cache_hits
from hybridlm.train.kernels_ahead import compile_ahead
from hybridlm.train.written_later import written_later

LATEST = 60.0
"""Seconds after which a compiled step is written to disk though none was taken."""
LOOK = 0.2
"""Seconds between two looks at whether the process still runs."""


class TrainStep:
    """(state, batch) -> (state, metrics): a jitted step that takes what hangs on the length of the run beside them, so
    that more steps are not another program."""

    def __init__(self, jitted, lengths: np.ndarray, base: Base | None = None):
        """base: what the step takes behind these; None: nothing."""
        self.jitted, self.lengths, self.base = jitted, lengths, base or Base()
        self._writes = False
        self._ahead: Future | None = None
        self._taken = threading.Event()
        self._lowered = threading.Event()
        self._lowered.set()

    def __call__(self, state, batch):
        """A step; waits for what `prepare` started, and raises what that raised."""
        step = self.jitted if self._ahead is None else self._ahead.result()
        try:
            return step(state, batch, self.lengths, *self.base.args)
        finally:
            self._taken.set()

    def prepare(self, mesh: Mesh, state, batch, kept: KeptStep | None = None) -> None:
        """Starts to compile the step for arguments like these, in a thread of its own; the only ones it takes then.

        kept: where the compiled step may be, and is kept if it is not and XLA had to compile it. A process that ends
        before waits for the compiler, which cannot be stopped in the middle.
        """
        ahead = self._ahead = Future()
        if not (kept and kept.is_there()):
            self._lowered.clear()

        def compile_() -> None:
            try:
                with jax.set_mesh(mesh):
                    found = kept and kept.load(mesh, (state, batch, self.lengths, *self.base.args))
                    with no_collections(), cache_hits() as hits, written_later() as write:
                        step = found or compile_ahead(lambda: self.trace(state, batch), mesh, self._lowered.set)
                    ahead.set_result(step)
                    self._wait_until_taken()
                    self._writes = True
                    write()
                    if kept and not found and not hits:
                        kept.store(step)
            except BaseException as error:  # whatever it is, it is the first step's
                if not ahead.done():
                    ahead.set_exception(error)
            finally:
                self._writes = False
                self._lowered.set()

        threading.Thread(target=compile_, name="compile").start()

    def writes(self) -> bool:
        """Whether a compiled step is made bytes and written now, for which Python may stand still for seconds."""
        return self._writes

    def _wait_until_taken(self) -> None:
        """Until a first step is on its way, or none will be: what is written before delays it by seconds."""
        end = time.monotonic() + LATEST
        while not self._taken.wait(LOOK) and threading.main_thread().is_alive() and time.monotonic() < end:
            pass

    def wait_until_lowered(self) -> None:
        """Waits until of what `prepare` started XLA alone is left: Python has one thread for all, and what is traced or
        imported before makes the longest part of a start longer."""
        self._lowered.wait()

    def lower(self, state, batch):
        """As of every jitted function."""
        return self.jitted.lower(state, batch, self.lengths, *self.base.args)

    def trace(self, state, batch):
        """As of every jitted function."""
        return self.jitted.trace(state, batch, self.lengths, *self.base.args)
