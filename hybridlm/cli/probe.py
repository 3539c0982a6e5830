# SPDX-License-Identifier: Apache-2.0
"""`hybridlm probe`: what a run's model, or a published one, recalls of its context, by task and length."""

import argparse
import ast
import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start
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
    start()
    from hybridlm.config.find import read_config
    from hybridlm.eval.subject import open_published, open_run

    tasks = chosen(args.tasks, of_tasks)
    for name, task in tasks.items():
        for length in args.lengths:
            with within(f"{name}: "):
                task.check(length)
    if args.hf is not None:
        subject = open_published(args.hf, of_config)
    else:
        like = None if args.config is None else read_config(args.config)
        subject = open_run(args.run, args.step, of_config, like)
    found = probed(args, subject, tasks)
    print(json.dumps(found, indent=1) if args.json else _as_text(found))
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
    parser.epilog = (
        "--NAME.FIELD=VALUE is a number of a task (--mqar.pairs=16, --needle.needles=4); --mesh.KEY=VALUE, "
        "--model.compute_dtype=TYPE and --data.tokenizer=PATH are those of training."
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


def chosen(names: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    """The tasks of these names, with the numbers that words give them: `--mqar.pairs=16`, `--needle.depths 0 50`."""
    from hybridlm.probes import PROBES

    given: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    values: list[str] = []
    for name in names:
        require(name in PROBES, f"--tasks ({name}): no task of that name: there are {', '.join(PROBES)}")
    for word in words:
        if not word.startswith("--"):
            values.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        name, _, field = key.partition(".")
        require(name in given, f"--{key}: {name} is none of --tasks: {', '.join(names)}")
        known = [f.name for f in dataclasses.fields(PROBES[name])]
        near = difflib.get_close_matches(field, known, n=1) or [", ".join(known)]
        require(field in known, f"unknown field --{key}: {name} has no {field}: did you mean {near[0]}?")
        values = given[name][field] = [value] if equals else []
    return {name: _changed(name, PROBES[name], fields) for name, fields in given.items()}


def _changed(name: str, task: Any, fields: Mapping[str, list[str]]) -> Any:
    new = {}
    for field, texts in fields.items():
        require(bool(texts), f"--{name}.{field} needs a value")
        values = [_value(text) for text in texts]
        value = values[0] if len(values) == 1 else tuple(values)
        several = isinstance(getattr(task, field), tuple)
        new[field] = (value,) if several and not isinstance(value, tuple) else value
    with within(f"{name}."):
        return dataclasses.replace(task, **new)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def probed(args: argparse.Namespace, subject, tasks: Mapping[str, Any]) -> dict:
    """What there is to say, as JSON: of each task its numbers, and of each length what was right."""
    import jax

    from hybridlm.probes import score, state_bits
    from hybridlm.probes.scoring import check_vocabulary
    from hybridlm.sharding import RULES

    n = math.prod(subject.mesh.shape[axis] for axis in RULES["batch"])
    rows = -(-ROWS // n) * n if args.rows is None else args.rows
    require(rows % n == 0, f"--rows ({rows}) must be a multiple of {n}: that many devices share them")
    for name, task in tasks.items():
        fits = not task.is_text or subject.tokenizer.name == "byte"
        said = f"{name} is text in bytes, the model's tokenizer {subject.tokenizer.name}: take tasks without a language"
        require(fits, said)
        with within(f"{name}: "):
            check_vocabulary(subject.config.model.vocab_size, task)
    bits = None if subject.config.model.sees_ahead else state_bits(subject.model)
    found: dict[str, Any] = {}
    with jax.set_mesh(subject.mesh):
        for name, task in tasks.items():
            with within(f"{name}: "):
                scores = [score(subject.model, task, length, rows=rows, batches=args.batches, seed=args.seed)
                          for length in args.lengths]  # fmt: skip
            found[name] = {"fields": dataclasses.asdict(task), "scores": [_said(one, task, bits) for one in scores]}
    return {
        "model": subject.name, "step": subject.step, "compute_dtype": subject.config.model.compute_dtype,
        "tokenizer": subject.tokenizer.name, "devices": subject.mesh.size, "rows": rows, "batches": args.batches,
        "seed": args.seed, "state_bits": bits, "tasks": found,
    }  # fmt: skip


def _said(score, task, bits: int | None) -> dict[str, Any]:
    by = {facet: {str(value): {"right": right, "asked": asked} for value, (right, asked) in of.items()}
          for facet, of in score.by.items()}  # fmt: skip
    bound = None if bits is None else task.fixed_state(score.length, bits)
    return {
        "length": score.length, "accuracy": score.right / score.asked if score.asked else None,
        "chance": task.chance(score.length), "fixed_state": bound,
        "right": score.right, "asked": score.asked, "rows": score.rows, "rows_all_right": score.whole, "by": by,
    }  # fmt: skip


def _as_text(found: Mapping[str, Any]) -> str:
    from hybridlm.eval.report import table

    step = "" if found["step"] is None else f", step {found['step']}"
    state = "grows with the text" if found["state_bits"] is None else f"{found['state_bits']:,} bits"
    parts = [f"{found['model']}{step}: {found['compute_dtype']}, state {state}"]
    rows = [["task", "length", "answers", "accuracy", "chance", "bound of the state", "rows all right"]]
    for name, of_task in found["tasks"].items():
        for one in of_task["scores"]:
            numbers = [_shown(one[key]) for key in ("accuracy", "chance", "fixed_state")]
            rows.append(
                [name, str(one["length"]), str(one["asked"]), *numbers, f"{one['rows_all_right']} of {one['rows']}"]
            )
    parts.append(table(rows))
    for name, of_task in found["tasks"].items():
        scores = of_task["scores"]
        for facet in scores[0]["by"]:
            values = sorted({value for one in scores for value in one["by"].get(facet, {})}, key=int)
            lines = [["length", *values]]
            for one in scores:
                cells = (one["by"].get(facet, {}).get(value) for value in values)
                lines.append([str(one["length"]), *(_shown(c and c["right"] / c["asked"]) for c in cells)])
            if len(values) > 1:
                parts.append(f"{name}, accuracy by {facet}:\n{table(lines)}")
    return "\n\n".join(parts)


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"
