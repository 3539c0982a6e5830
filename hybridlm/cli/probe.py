# SPDX-License-Identifier: Apache-2.0
"""`hybridlm probe`: what a run's model, or a published one, recalls of its context, by task and length."""

import argparse
import ast
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start
from hybridlm.cli.words import check_file
from hybridlm.errors import require, within
from hybridlm.fields import WHOLE

LENGTH = 512
"""Tokens of a row, unless others are asked for."""
ROWS = 16
"""Rows of a batch, at the least, and as many as the devices divide."""


def run(words: list[str], prog: str) -> int:
    """Probes; see Command."""
    own, of_config, of_tasks = _split(words)
    args = parse(_parser(prog), own)
    if args is None:
        return 0
    _check(args)
    check_file(args.page, "--page")
    start()
    from hybridlm.config.find import read_config
    from hybridlm.eval.subject import open_published, open_run
    from hybridlm.probes.repeated_bigrams import RepeatedBigrams

    tasks = chosen(args.tasks, of_tasks)
    for name, task in tasks.items():
        for length in args.lengths if not isinstance(task, RepeatedBigrams) and not task.is_text else ():
            with within(f"{name}: "):
                task.check(length)
    if args.hf is not None:
        subject = open_published(args.hf, of_config)
    else:
        like = None if args.config is None else read_config(args.config)
        subject = open_run(args.run, args.step, of_config, like)
    found = probed(args, subject, tasks, trained=args.hf is None or "--data.path" in keys(of_config))
    print(json.dumps(found, indent=1) if args.json else as_text(found))
    if args.page is not None:
        from hybridlm.study.probed import as_page

        storage.write_text(storage.as_path(args.page), as_page(found))
    return 0


PROBE = Command(
    "probe", (("--run RUN|--hf FOLDER --tasks NAME [...]", "what a model recalls of its context, by task"),), run
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, "Scores a run's model, or a published one, on tasks whose answers stand in the context.")
    parser.add_argument("--run", metavar="DIR", help="folder of the run, as runs/hybrid_tiny")
    parser.add_argument("--hf", metavar="FOLDER", help="folder of a published model, in the place of --run")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step of the run (the newest)")
    parser.add_argument("--config", metavar="FILE", help="config file of the run, where that defines blocks of its own")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="tasks: docs/probes.md has the table")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[LENGTH], metavar="T", help=f"tokens of a row ({LENGTH})"
    )
    parser.add_argument("--rows", type=int, metavar="B", help=f"rows at a time, over all devices ({ROWS} or more)")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="batches of each task and length (4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the tasks (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--page", metavar="FILE", help="write a page with the numbers and maps of depth and length")
    parser.epilog = (
        "--NAME.FIELD=VALUE is a number of a task (--mqar.pairs=16, --needle.needles=4), as in --tasks mqar:pairs=16; "
        "--mesh.KEY=VALUE, --model.compute_dtype=TYPE and --data.KEY=VALUE are those of training."
    )
    return parser


