# SPDX-License-Identifier: Apache-2.0
"""How a command ends: the exit code and the line of an error, for one process and for all of a run."""

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hybridlm import storage
from hybridlm.errors import ConfigError, Exit, RunError, print_line


def explained(error: BaseException) -> tuple[int, str | None]:
    """(exit code, the line that says what happened); no line where the traceback has to say it."""
    if isinstance(error, ConfigError | RunError):
        return error.exit_code, _one_line(error)
    if isinstance(error, OSError) and error.strerror is not None:
        return Exit.FAILED, _one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, MemoryError) or (
        "RESOURCE_EXHAUSTED" in str(error) and type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    ):
        return Exit.FAILED, _one_line(f"out of memory {str(error)[:200]}")
    if (why := storage.reason(error)) is not None:  # what the client of a bucket raises where nothing told it otherwise
        return Exit.FAILED, why
    return Exit.FAILED, None


def exit_code(command: Callable[[], int]) -> int:
    """That of a command; an error that a line explains is that line, others go on."""
    try:
        return command()
    except (Exception, KeyboardInterrupt) as error:
        code, line = explained(error)
        if line is None:
            raise
        print_line(f"error: {line}")
        return code


@contextmanager
def ended_together(peers) -> Iterator[None]:
    """Around a command of several processes (train/peers.py): an error in one ends all, with its line and code."""
    try:
        yield
    except BaseException as error:
        if peers.count == 1:
            raise
        code, line = explained(error)
        peers.settle(error)
        if line is None:
            traceback.print_exception(error)
        peers.fail(code, line or _one_line(f"{type(error).__name__}: {error}")[:500])


def _one_line(text) -> str:
    return " ".join(str(text).split())
