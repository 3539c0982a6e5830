# SPDX-License-Identifier: Apache-2.0
"""The commands of `hybridlm`. What the user has to mend is one line and exit code 2.

A new one is a file with its Command, and a word in COMMANDS.
"""

import os
import sys
from collections.abc import Callable

from hybridlm.cli.convert import CONVERT
from hybridlm.cli.generate import GENERATE
from hybridlm.cli.train import TRAIN
from hybridlm.errors import ConfigError, RunError

COMMANDS = (TRAIN, GENERATE, CONVERT)


def main(argv: list[str] | None = None) -> int:
    """`hybridlm ...`; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    commands = {command.name: command for command in COMMANDS}
    if words[0] not in commands:
        print(f"hybridlm: no command {words[0]!r}: there are {', '.join(commands)}", file=sys.stderr)
        return 2
    return _run(lambda: commands[words[0]].run(words[1:], f"hybridlm {words[0]}"))


def train_main(argv: list[str] | None = None) -> int:
    """`python train.py ...`; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return _run(lambda: TRAIN.run(words, "python train.py"))


def usage() -> str:
    """A line for each use of each command."""
    lines = [(f"hybridlm {command.name} {words}", what) for command in COMMANDS for words, what in command.uses]
    lines.append(("hybridlm COMMAND --help", "all options of a command"))
    width = max(len(typed) for typed, _ in lines)
    return "usage: " + "\n       ".join(f"{typed:{width}}    {what}" for typed, what in lines)


def _run(command: Callable[[], int]) -> int:
    try:
        return command()
    except ConfigError as error:
        return _fail(error, 2)
    except RunError as error:
        return _fail(error, 1)
    except BrokenPipeError:  # the reader of our output, as `| head`, has gone
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (what is flushed at exit goes there)
        return 1
    except OSError as error:
        if error.strerror is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(error, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code
