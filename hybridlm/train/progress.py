# SPDX-License-Identifier: Apache-2.0
"""What a run shows: a live line on a terminal, plain lines elsewhere. Process 0 alone speaks."""

import contextlib
import os
import sys
from collections.abc import Callable

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def short(number: float) -> str:
    """1.23k, 45.6M, 7.89B."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def printable(line: str) -> str:
    """The line with `.` for what a terminal would obey or could not show."""
    return "".join(c if c.isprintable() else " " if c == "\t" else "." for c in line)


class Display:
    """Progress of a run of `steps` steps."""

    def __init__(self, steps: int, nobody_reads: Callable[[], None] = lambda: None):
        """nobody_reads: called once where standard output is closed, as by `| head` or with a terminal."""
        self._steps = steps
        self._console = Console(highlight=False, soft_wrap=True, quiet=jax.process_index() != 0)
        self._console.on_broken_pipe = self._closed  # rich's own ends the process
        self._nobody_reads = nobody_reads
        self._bar = None

    def start(self, step: int) -> None:
        """Shows the live line, on a terminal."""
        if self._console.is_terminal and self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None))
            self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
            self._bar.add_task(f"step {step}/{self._steps}  compiling", total=self._steps, completed=step)
            self._bar.start()

    def stop(self) -> None:
        """Takes the live line away."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):
                bar.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        try:
            self._console.print(line, markup=False)
        except OSError:  # the terminal has gone
            self._closed()

    def _closed(self) -> None:
        """Says nothing from here on, nor at exit, when Python flushes what it holds."""
        if self._console.quiet:
            return
        self._console.quiet = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        self._nobody_reads()

    def update(self, step: int, values: dict, log: bool) -> None:
        """A step's loss and speed; off a terminal a line appears where `log`."""
        parts = [f"step {step}/{self._steps}", f"loss {values['loss']:.4f}"]
        if values.get("tokens_per_second"):
            parts.append(f"{short(values['tokens_per_second'])} tokens/s")
        if values.get("mfu") is not None:
            parts.append(f"MFU {100 * values['mfu']:.1f}%")
        if values.get("skipped"):
            parts.append(f"skipped {values['skipped']}")
        if values.get("seconds_left") is not None:
            parts.append(f"{clock(values['seconds_left'])} left")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif log:
            self.say(text)
