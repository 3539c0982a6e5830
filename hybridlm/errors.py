# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can mend: one line each, naming what, its value and the limit; and the exit codes of commands."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TextIO


class Exit(IntEnum):
    """The exit codes of every command; 128 + signal besides: stopped by it, and saved."""

    COMPLETE = 0
    FAILED = 1
    """The run failed: its line says why."""
    CHANGE = 2
    """The user has to change something first."""
    AGAIN = 75
    """Nothing has to change (a process was lost, no step finished): start the same again. sysexits.h: EX_TEMPFAIL."""


class ConfigError(ValueError):
    """A configuration, a path or a file that the user has to change; its text is one clear line."""

    exit_code = Exit.CHANGE

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))


def require(condition: bool, message: str) -> None:
    """Raises ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)


@contextmanager
def importing() -> Iterator[None]:
    """Within, Ctrl-C ends the process with one line and the code of an interrupt: for the seconds in which a command
    imports, where KeyboardInterrupt is a long traceback, or is lost in a module that catches everything. Changes
    nothing where Ctrl-C does something else already, nor outside of the main thread."""
    as_usual = signal.getsignal(signal.SIGINT)
    if as_usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_) -> None:
        print_line("error: interrupted")
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, as_usual)


def cut(text: str, most: int) -> str:
    """The text, with `...` for its end where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """What a ConfigError inside says of a part, said of the whole: its message gets the prefix, such as "shared."."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None


class RunError(RuntimeError):
    """A run that cannot go on (disk full, folder in use, loss not finite); its text is one clear line."""

    exit_code = Exit.FAILED


class DataError(RunError):
    """Data that cannot be read on: the state of the run is whole and worth saving first."""


class AgainError(RunError):
    """A run that ended through nothing that anybody has to change; its text is one clear line."""

    exit_code = Exit.AGAIN


def print_line(line: str, stream: TextIO | None = None) -> None:
    """Prints to a stream (standard error) whatever the text holds, and whether or not anybody reads there."""
    stream = sys.stderr if stream is None else stream
    if stream is None:  # closed before Python began
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except (OSError, ValueError):  # the reader has gone, the stream is closed
        pass
