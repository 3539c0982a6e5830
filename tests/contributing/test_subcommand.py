# SPDX-License-Identifier: Apache-2.0
"""A subcommand: a function, and a word in a table. docs/contributing/subcommand.md quotes it."""

import math

import pytest

from hybridlm.cli import main, table
from hybridlm.cli.command import Command, make_parser, parse


def run(words: list[str], prog: str) -> int:
    """Prints how many parameters a config's model has; makes none of them."""
    parser = make_parser(prog, "Counts the parameters of a config's model.")
    parser.add_argument("--config", required=True, metavar="NAME", help="a config, as hybrid_1b")
    args = parse(parser, words)
    if args is None:
        return 0
    import jax

    from hybridlm.config.find import load_config
    from hybridlm.model.init import abstract

    _, _, info = abstract(load_config(args.config).model)
    print(f"{args.config}: {sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(info)):,} parameters")
    return 0


COUNT = Command("count", (("--config NAME", "count a model's parameters"),), run)


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch):
    monkeypatch.setattr(table, "COMMANDS", (*table.COMMANDS, COUNT))


def test_it_runs(capsys):
    assert main(["count", "--config", "hybrid_8b"]) == 0
    assert capsys.readouterr().out == "hybrid_8b: 8,100,852,736 parameters\n"


def test_it_is_in_the_help(capsys):
    assert main(["--help"]) == 0
    assert "hybridlm count --config NAME" in capsys.readouterr().out
    assert main(["count", "--help"]) == 0
    assert "a config, as hybrid_1b" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "the following arguments are required: --config; see hybridlm count --help"),
        (["--config", "hybrid_8c"], "hybrid_8c"),
        (["--confg", "hybrid_8b"], "see hybridlm count --help"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, told, capsys):
    assert main(["count", *words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1
