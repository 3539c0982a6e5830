# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study layers`: what each attention sublayer of a run is worth on a task, a pattern with fewer, and that
pattern distilled from the whole model."""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start
from hybridlm.cli.study_words import check_settable, split, task_of
from hybridlm.errors import Exit, require
from hybridlm.fields import WHOLE

MAY_SET = ("data.", "mesh.", "model.compute_dtype", "optim.", "run.steps", "run.log_every", "run.seed")
OF_RECIPE = ("optim.", "run.", "data.batch_size", "data.seq_len")
"""Of these, those that change the recipe of a distillation and not how the run is opened."""


def run(words: list[str], prog: str) -> int:
    """Measures, proposes, and where asked to distils; see Command."""
    own, of_config, of_task = split(words)
    args = parse(_parser(prog), own)
    if args is None:
        return 0
    _check(args)
    check_settable(of_config, MAY_SET, "study layers")
    start()
    from hybridlm.config.find import load_config, read_config
    from hybridlm.eval.subject import open_run

    task = task_of(args.task, of_task)
    of_recipe, of_run = _shared_out(of_config)
    recipe = load_config(args.recipe, of_recipe)
    out = None if args.distill is None else _new_folder(args.distill)
    subject = open_run(args.run, args.step, of_run, None if args.config is None else read_config(args.config))
    task = _read_by(subject, task, args.length)
    config = None if out is None else _of_student(args, subject, recipe, out)
    found, student, kept = _studied(args, subject, task)
    numbers = _as_json(args, subject, found, student)
    spared = out is None or bool(found.settings)
    if not args.json:
        print(_as_text(args, numbers), flush=True)
    elif not spared:
        print(json.dumps(numbers, indent=1), flush=True)
    require(spared, f"--distill ({out}): no attention can be spared at --keep {args.keep}: lower it")
    if out is not None and config is not None:
        numbers["distilled"] = _distilled(args, subject, task, replace(config, model=student), kept, out)
        if not args.json:
            before, after = numbers["proposal"]["accuracy"], numbers["distilled"]["accuracy"]
            print(
                f"distilled into {out}: accuracy {after:.3f}, {before:.3f} before, {found.full:.3f} of the whole model"
            )
    if args.json:
        print(json.dumps(numbers, indent=1))
    return Exit.COMPLETE


LAYERS = Command(
    "layers", (("--run RUN --task NAME [...]", "what each attention layer is worth; a pattern with fewer"),), run
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(
        prog, "Leaves out or windows each attention sublayer of a run, scores that on a task, and proposes a pattern."
    )
    parser.epilog = (
        "--NAME.FIELD=VALUE is a number of the task (--mqar.pairs=16). --mesh.KEY, --data.tokenizer and "
        "--model.compute_dtype are those of training; --optim.KEY, --run.steps, --run.seed, --data.batch_size and "
        "--data.seq_len change the recipe of --distill."
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of the run, as runs/hybrid_tiny")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step of the run (the newest)")
    parser.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    parser.add_argument("--task", required=True, metavar="NAME", help="what is scored: docs/probes.md has the table")
    parser.add_argument("--length", type=int, default=512, metavar="T", help="tokens of a row (512)")
    parser.add_argument("--window", type=int, default=32, metavar="W", help="tokens that windowed attention sees (32)")
    parser.add_argument(
        "--keep", type=float, default=0.95, metavar="SHARE", help="of the accuracy, that the proposal keeps (0.95)"
    )
    parser.add_argument("--rows", type=int, metavar="B", help="rows at a time, over all devices (16 or more)")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="batches that are scored (4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the task (0)")
    parser.add_argument("--distill", metavar="FOLDER", help="train the proposal to the whole model's logits, as a run")
    parser.add_argument(
        "--recipe", default="distill", metavar="NAME", help="a config, of which rows, optimizer and steps are (distill)"
    )
    parser.add_argument("--text", action="store_true", help="distil on the run's own text, not on the task")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name, least in (("length", 1), ("window", 1), ("rows", 1), ("batches", 1), ("seed", 0)):
        value = getattr(args, name)
        require(value is None or least <= value <= WHOLE, f"--{name} ({value}) must be at least {least}")
    require(0 < args.keep <= 1, f"--keep ({args.keep}) must be above 0 and at most 1")
    require(args.distill is not None or not args.text, "--text is of a distillation: give --distill FOLDER")


def _shared_out(words: list[str]) -> tuple[list[str], list[str]]:
    """(words of the recipe, words for opening the run)."""
    recipe: list[str] = []
    opening: list[str] = []
    into = opening
    for word in words:
        if word.startswith("--"):
            into = recipe if word[2:].startswith(OF_RECIPE) else opening
        into.append(word)
    return recipe, opening


def _new_folder(text: str) -> Path:
    folder = storage.as_path(text)
    storage.check(folder, "--distill", write=True)
    require(not storage.names(folder), f"--distill ({folder}) is not empty: choose another folder")
    return folder


def _read_by(subject, task, length: int):
    """The task as the model reads it: text by its own tokens. ConfigError where it does not fit."""
    from hybridlm.probes.scoring import check_vocabulary
    from hybridlm.probes.tokenised import for_tokenizer

    rounded = subject.config.quantize
    said = (
        f"--run ({subject.name}) holds matrices in {rounded.weights}, of which layers are not taken apart: give the run"
    )
    require(not rounded.stored, f"{said} that it was made of")
    read = for_tokenizer(task, subject.tokenizer, subject.bos)
    check_vocabulary(subject.config.model.vocab_size, read)
    read.check(length)
    return read


def _studied(args: argparse.Namespace, subject, task) -> tuple[Any, Any, list[int]]:
    """(findings, the config of the proposed model, of each of its sublayers the index in the run's pattern)."""
    import jax

    from hybridlm.probes import score
    from hybridlm.sharding import RULES
    from hybridlm.study.layers import proposed, study_layers

    n = math.prod(subject.mesh.shape[axis] for axis in RULES["batch"])
    rows = -(-16 // n) * n if args.rows is None else args.rows
    require(rows % n == 0, f"--rows ({rows}) must be a multiple of {n}: that many devices share them")
    of = lambda model: score(model, task, args.length, rows=rows, batches=args.batches, seed=args.seed).accuracy
    with jax.set_mesh(subject.mesh):
        found = study_layers(subject.model, of, args.window, args.keep)
    return found, *proposed(subject.config.model, found.settings, args.window)


def _as_json(args: argparse.Namespace, subject, found, student) -> dict[str, Any]:
    from hybridlm.infer.cache_size import cache_size

    model = subject.config.model
    of_cache = lambda config: cache_size(config, 1, args.length).total().bytes
    return {
        "run": subject.name, "step": subject.step, "task": args.task, "length": args.length, "window": args.window,
        "pattern": model.pattern, "accuracy": found.full, "all_windowed": found.all_windowed, "none": found.none,
        "cache_bytes": of_cache(model),
        "sublayers": [{**asdict(worth), "symbol": model.pattern[worth.index],
                       "proposal": found.settings.get(worth.index, "full")} for worth in found.worths],
        "proposal": {"pattern": student.pattern, "accuracy": found.proposed, "cache_bytes": of_cache(student),
                     "windowed": [s for s in student.blocks if s not in model.blocks]},
    }  # fmt: skip


def _as_text(args: argparse.Namespace, numbers: dict[str, Any]) -> str:
    from hybridlm.eval.report import table

    shown = "{:.3f}".format
    head = f"{numbers['run']}, step {numbers['step']}: {args.task} of {args.length} tokens, window {args.window}"
    rows = [["attention", "without it", "windowed", "it alone", "proposal"]]
    words = {"full": "stays", "window": "window", "none": "left out"}
    for one in numbers["sublayers"]:
        cells = (shown(one[name]) for name in ("without", "windowed", "alone"))
        rows.append([f"{one['index']} {one['symbol']}", *cells, words[one["proposal"]]])
    proposal = numbers["proposal"]
    return "\n".join([
        head,
        f"accuracy {shown(numbers['accuracy'])}; all attention windowed {shown(numbers['all_windowed'])}, without any "
        f"{shown(numbers['none'])}",
        table(rows),
        f"pattern   {numbers['pattern']}  cache of a row {numbers['cache_bytes']:,} B",
        f"proposal  {proposal['pattern']}  cache of a row {proposal['cache_bytes']:,} B, accuracy "
        f"{shown(proposal['accuracy'])} with the weights as they are",
        *([f"{', '.join(proposal['windowed'])}: the attention of the run with window={args.window}"]
          if proposal["windowed"] else []),
    ])  # fmt: skip


def _of_student(args: argparse.Namespace, subject, recipe, out: Path):
    """The config of the run that a distillation will be, but for its pattern; ConfigError, before anything is scored,
    where there can be none. Adapters of the run are in its weights, and its weights are trained as they are."""
    from hybridlm.config import LoraConfig, ProbeConfig, QuantizeConfig
    from hybridlm.config.mesh import check_config
    from hybridlm.study.distill import check_distilled
    from hybridlm.train.corpora import open_together

    data = replace(subject.config.data, batch_size=recipe.data.batch_size)
    data = replace(data, seq_len=recipe.data.seq_len if args.text else args.length)
    run = replace(recipe.run, dir="", sample_tokens=0)
    config = replace(
        subject.config, name=out.name, data=data, optim=recipe.optim, run=run, lora=LoraConfig(),
        quantize=QuantizeConfig(), probe=ProbeConfig(),
    )  # fmt: skip
    check_distilled(config)
    check_config(config, subject.mesh)
    prefix = config.model.prefix_tokens
    said = f"model.prefix_tokens ({prefix}): rows of a task have no room for them: distil on the run's text (--text)"
    require(args.text or not prefix, said)
    if args.text:
        open_together(config.data)  # what is tokenised now is found again
    return config


def _distilled(args: argparse.Namespace, subject, task, config, kept: list[int], out: Path) -> dict[str, Any]:
    """Trains the proposal to the run's logits and writes it as a run; what it has then, as JSON."""
    import jax
    from flax import nnx

    from hybridlm.config.mesh import check_config
    from hybridlm.probes import score
    from hybridlm.study.distill import make_distillation
    from hybridlm.study.layers import carried
    from hybridlm.study.on_task import keep, take_steps

    check_config(config, subject.mesh)
    with jax.set_mesh(subject.mesh), _batches(args, config, subject, task) as batches:
        program = make_distillation(config, subject.mesh, subject.model)
        params = nnx.to_pure_dict(nnx.state(subject.model, nnx.Param))
        params = carried(params, subject.config.model.pattern, config.model.pattern, kept)
        at = jax.tree.map(lambda like: like.sharding, program.state_like["params"])
        state = program.init_from(jax.device_put(jax.tree.map(lambda a: a.copy(), params), at))
        say = (lambda line: None) if args.json else print
        trained = take_steps(config, program, state, batches, say)
        rows = config.data.batch_size
        after = score(trained.model, task, args.length, rows=rows, batches=args.batches, seed=args.seed)
    keep(out, config, trained, subject.tokenizer.fingerprint)
    return {"run": str(out), "steps": config.run.steps, "accuracy": after.accuracy, "loss": trained.losses[-1][1],
            "seconds": round(trained.seconds, 1)}  # fmt: skip


@contextmanager
def _batches(args: argparse.Namespace, config, subject, task) -> Iterator[Iterator]:
    """Rows of the task, or of the run's text."""
    from hybridlm.sharding import batch_sharding
    from hybridlm.study.on_task import Trial, rows_of
    from hybridlm.train.batches import Batches
    from hybridlm.train.corpora import open_together

    if not args.text:
        yield rows_of([Trial(task, args.length)], args.seed + 1, config.data.batch_size, args.length, config.run.steps)
        return
    with Batches(
        config, open_together(config.data), "train", config.data.batch_size, batch_sharding(subject.mesh)
    ) as b:
        yield b
