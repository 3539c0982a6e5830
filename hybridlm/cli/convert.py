# SPDX-License-Identifier: Apache-2.0
"""`hybridlm convert`: a published checkpoint as the folder of a run, a run as a published checkpoint."""

import argparse
from dataclasses import replace
from pathlib import Path

from hybridlm.errors import require
from hybridlm.train.commands import hybridlm_command, python_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two directions and their options."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="from-hf|to-hf")
    into = ways.add_parser("from-hf", help="a published checkpoint -> the folder of a run, to generate from")
    into.add_argument("source", metavar="FOLDER", help="folder with config.json and safetensors")
    into.add_argument("target", metavar="RUN", help="folder of the run, new or empty")
    out = ways.add_parser("to-hf", help="a run's newest checkpoint -> a published checkpoint")
    out.add_argument("source", metavar="RUN", help="folder of the run")
    out.add_argument("target", metavar="FOLDER", help="folder to write")
    out.add_argument("--step", type=int, metavar="N", help="checkpoint of this step (the newest)")
    out.add_argument("--family", metavar="NAME", help="model_type to write (that of --like, else the first that fits)")
    out.add_argument("--like", metavar="FOLDER", help="published checkpoint whose tokenizer and other keys to keep")
    out.add_argument("--dtype", help="float32, bfloat16 or float16 (that of the checkpoint that the run came from)")
    out.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")


def convert(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code. ConfigError, one line, for what the user has to change."""
    source, target = Path(args.source).expanduser(), Path(args.target).expanduser()
    (from_published if args.way == "from-hf" else to_published)(args, source, target)
    return 0


def from_published(args: argparse.Namespace, source: Path, target: Path) -> None:
    """A run's folder with one checkpoint, of step 0, that holds the parameters alone."""
    from flax import nnx

    from hybridlm.config import Config, DataConfig, InitConfig, RunConfig
    from hybridlm.config.tree import to_dict
    from hybridlm.hf import from_hf
    from hybridlm.hf.save import copy_small_files
    from hybridlm.train.checkpoint import Checkpoints
    from hybridlm.train.run_folder import RunFolder

    require(not target.exists() or not any(target.iterdir()), f"{target} is not empty: choose a new folder")
    with _Bar("reading") as bar:
        model = from_hf(source, progress=bar)
    data = DataConfig()
    if (source / "tokenizer.json").is_file():
        data = replace(data, tokenizer=str((target / "published").resolve()))
    init, run = InitConfig(str(source.resolve())), RunConfig(dir=str(target))
    config = Config(name=source.resolve().name, model=model.config, init=init, data=data, run=run)
    with RunFolder(config) as folder:
        copy_small_files(source, folder.published)
        folder.write_config()
        checkpoints = Checkpoints(folder.checkpoints, keep=1)
        try:
            params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            checkpoints.save(0, {"params": params}, to_dict(config), {})
        finally:
            checkpoints.close()
    print(f"{target}: {_count(model)} parameters of {source}")
    print(f"next: {hybridlm_command()} generate --run {target} --prompt TEXT")
    print(f"or train on: {python_command()} train.py --config configs/continue_from_hf.py --init.hf={source}")


def to_published(args: argparse.Namespace, source: Path, target: Path) -> None:
    """The published checkpoint of a run's model."""
    from hybridlm.hf import to_hf
    from hybridlm.train.sample import load_run

    like = Path(args.like).expanduser() if args.like else source / "published"
    if not args.like and not (like / "config.json").is_file():
        like = None
    from hybridlm.train.run_folder import stored_config

    origin = stored_config(source).init.hf
    if not args.like and origin and (Path(origin) / "config.json").is_file():
        like = Path(origin)
    model, _, step = load_run(source, args.step)
    with _Bar("writing") as bar:
        to_hf(model, target, family=args.family, like=like, dtype=args.dtype, overwrite=args.overwrite, progress=bar)
    print(f"{target}: {_count(model)} parameters of step {step} of {source}")


class _Bar:
    """A progress bar that is called as from_hf and to_hf call it."""

    def __init__(self, verb: str):
        self.verb = verb

    def __enter__(self):
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns)
        self.progress.start()
        self.task = self.progress.add_task(self.verb, total=None)
        return self

    def __exit__(self, *_):
        self.progress.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)


def _count(model) -> str:
    import jax
    from flax import nnx

    from hybridlm.train.progress import short

    return short(sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))))
