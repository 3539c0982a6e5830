# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that are written to JAX's cache on disk when there is time for it.

JAX writes a program as soon as it is compiled: makes it bytes, presses them and writes them, before anybody gets it.
Of a step that is seconds of a start. Here what a thread compiles is gathered, and written when the step is on its way.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from jax._src import compilation_cache  # no public name puts a program there

PUT = "put_executable_and_time"
"""What writes a program; where JAX names it otherwise, programs are written as they are compiled."""

log = logging.getLogger(__name__)
_thread = threading.local()
_lock = threading.Lock()


@contextmanager
def written_later() -> Iterator[Callable[[], None]]:
    """Within, programs that this thread compiles are not written; gives what writes them. It never raises."""
    _have_asked()
    before, _thread.later = getattr(_thread, "later", None), list[Callable[[], None]]()
    later = _thread.later

    def write() -> None:
        while later:
            try:
                later.pop(0)()
            except Exception as error:  # whatever it is, the run goes on
                log.warning("a compiled program is not kept: %s", error)

    try:
        yield write
    finally:
        _thread.later = before


def _have_asked() -> None:
    """Has JAX ask, once for all, whether the thread that writes a program wants that now."""
    with _lock:
        put = getattr(compilation_cache, PUT, None)
        if put is None or getattr(put, "__module__", None) == __name__:
            return

        def asked(*args, **more) -> None:
            later = getattr(_thread, "later", None)
            if later is None:
                put(*args, **more)
            else:
                later.append(partial(put, *args, **more))

        setattr(compilation_cache, PUT, asked)
