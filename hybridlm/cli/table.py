# SPDX-License-Identifier: Apache-2.0
"""The commands of `hybridlm`. What the user has to mend is one line and exit code 2.

A new one is a file with its Command, and a word in COMMANDS.
"""

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Callable

import hybridlm
from hybridlm.cli.bench import BENCH
from hybridlm.cli.cache import CACHE
from hybridlm.cli.chat import CHAT
from hybridlm.cli.compare import COMPARE
from hybridlm.cli.convert import CONVERT
from hybridlm.cli.ending import exit_code
from hybridlm.cli.eval import EVAL
from hybridlm.cli.export import EXPORT
from hybridlm.cli.generate import GENERATE
from hybridlm.cli.plan import PLAN
from hybridlm.cli.probe import PROBE
from hybridlm.cli.profile import PROFILE
from hybridlm.cli.quantize import QUANTIZE
from hybridlm.cli.report import REPORT
from hybridlm.cli.runs import RUNS
from hybridlm.cli.study import STUDY
from hybridlm.cli.sweep import SWEEP
from hybridlm.cli.tokenize import TOKENIZE
from hybridlm.cli.train import TRAIN
from hybridlm.errors import Exit, print_line

COMMANDS = (
    TRAIN, GENERATE, CHAT, EVAL, PROBE, CONVERT, QUANTIZE, EXPORT, TOKENIZE, RUNS, COMPARE, REPORT, SWEEP, STUDY, PLAN,
    PROFILE, CACHE, BENCH,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """`hybridlm ...`; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return Exit.COMPLETE if words else Exit.CHANGE
    commands = {command.name: command for command in COMMANDS}
    if words[0] == "--version" or words[1:] == ["--version"]:
        print(version())
        return Exit.COMPLETE
    if words[0] not in commands:
        print_line(f"hybridlm: no command {words[0]!r}: there are {', '.join(commands)}")
        return Exit.CHANGE
    return _run(lambda: commands[words[0]].run(words[1:], f"hybridlm {words[0]}"))


def train_main(argv: list[str] | None = None) -> int:
    """`python train.py ...`; returns the exit code."""
    words, script = (sys.argv[1:], sys.argv[0]) if argv is None else (argv, "train.py")
    if words == ["--version"]:
        print(version())
        return Exit.COMPLETE
    return _run(lambda: TRAIN.run(words, f"python {shlex.quote(script)}"))


def version() -> str:
    """`hybridlm 0.1.0 (Python 3.11.9, JAX 0.10.2, jaxlib 0.10.2, Flax 0.12.8)`."""
    found = {"Python": platform.python_version()}
    found |= {name: importlib.metadata.version(name.lower()) for name in ("JAX", "jaxlib", "Flax")}
    return f"hybridlm {hybridlm.__version__} ({', '.join(f'{name} {number}' for name, number in found.items())})"


def usage() -> str:
    """A line for each use of each command."""
    lines = [(f"hybridlm {command.name} {words}", what) for command in COMMANDS for words, what in command.uses]
    lines.append(("hybridlm COMMAND --help", "all options of a command"))
    lines.append(("hybridlm --version", "version of this and of what it computes with"))
    width = max(len(typed) for typed, _ in lines)
    return "usage: " + "\n       ".join(f"{typed:{width}}    {what}" for typed, what in lines)


def _run(command: Callable[[], int]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a name of a file may hold bytes that are no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def unless_unread() -> int:
        try:
            return command()
        except BrokenPipeError:  # the reader of our output, as `| head`, has gone
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (what is flushed at exit goes there)
            return Exit.FAILED

    return exit_code(unless_unread)
