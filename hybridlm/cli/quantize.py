# SPDX-License-Identifier: Apache-2.0
"""`hybridlm quantize`: a run's model, or a published one, with its matrices in eight bits."""

import argparse
import shlex
from typing import Any

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start
from hybridlm.errors import require


def run(words: list[str], prog: str) -> int:
    """Quantises, or counts; see Command."""
    args = parse(_parser(prog), words)
    if args is None:
        return 0
    if args.source is None:
        return _count(args)
    require(args.target is not None, f"give the folder to write, too: {prog} {args.source} OUT")
    start()
    from hybridlm.config.find import read_config
    from hybridlm.model.quantize import sizes
    from hybridlm.train.commands import hybridlm_command
    from hybridlm.train.quantized import is_run, quantize_published, quantize_run, table

    given = _given(args)
    source, target = storage.as_path(args.source), storage.as_path(args.target)
    storage.check(source, "RUN")
    if is_run(source):
        said = f"--data.tokenizer ({args.tokenizer}) is of published folders: {source} is a run"
        require(args.tokenizer is None, said)
        own = None if args.config is None else read_config(args.config)
        config, step = quantize_run(source, target, given, args.step, own)
        what = f"step {step} of {source}"
    else:
        for name in ("step", "config"):
            value = getattr(args, name)
            require(value is None, f"--{name} ({value}) is of runs: {source} has no checkpoints of one")
        config = quantize_published(source, target, given, args.tokenizer)
        what = str(source)
    activations = f", activations {config.quantize.activations}" if config.quantize.activations else ""
    print(f"{target}: {what}, matrices {config.quantize.weights}{activations}\n")
    print(table(sizes(config.model, config.quantize)))
    own_file = [] if args.config is None else ["--config", args.config]
    following = ["generate", "--run", str(target), *own_file, "--prompt", "TEXT"]
    print(f"\nnext: {hybridlm_command()} {shlex.join(following)}")
    return 0


QUANTIZE = Command(
    "quantize",
    (
        ("RUN|FOLDER OUT [--quantize.weights=int8|fp8 ...]", "a model with its matrices in eight bits"),
        ("--config NAME [--quantize.weights=int8|fp8 ...]", "what that would take, from shapes alone"),
    ),
    run,
)


def _count(args: argparse.Namespace) -> int:
    require(args.config is not None, "give a run or a published folder, or --config NAME to count")
    from hybridlm.config import QuantizeConfig
    from hybridlm.config.find import load_config
    from hybridlm.model.quantize import sizes
    from hybridlm.train.quantized import table

    config = load_config(args.config)
    print(table(sizes(config.model, QuantizeConfig(**{"weights": "int8", **_given(args)}))))
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of QuantizeConfig that were asked for."""
    given = {"weights": args.weights, "activations": args.activations, "keep": tuple(args.keep)}
    return {name: value for name, value in given.items() if value}


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, "Writes a model with its matrices in eight bits, as the folder of a run.")
    parser.add_argument("source", nargs="?", metavar="RUN|FOLDER", help="a run, or config.json with safetensors")
    parser.add_argument("target", nargs="?", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument(
        "--quantize.weights", dest="weights", choices=("int8", "fp8"),
        help="what matrices are rounded to (what the run was trained with, else int8)",
    )  # fmt: skip
    parser.add_argument(
        "--quantize.activations", dest="activations", choices=("int8",), help="what they are multiplied with, too (no)"
    )
    parser.add_argument(
        "--quantize.keep", dest="keep", nargs="+", default=[], metavar="PATTERN",
        help="matrices that stay as they are, as in_dt or mixer.in_*",
    )  # fmt: skip
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step of the run (the newest)")
    parser.add_argument(
        "--config", metavar="NAME", help="without a folder: the config to count; else the run's own, see generate"
    )
    parser.add_argument(
        "--data.tokenizer", dest="tokenizer", metavar="PATH", help="tokenizer.json, or byte (that of the folder)"
    )
    return parser
