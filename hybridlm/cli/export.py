# SPDX-License-Identifier: Apache-2.0
"""`hybridlm export`: a model's prefill and decode steps as StableHLO, for where none of this project is installed."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start
from hybridlm.cli.writing import add_cache_options, cache_types, open_model
from hybridlm.errors import ConfigError, require

ANY = "any"
"""What --batch says of rows of which the program's caller decides how many there are."""


def run(words: list[str], prog: str) -> int:
    """Writes the folder; see Command."""
    args = parse(_parser(prog), words)
    if args is None:
        return 0
    batch = _batch(args.batch)
    source, out = storage.as_path(args.source), storage.as_path(args.out)
    args.run, args.hf = (args.source, None) if _is_run(source) else (None, args.source)
    for name in ("step", "config"):
        given = getattr(args, name) is not None and args.run is None
        require(not given, f"--{name} belongs to a run, but {source} holds a published checkpoint")
    start()
    from hybridlm.infer.export import check_folder, export, piece
    from hybridlm.infer.target import targets

    targets(args.platforms)
    piece(args.context, batch, args.prefill)
    check_folder(out)
    model, tokenizer = open_model(args)
    manifest = export(
        model, out, args.platforms, context=args.context, batch=batch, prefill=args.prefill,
        cache_types=cache_types(args), tokenizer=tokenizer, source=source.name,
    )  # fmt: skip
    _say(out, manifest)
    return 0


EXPORT = Command(
    "export",
    (("RUN|FOLDER OUT --context N [--platforms cpu cuda tpu]", "its steps as StableHLO, to run without this code"),),
    run,
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(
        prog,
        "Writes a model's prefill and decode steps as StableHLO, its weights as safetensors, and what each array is as "
        "JSON, with a small program that runs them by JAX alone.",
    )
    parser.add_argument("source", metavar="RUN|FOLDER", help="folder of a run, or a published checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--context", required=True, type=int, metavar="N", help="tokens of each row, read and written")
    parser.add_argument("--batch", default=ANY, metavar="B", help="rows: a number, or any, decided by the caller (any)")
    parser.add_argument(
        "--prefill", type=int, metavar="N", help="tokens of a prompt that are read at once (512, or the context)"
    )
    parser.add_argument(
        "--platforms", nargs="+", default=["cpu", "cuda", "tpu"], metavar="NAME",
        help="cpu, cuda, tpu: for any such device; cuda:9.0, tpu:v5e, ...: with the kernels of one (cpu cuda tpu)",
    )  # fmt: skip
    add_cache_options(parser)
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step of the run (the newest)")
    parser.add_argument(
        "--data.tokenizer", dest="tokenizer", metavar="PATH", help="tokenizer.json, or byte (that of the run or folder)"
    )
    parser.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    return parser


def _batch(word: str) -> int | None:
    """Rows; None: any number."""
    if word == ANY:
        return None
    try:
        return int(word)
    except ValueError:
        raise ConfigError(f"--batch ({word}) must be a whole number, or {ANY}") from None


def _is_run(source: Path) -> bool:
    """Whether a folder is that of a run; ConfigError where it is no published checkpoint either."""
    storage.check(source, "RUN|FOLDER")
    there = storage.names(source)
    known = "checkpoints" in there or "config.json" in there
    require(known, f"{source} holds neither a run (checkpoints) nor a published checkpoint (config.json)")
    return "checkpoints" in there or _is_begun(source / "config.json")


def _is_begun(file: Path) -> bool:
    """Whether a config.json is that of a run, of which there is no more yet."""
    from hybridlm.train.records import read_json

    try:
        values = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and isinstance(values.get("model"), dict)


def _say(out: Path, manifest: dict[str, Any]) -> None:
    """What was written, and how it is used."""
    n = manifest["batch"]
    rows = "any number of rows" if n is None else f"{n:,} row{'' if n == 1 else 's'}"
    context, names = manifest["context"], ", ".join(manifest["programs"])
    print(f"{out}: prefill and decode for {names}, {rows} of up to {context:,} tokens, in {manifest['compute_dtype']}")
    for name, lines in manifest["implementations"].items():
        kernels = [line.partition(":")[0] for line in lines if ": auto uses xla " not in line]
        print(f"{name}: {'kernels of ' + ', '.join(kernels) if kernels else 'XLA alone'}")
    if manifest["tokenizer"]:
        texts = " ".join(["TEXT"] * (n or 1)) if (n or 1) <= 4 else f"TEXT ... ({n:,} of them)"
        if storage.in_bucket(out):
            print(f"next, in a copy of the folder: python run.py {texts}")
        else:
            print(f"next: python {shlex.quote(str(out / 'run.py'))} {texts}")
