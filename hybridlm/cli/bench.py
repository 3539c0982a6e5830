# SPDX-License-Identifier: Apache-2.0
"""`hybridlm bench`: how fast configs write and read, side by side, beside what the memory allows."""

import argparse
import json
import sys

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.start import start
from hybridlm.cli.study_words import check_settable
from hybridlm.cli.words import check_apart, check_figure, check_file, split_overrides
from hybridlm.cli.writing import CACHE, add_cache_options, cache_types
from hybridlm.errors import require

PHASES = ("decode", "prefill")
MAY_SET = ("model.", "init.hf")
"""What words may say of the configs: their models. All else is of training, and would be said for nothing."""


def run(words: list[str], prog: str) -> int:
    """Measures, prints tables, writes JSON and a page; see Command."""
    mine, overrides = split_overrides(words, CACHE)
    args = parse(_parser(prog), mine)
    if args is None:
        return 0
    plan, subjects, notes = _checked(args, overrides)
    _check_files(args)
    start()
    from hybridlm.infer import bench_tables
    from hybridlm.infer.bench import Key, measure

    stored = [f"{CACHE}{name}={value}" for name, value in vars(cache_types(args)).items() if value is not None]
    stored += [] if args.quantize is None else [f"--quantize={args.quantize}"]
    here, kept = bench_tables.about([*overrides, *stored]), []
    if args.json is not None:
        path = storage.as_path(args.json)
        kept = bench_tables.read(path, here)
    asked = {Key(s.name, plan.phase, n, batch) for s in subjects for n in plan.contexts for batch in plan.batches}
    rows = {row.key: row for row in kept}
    for row in measure(subjects, plan, kept, lambda line: print(line, file=sys.stderr, flush=True)):
        rows[row.key] = row
        if args.json is not None:
            bench_tables.write(path, here, list(rows.values()))
    shown = [row for key, row in rows.items() if key in asked]
    _show(bench_tables.tables(shown, notes))
    if args.html is not None:
        _page(args.html, here, list(rows.values()), notes)
    if args.figure is not None:
        _figure(args.figure, list(rows.values()))
    return 0


BENCH = Command(
    "bench",
    (("decode|prefill --config NAME ... --context N ... [...]", "how fast configs write and read, side by side"),),
    run,
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(
        prog,
        "Times configs side by side, with parameters as they are drawn: decode writes tokens behind a context that is "
        "filled without being read, prefill reads all of it. Options of the configs, as --model.compute_dtype=float32, "
        "stand beside these and are for all of them.",
    )
    parser.add_argument("phase", choices=PHASES, help="what is timed")
    parser.add_argument("--config", nargs="+", required=True, metavar="NAME", help="configs, as hybrid_1b mamba2_1b")
    parser.add_argument("--context", nargs="+", required=True, type=int, metavar="N", help="tokens of a row, in all")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="rows at once (1, without --fill)")
    parser.add_argument("--fill", action="store_true", help="each config at the largest batch that fits, too")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="that a turn of decode writes (64)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each that are timed (5)")
    parser.add_argument("--memory", type=float, metavar="GIB", help="that may be used (what the device says)")
    parser.add_argument(
        "--most-seconds", type=float, default=120.0, metavar="S", help="longest turn of prefill that is tried (120)"
    )
    add_cache_options(parser)
    parser.add_argument(
        "--quantize", choices=("int8", "fp8"), help="matrices in eight bits, as hybridlm quantize makes"
    )
    parser.add_argument("--peers", action="store_true", help="time transformers' Mamba-2 and mamba2-jax too")
    parser.add_argument(
        "--json", metavar="FILE", help="write all figures; what stands there already is not timed again"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with curves")
    parser.add_argument("--figure", metavar="FILE", help="write the curves alone, .png or .svg")
    return parser


def _checked(args: argparse.Namespace, overrides: list[str]):
    """(Plan, models, notes); ConfigError before anything is computed."""
    from hybridlm.config.find import load_config
    from hybridlm.errors import within
    from hybridlm.infer.bench import Plan
    from hybridlm.infer.bench_models import Ours
    from hybridlm.infer.bench_peers import peers
    from hybridlm.layers.quantized import library
    from hybridlm.model.config import QuantizeConfig

    check_settable(overrides, MAY_SET, "bench")
    require(len({*args.config}) == len(args.config), f"--config ({' '.join(args.config)}) has one of them twice")
    for name in ("memory", "most_seconds"):
        value = getattr(args, name)
        require(value is None or 0 < value < 1e9, f"--{name.replace('_', '-')} ({value}) must be positive")
    for batch in args.batch or ():
        require(batch >= 1, f"--batch ({batch}) must be at least 1")
    batches = args.batch or ([] if args.fill else [1])
    with within("--"):
        plan = Plan(
            args.phase, tuple(args.context), (*dict.fromkeys(batches), *((0,) if args.fill else ())), args.tokens,
            args.rounds, None if args.memory is None else round(args.memory * 2**30), args.most_seconds,
        )  # fmt: skip
    rounding = QuantizeConfig(weights=args.quantize, stored=args.quantize is not None)
    if rounding.on:
        library()
    models = {name: load_config(name, overrides).model for name in args.config}
    ours = [Ours(name, model, cache_types(args), rounding=rounding) for name, model in models.items()]
    for one in ours:
        ahead = one.model.sees_ahead
        require(not ahead, f"--config ({one.name}): it cannot be decoded token by token: {ahead}")
    others, notes = peers(ours) if args.peers else ([], [])
    return plan, [*ours, *others], notes


def _check_files(args: argparse.Namespace) -> None:
    """ConfigError where they cannot be written, or are one."""
    files = {f"--{name}": getattr(args, name) for name in ("json", "html", "figure")}
    for name, text in files.items():
        check_file(text, name)
    check_apart(files)
    if args.figure is not None:
        check_figure(args.figure)


def _show(tables) -> None:
    from hybridlm.plan.sections import Section
    from hybridlm.plan.tables import show_section

    for table in tables:
        show_section(Section(table.title, table.rows, table.head, table.notes))


def _page(path: str, here: dict, rows, notes) -> None:
    from hybridlm.infer.bench import as_dict
    from hybridlm.infer.bench_tables import tables
    from hybridlm.study.bench_page import as_html

    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    lines = [f"{here['device']}; {versions}", f"commit {here['commit']}"]
    if here["overrides"]:
        lines.append(f"with {' '.join(here['overrides'])}")
    page = as_html("Writing and reading, side by side", json.loads(json.dumps([as_dict(r) for r in rows])),
                   tables(rows, notes), lines)  # fmt: skip
    storage.write_text(storage.as_path(path), page)


def _figure(path: str, rows) -> None:
    from hybridlm.infer.bench import as_dict
    from hybridlm.study.bench_page import drawing
    from hybridlm.study.figures import as_file

    storage.write_bytes(storage.as_path(path), as_file(drawing([as_dict(row) for row in rows]), path))
