# SPDX-License-Identifier: Apache-2.0
"""`hybridlm eval`: a run's model, or a published one, on held-out sets or on tasks of lm-evaluation-harness."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator

from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.ending import ended_together
from hybridlm.cli.start import start
from hybridlm.cli.words import split_overrides, split_section
from hybridlm.errors import Exit, require
from hybridlm.fields import WHOLE


def run(words: list[str], prog: str) -> int:
    """Evaluates; see Command."""
    own, overrides = split_overrides(words)
    args = parse(_parser(prog), own)
    if args is None:
        return 0
    overrides += _checked(args)
    has_text = args.hf is None or args.tasks or any(word.partition("=")[0] == "--data.val_path" for word in overrides)
    require(has_text, "a published model holds out no text: give --data.val_path A B, or --tasks NAME")
    of_cluster, overrides = split_section(overrides, "cluster")
    from hybridlm.config import Config
    from hybridlm.config.overrides import override
    from hybridlm.train.peers import Peers

    peers = Peers()
    start(override(Config(), of_cluster).cluster, peers.joining)
    peers.start(on_stop=lambda signum: None)
    with ended_together(peers):
        _evaluate(args, overrides, speaks=peers.index == 0)
        peers.close(Exit.COMPLETE)
    return 0


def _evaluate(args: argparse.Namespace, overrides: list[str], speaks: bool) -> None:
    """speaks: whether this process, of several, says what was found."""
    from hybridlm.config.find import read_config
    from hybridlm.eval.subject import open_published, open_run

    like = None if args.config is None else read_config(args.config)
    if args.hf is not None:
        subject = open_published(args.hf, overrides)
    else:
        subject = open_run(args.run, args.step, overrides, like)
    said = (_tasks if args.tasks else _sets)(args, subject, speaks)
    if speaks:
        print(said)


EVAL = Command(
    "eval",
    (
        ("--run RUN|--hf FOLDER [--data.val_path A B]", "loss of each held-out set, and by position"),
        ("--run RUN|--hf FOLDER --tasks NAME [...]", "tasks of lm-evaluation-harness"),
    ),
    run,
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, "Evaluates a run's model, or a published one, on all devices.")
    parser.add_argument("--run", metavar="DIR", help="folder of the run, as runs/hybrid_tiny")
    parser.add_argument("--hf", metavar="FOLDER", help="folder of a published model, in the place of --run")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step of the run (the newest)")
    parser.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    parser.add_argument("--length", type=int, metavar="T", help="tokens of a row (those of the run; 4096)")
    parser.add_argument(
        "--batch", type=int, metavar="B", help="rows at a time, over all devices (as many tokens as in training)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="batches of each set, examples of each task (all)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include-path", metavar="DIR", help="folder with tasks of your own, in YAML")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in front of each question (those of the task)"
    )
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="ask by the tokenizer's chat template, examples as turns"
    )
    hidden = argparse.SUPPRESS  # as the harness spells them
    parser.add_argument("--include_path", default=hidden, help=hidden)
    parser.add_argument("--num_fewshot", type=int, default=hidden, help=hidden)
    parser.add_argument("--apply_chat_template", action="store_true", help=hidden)
    parser.add_argument("--json", action="store_true", help="print JSON")
    of_config = parser.add_argument_group("as in training")
    of_config.add_argument(
        "--data.val_path", nargs="+", metavar="SET", help="sets, each a pattern or NAME=PATTERN (those of the run)"
    )
    of_config.add_argument("--data.packing", metavar="HOW", help="split or best_fit (that of the run; best_fit)")
    of_config.add_argument("--data.tokenizer", metavar="PATH", help="tokenizer.json, or byte (that of the model)")
    of_config.add_argument("--model.compute_dtype", metavar="TYPE", help="float32 or bfloat16 (that of the model)")
    parser.epilog = (
        "--data.KEY=VALUE, --mesh.KEY=VALUE and --cluster.KEY=VALUE are those of training: see hybridlm train --help. "
        "--model.blocks.SYMBOL.rope.KEY=VALUE, window and scale read with other values than it was trained with."
    )
    return parser


def _checked(args: argparse.Namespace) -> list[str]:
    """The words of a config that options stand for. ConfigError for options that do not go together, and numbers."""
    require((args.run is None) != (args.hf is None), "give --run DIR or --hf FOLDER, one of them")
    require(args.hf is None or args.step is None, f"--step ({args.step}) is of a run: give --run")
    require(args.hf is None or args.config is None, f"--config ({args.config}) is of a run: give --run")
    spelled = lambda name: f"--{name.replace('_', '-')}"
    for name in ("include_path", "num_fewshot", "apply_chat_template"):
        given = getattr(args, name) not in (None, False)
        require(args.tasks or not given, f"{spelled(name)} is of tasks: give --tasks NAME")
    for name, least in (("length", 1), ("batch", 1), ("limit", 1), ("num_fewshot", 0)):
        value = getattr(args, name)
        require(value is None or least <= value <= WHOLE, f"{spelled(name)} ({value}) must be at least {least}")
    fields = {"length": "data.seq_len", "batch": "data.batch_size"}
    given = {field: getattr(args, name) for name, field in fields.items()}
    return [f"--{field}={value}" for field, value in given.items() if value is not None]


def _sets(args: argparse.Namespace, subject, speaks: bool) -> str:
    from hybridlm.eval.report import sets_as_json, sets_as_text
    from hybridlm.eval.sets import evaluate_sets

    results = evaluate_sets(subject, args.limit or 0, _shown if speaks else lambda batches, name, n: batches)
    return json.dumps(sets_as_json(subject, results), indent=1) if args.json else sets_as_text(subject, results)


def _tasks(args: argparse.Namespace, subject, speaks: bool) -> str:
    from hybridlm.eval.tasks import evaluate_tasks, tasks_as_json, tasks_as_text

    found = evaluate_tasks(
        subject, args.tasks, include_path=args.include_path, limit=args.limit, num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template,
    )  # fmt: skip
    return json.dumps(tasks_as_json(subject, found), indent=1) if args.json else tasks_as_text(subject, found)


def _shown(batches: Iterable, name: str, n: int) -> Iterator:
    """The batches, with a bar where somebody looks."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        yield from progress.track(batches, total=n, description=name)
