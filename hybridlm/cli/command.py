# SPDX-License-Identifier: Apache-2.0
"""What a command is, and how its words are read. Everything slow is imported when a command runs, not before."""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from hybridlm.errors import ConfigError


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
    """The words as values; None where they asked for the help, which is printed."""
    try:
        return parser.parse_args(words)
    except SystemExit:
        return None
