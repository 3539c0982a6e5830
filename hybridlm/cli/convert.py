# SPDX-License-Identifier: Apache-2.0
"""`hybridlm convert`: a published checkpoint as the folder of a run, a run as a published checkpoint."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, one_line_errors, parse
from hybridlm.cli.start import start


def run(words: list[str], prog: str) -> int:
    """Converts; see Command."""
    args = parse(_parser(prog), words)
    if args is None:
        return 0
    start()
    source, target = storage.as_path(args.source), storage.as_path(args.target)
    (_from_hf if args.way == "from-hf" else _to_hf)(args, source, target)
    return 0


CONVERT = Command(
    "convert",
    (
        ("from-hf FOLDER RUN", "a published checkpoint as a run's folder"),
        ("to-hf RUN FOLDER [...]", "a run as a published checkpoint"),
    ),
    run,
)

TEXTS = "texts/*.jsonl"
"""What stands in the printed line for the text to train on."""


def _parser(prog: str) -> argparse.ArgumentParser:
    """The two directions and their options."""
    parser = make_parser(prog, "Published checkpoints in and out.")
    ways = parser.add_subparsers(dest="way", required=True, metavar="from-hf|to-hf")
    what = "a published checkpoint -> the folder of a run, to generate from"
    into = one_line_errors(ways.add_parser("from-hf", help=what))
    into.add_argument("source", metavar="FOLDER", help="folder with config.json and safetensors")
    into.add_argument("target", metavar="RUN", help="folder of the run, new or empty")
    into.add_argument(
        "--data.tokenizer", dest="tokenizer", metavar="PATH", help="tokenizer.json, or byte (that of the folder)"
    )
    out = one_line_errors(ways.add_parser("to-hf", help="a run's newest checkpoint -> a published checkpoint"))
    out.add_argument("source", metavar="RUN", help="folder of the run")
    out.add_argument("target", metavar="FOLDER", help="folder to write")
    out.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (the newest)")
    out.add_argument("--family", metavar="NAME", help="model_type to write (that of --like, else the first that fits)")
    out.add_argument("--like", metavar="FOLDER", help="published checkpoint whose tokenizer and other keys to keep")
    out.add_argument("--dtype", help="float32, bfloat16 or float16 (that of the checkpoint that the run came from)")
    out.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    out.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    return parser


def _from_hf(args: argparse.Namespace, source: Path, target: Path) -> None:
    from hybridlm.train.commands import hybridlm_command
    from hybridlm.train.published import run_from_published

    with _Bar("reading") as bar:
        model, tokenizer = run_from_published(source, target, progress=bar, tokenizer=args.tokenizer)
    print(f"{target}: {_count(model)} parameters of {source}")
    wanted = "" if tokenizer else " --data.tokenizer=PATH"
    if not tokenizer:
        print(f"{source} has no tokenizer.json: give --data.tokenizer=PATH of one, or byte, to write and to train on")
    generate = ["generate", "--run", str(target), "--prompt", "TEXT"]
    train = [
        "train", "--config", "continue_from_hf", f"--init.hf={source}", f"--data.tokenizer={tokenizer or 'PATH'}",
        f"--data.path={TEXTS}", f"--run.dir={target}_continued",
    ]  # fmt: skip
    print(f"next: {hybridlm_command()} {shlex.join(generate)}{wanted}")
    print(f"or train on, on your text: {hybridlm_command()} {shlex.join(train)}")


def _to_hf(args: argparse.Namespace, source: Path, target: Path) -> None:
    from hybridlm.config.find import read_config
    from hybridlm.train.published import publish_run

    own = None if args.config is None else read_config(args.config)
    like = None if args.like is None else storage.as_path(args.like)
    with _Bar("writing") as bar:
        model, step = publish_run(
            source, target, step=args.step, family=args.family, like=like, dtype=args.dtype, overwrite=args.overwrite,
            own=own, progress=bar,
        )  # fmt: skip
    print(f"{target}: {_count(model)} parameters of step {step} of {source}")


class _Bar:
    """A progress bar that is called as from_hf and to_hf call it; it appears with the first call."""

    def __init__(self, verb: str):
        self.verb = verb
        self.progress: Any = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        if self.progress is None:
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns)
            self.progress.start()
            self.task = self.progress.add_task(self.verb, total=None)
        self.progress.update(self.task, completed=done, total=total)


def _count(model) -> str:
    import jax
    from flax import nnx

    from hybridlm.train.progress import short

    return short(sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))))