def _split(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """(options of the command, those of the config, those of tasks), each with its values."""
    own, of_config, of_tasks = [], [], []
    into = own
    for word in words:
        if word.startswith("--"):
            section, dot, _ = word[2:].partition("=")[0].partition(".")
            into = own if not dot else of_config if section in ("data", "mesh", "model") else of_tasks
        into.append(word)
    return own, of_config, of_tasks


def _check(args: argparse.Namespace) -> None:
    """ConfigError for options that do not go together, and numbers."""
    require((args.run is None) != (args.hf is None), "give --run DIR or --hf FOLDER, one of them")
    require(args.hf is None or args.step is None, f"--step ({args.step}) is of a run: give --run")
    require(args.hf is None or args.config is None, f"--config ({args.config}) is of a run: give --run")
    for name, least in (("rows", 1), ("batches", 1), ("seed", 0)):
        value = getattr(args, name)
        require(value is None or least <= value <= WHOLE, f"--{name} ({value}) must be at least {least}")
    for length in args.lengths:
        require(1 <= length <= WHOLE, f"--lengths ({length}) must be at least 1")


def chosen(words_of_tasks: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    """The probes of these words by themselves, with the numbers that more words give them: `--mqar.pairs=16`,
    `--needle.depths 0 50`."""
    from hybridlm.config.probe import split_task
    from hybridlm.probes.named import probe_of

    names = {word: split_task(word, "--tasks")[0] for word in words_of_tasks}
    for word in names:
        probe_of(word, "--tasks")
    given: dict[str, dict[str, list[str]]] = {name: {} for name in names.values()}
    values: list[str] = []
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        name, _, field = key.partition(".")
        require(name in given, f"--{key}: {name} is none of --tasks: {', '.join(given)}")
        values = given[name][field] = [value] if equals else []
    return {word: probe_of(word, "--tasks", _values(name, given[name])) for word, name in names.items()}


def _values(name: str, fields: Mapping[str, list[str]]) -> dict[str, Any]:
    found = {}
    for field, texts in fields.items():
        values = [_value(text) for text in texts]
        require(bool(values), f"--{name}.{field} needs a value")
        found[field] = values[0] if len(values) == 1 else tuple(values)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def probed(args: argparse.Namespace, subject, tasks: Mapping[str, Any], trained: bool) -> dict:
    """What there is to say, as JSON: of each task its numbers, and of each length what was right; of held-out text the
    losses of its sets. trained: the config names the text that was trained on."""
    import jax

    from hybridlm.probes import score, state_bits
    from hybridlm.probes.repeated_bigrams import RepeatedBigrams
    from hybridlm.probes.scoring import check_vocabulary
    from hybridlm.probes.tokenised import for_tokenizer
    from hybridlm.sharding import RULES

    n = math.prod(subject.mesh.shape[axis] for axis in RULES["batch"])
    rows = -(-ROWS // n) * n if args.rows is None else args.rows
    require(rows % n == 0, f"--rows ({rows}) must be a multiple of {n}: that many devices share them")
    on_text = {name: task for name, task in tasks.items() if isinstance(task, RepeatedBigrams)}
    asked = {name: for_tokenizer(task, subject.tokenizer, subject.bos)
             for name, task in tasks.items() if name not in on_text}  # fmt: skip
    for name, task in asked.items():
        with within(f"{name}: "):
            check_vocabulary(subject.config.model.vocab_size, task)
            for length in args.lengths:
                task.check(length)
    for name, bigrams in on_text.items():
        with within(f"{name}: "):
            _check_of_text(subject, bigrams, trained)
    bits = None if subject.config.model.sees_ahead else state_bits(subject.model)
    found: dict[str, Any] = {}
    with jax.set_mesh(subject.mesh):
        for name, task in asked.items():
            with within(f"{name}: "):
                scores = [score(subject.model, task, length, rows=rows, batches=args.batches, seed=args.seed)
                          for length in args.lengths]  # fmt: skip
            found[name] = {
                "fields": dataclasses.asdict(tasks[name]),
                "scores": [_said(one, task, bits) for one in scores],
            }
        for name, bigrams in on_text.items():
            with within(f"{name}: "):
                found[name] = {"fields": dataclasses.asdict(bigrams), "sets": _of_text(subject, bigrams)}
    return {
        "model": subject.name, "step": subject.step, "compute_dtype": subject.config.model.compute_dtype,
        "tokenizer": subject.tokenizer.name, "devices": subject.mesh.size, "rows": rows, "batches": args.batches,
        "seed": args.seed, "state_bits": bits, "tasks": {name: found[name] for name in tasks},
    }  # fmt: skip


def _check_of_text(subject, bigrams, trained: bool) -> None:
    """ConfigError where there is no text, or the model is not asked for its next token."""
    config, objective, ahead = subject.config, subject.config.optim.objective, subject.config.model.sees_ahead
    asks = ahead or (f"optim.objective {type(objective).__name__}" if objective.reads_ahead else "")
    require(not asks, f"it asks for the next token, which the model is not for: {asks}")
    require(
        trained or not bigrams.frequent,
        "frequent pairs are counted in the training text: give --data.path, or --repeated_bigrams.frequent=0",
    )
    has_text = trained or bool(config.data.val_path)
    require(has_text, "a published model holds out no text: give --data.val_path A B")


def _of_text(subject, bigrams) -> dict[str, dict]:
    """The losses of each held-out set in repeated pairs and in the rest; what to count is there, or not asked for."""
    from flax import nnx

    from hybridlm.data import open_corpus
    from hybridlm.eval.sets import OWN, open_sets
    from hybridlm.probes.forward import Forward
    from hybridlm.probes.repeated_bigrams import as_json, frequent_pairs, read_set
    from hybridlm.sharding import batch_sharding
    from hybridlm.train.batches import Batches

    config = subject.config
    if bigrams.frequent:
        corpus = open_corpus(config.data, subject.tokenizer)
        sets, frequent = corpus.held_out, frequent_pairs(bigrams, corpus)
    else:
        sets = open_sets(subject)
        frequent = frequent_pairs(bigrams, next(iter(sets.values())))
    graphdef, params = nnx.split(subject.model, nnx.Param)
    forward, found = Forward(graphdef, subject.mesh), {}
    for name, of_set in sets.items():
        n_rows, room = config.data.batch_size, config.model.prefix_tokens
        with Batches(config, of_set, "val", n_rows, batch_sharding(subject.mesh)) as batches:
            metrics = read_set(forward, (params,), batches, frequent, 0, lambda: False, room)
        found[name or OWN] = as_json(metrics)
    return found


def _said(score, task, bits: int | None) -> dict[str, Any]:
    by = {facet: {str(value): {"right": right, "asked": asked} for value, (right, asked) in of.items()}
          for facet, of in score.by.items()}  # fmt: skip
    bound = None if bits is None else task.fixed_state(score.length, bits)
    return {
        "length": score.length, "accuracy": score.right / score.asked if score.asked else None,
        "chance": task.chance(score.length), "fixed_state": bound,
        "right": score.right, "asked": score.asked, "rows": score.rows, "rows_all_right": score.whole, "by": by,
    }  # fmt: skip


def as_text(found: Mapping[str, Any]) -> str:
    """Tables; where a task hides things, its accuracy by depth and length with a shade behind each number."""
    from hybridlm.eval.report import table
    from hybridlm.study.probed import BY_SET, SCORES, facets, of_sets, of_tasks, title

    parts = [title(found)]
    for head, rows in ((SCORES, of_tasks(found)), (BY_SET, of_sets(found))):
        if rows:
            parts.append(table([head, *rows]))
    for name, facet, head, rows in facets(found, shades=True):
        parts.append(f"{name}, accuracy by {facet}:\n{table([head, *rows])}")
    return "\n\n".join(parts)


def keys(words: Sequence[str]) -> set[str]:
    """The options that words set, with their dashes."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}
