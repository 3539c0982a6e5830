# SPDX-License-Identifier: Apache-2.0
"""What a command is, and how its words are read. Everything slow is imported when a command runs, not before."""

import argparse
import difflib
from collections.abc import Callable
from typing import NamedTuple

from hybridlm.errors import ConfigError, require


class Command(NamedTuple):
    """One command of `hybridlm`."""

    name: str
    """What is typed behind `hybridlm`."""
    uses: tuple[tuple[str, str], ...]
    """(what is typed behind the name, what that does), a line of the help each."""
    run: Callable[[list[str], str], int]
    """(words, the program as typed) -> exit code. Its ConfigErrors and RunErrors, one line each, are printed."""


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser whose errors are ConfigErrors; names are never abbreviated."""
    return one_line_errors(argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False))


def one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, which raises ConfigError for words that it cannot read."""

    def error(message: str):
        raise ConfigError(f"{message}; see {parser.prog} --help")

    parser.error = error
    return parser


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace | None:
    """The words as values; None where they asked for the help, which is printed.

    ConfigError, one line, for what cannot be read; for an option that is not known it names the nearest.
    """
    if not {"-h", "--help"} & set(words):
        _check_options(parser, words)
    try:
        return parser.parse_args(words)
    except SystemExit:
        return None


def _check_options(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Before argparse, which names what is missing first, and nothing that is near."""
    known = _options(parser)
    for word in words:
        name = word.split("=")[0]
        if word == "--":
            return
        if not word.startswith("--") or name in known:
            continue
        near = difflib.get_close_matches(name.replace("_", "-"), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        require(False, f"unknown option {name}: {hint}see {parser.prog} --help")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Long options of a parser and of those of its subcommands."""
    found = [name for name in parser._option_string_actions if name.startswith("--")]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [name for below in action.choices.values() for name in _options(below)]
    return found
