# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study length`: loss by position beyond the trained length, by scaling of rotary embeddings and by gate."""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.side_by_side import Job, environment_with, logs_of, run_jobs, slots
from hybridlm.cli.words import split_overrides
from hybridlm.errors import Exit, require, within
from hybridlm.fields import WHOLE

FILE, PAGE, FIGURE = "length.json", "length.html", "length.png"
PLAIN = ("none", "linear", "ntk", "yarn")
"""What is read unless something else is asked for."""


class Read(NamedTuple):
    """A run that is read, and how."""

    name: str
    folder: Path
    words: list[str]
    """Those that train it; none of a run that is at hand."""
    methods: tuple[str, ...]
    tuned: int = 0
    """Steps at the longer rows, with the method's scaling; it is read as it stands."""


def run(words: list[str], prog: str) -> int:
    """Trains what is not there, reads, and writes the page; see Command."""
    own, overrides = split_overrides(words)
    args = parse(_parser(prog), own)
    if args is None:
        return 0
    _check(args, overrides)
    if args.run is None:
        stem = args.config.removesuffix(".py").rpartition("/")[2].replace(":", "_")
        folder = storage.as_path(args.dir or f"runs/length-{stem}")
        subjects = _members(args, overrides, folder)
        code = _train(args, subjects, folder)
        if code != Exit.COMPLETE:
            return code
        overrides = []
    else:
        folder = storage.as_path(args.dir or "runs/length")
        subjects = [Read(run, storage.as_path(run), [], tuple(args.methods)) for run in args.run]
    _measure(args, subjects, overrides, folder)
    return 0


LENGTH = Command(
    "length",
    (("--config NAME|--run RUN ... [--times 16]", "loss by position beyond the trained length, by RoPE scaling"),),
    run,
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(
        prog,
        "Reads models to several times the rows of their training, with each scaling of their rotary embedding, and "
        "draws the loss over the position. Started again, it goes on.",
    )
    parser.epilog = (
        "Options of train may stand beside these with --config, as --data.seq_len=512: they hold for every run that is "
        "trained. With --run they are those of hybridlm eval, as --data.val_path=books.jsonl."
    )
    parser.add_argument(
        "--config", metavar="NAME",
        help="train this for each gate and seed, a name or FILE.py; with --run, the file of the runs' own blocks",
    )  # fmt: skip
    parser.add_argument("--run", nargs="+", metavar="DIR", help="runs that are there, in the place of --config")
    parser.add_argument(
        "--times", type=int, default=16, metavar="N", help="read to so many times the trained rows (16)"
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(PLAIN), metavar="NAME",
        help=f"scalings, of none, linear, ntk, dynamic, yarn ({' '.join(PLAIN)})",
    )  # fmt: skip
    parser.add_argument(
        "--gates", nargs="+", metavar="NAME",
        help="output gates of attention that are trained, of none, elementwise, head (none elementwise, where it can "
        "have one)",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="a run of each (0 1)")
    parser.add_argument(
        "--tune-steps", type=int, default=0, metavar="N",
        help="train each run on for N steps at the longer rows with each scaling, and read that, too (0)",
    )  # fmt: skip
    parser.add_argument("--tune-batch", type=int, metavar="B", help="rows of those steps (as many tokens as before)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="batches of each held-out set (all)")
    parser.add_argument("--dir", metavar="FOLDER", help="of the runs, of the numbers and the page (runs/length-NAME)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs trained at once (1)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return parser


def _check(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """ConfigError for options that do not go together, and numbers."""
    from hybridlm.study.length import GATES, METHODS

    of_runs = args.config is None or args.config.partition(":")[0].endswith(".py")  # blocks of their own
    fits = args.config is not None if args.run is None else of_runs
    require(fits, "give --config NAME or --run RUN ..., one of them")
    for name in ("--run.dir", "--run.seed", "--name"):
        ours = any(word.partition("=")[0] == name for word in overrides)
        require(not ours, f"{name}: each run has one of its own; give --dir and --seeds")
    require(args.run is None or not args.tune_steps, "--tune-steps needs --config, which says how to train")
    for name, least in (("times", 2), ("tune_steps", 0), ("tune_batch", 1), ("limit", 0)):
        value = getattr(args, name)
        option = f"--{name.replace('_', '-')}"
        require(value is None or least <= value <= WHOLE, f"{option} ({value}) must be between {least} and {WHOLE}")
    if args.run is not None:
        for name in ("--data.seq_len", "--data.packing"):
            ours = any(word.partition("=")[0] == name for word in overrides)
            require(not ours, f"{name}: rows are of --times and hold whole documents")
        require(args.gates is None, f"--gates ({' '.join(args.gates or ())}) are trained with --config: leave it out")
    for name, known in (("run", None), ("methods", METHODS), ("gates", GATES), ("seeds", None)):
        values = getattr(args, name) or []
        for value in values:
            require(known is None or value in known, f"--{name} ({value}) must be of {', '.join(known or ())}")
        require(len(set(values)) == len(values), f"--{name} ({' '.join(map(str, values))}) has one of them twice")


# Training ------------------------------------------------------------------------------------------------------------


def _members(args: argparse.Namespace, overrides: list[str], folder: Path) -> list[Read]:
    """The runs of each gate and seed, and of each what it is trained on to. ConfigError where one cannot be trained."""
    from hybridlm.config.find import load_to_train
    from hybridlm.study.length import gated, gates, readings

    plain = load_to_train(args.config, overrides)
    length = plain.data.seq_len * args.times
    kinds = args.gates or (["none", "elementwise"] if gates(plain) else [None])
    found = []
    for gate in kinds:
        for seed in args.seeds:
            name = f"seed={seed}" if gate is None else f"gate={gate},seed={seed}"
            words = [*overrides, *(gated(plain, gate) if gate else []), f"--run.seed={seed}"]
            base = Read(name, folder / name, [*words, f"--run.dir={folder / name}"], tuple(args.methods))
            with within(f"{name}: "):
                config = load_to_train(args.config, base.words)
                ways = {method: readings(config, method, length) for method in args.methods}
            found.append(base)
            for method, ((_, scaling), *more) in ways.items():
                if not args.tune_steps or more:
                    continue  # of several lengths, each with its own factor, there is no one model to train
                longer = f"{name},{method},{args.tune_steps}x{length}"
                own = [*scaling, *_longer(args, config, length)]
                there = [f"--init.run={base.folder}", f"--run.dir={folder / longer}"]
                tuned = Read(longer, folder / longer, [*words, *own, *there], (method,), args.tune_steps)
                with within(f"{longer}: "):
                    load_to_train(args.config, tuned.words)
                found.append(tuned)
    return found


def _longer(args: argparse.Namespace, config, length: int) -> list[str]:
    """The words of training on: as many tokens a step, as far as whole rows and microbatches come to it."""
    of_step, parts = config.data.batch_size * config.data.seq_len, config.optim.accumulate
    rows = args.tune_batch or max(of_step // length // parts, 1) * parts
    return [f"--data.seq_len={length}", f"--data.batch_size={rows}", f"--run.steps={args.tune_steps}"]


def _train(args: argparse.Namespace, subjects: Sequence[Read], folder: Path) -> int:
    """Trains the runs that are not complete, those that others begin from first; the exit code."""
    places = slots(args.parallel)
    apart = len(places) > 1 or args.json  # standard output is for JSON alone
    logs = logs_of("studies", folder) if apart else None
    todo = [subject for subject in subjects if not _complete(subject, args.config)]
    said = sys.stderr if args.json else sys.stdout
    print(f"{len(subjects)} runs in {folder}: {len(todo)} to train", file=said, flush=True)
    words = [sys.executable, "-m", "hybridlm", "train", "--config", args.config]
    for stage in ([s for s in todo if not s.tuned], [s for s in todo if s.tuned]):
        jobs = [Job(s.name, [*words, *s.words], logs and logs / f"{s.name}.log") for s in stage]
        code = _side_by_side(jobs, places, said)
        if code != Exit.COMPLETE:
            return code
    return Exit.COMPLETE


def _side_by_side(jobs: Sequence[Job], places: Sequence[dict[str, str]], said: TextIO) -> int:
    """The exit code of the first that fails, behind which none begins, or of a signal."""
    codes: list[int] = []

    def began(job: Job) -> None:
        print(f"{job.name}: {job.log or shlex.join(job.words)}", file=said, flush=True)

    def ended(job: Job, code: int) -> bool:
        codes.append(code)
        if code:
            see = f", see {job.log}" if job.log else ""
            print(f"{job.name}: ended with exit code {code}{see}", file=said, flush=True)
        return code == 0

    signum = run_jobs(jobs, [environment_with(place) for place in places], began, ended)
    return 128 + signum if signum is not None else next((code for code in codes if code), Exit.COMPLETE)


OURS = ("run.", "mesh", "cluster", "init", "data.workers", "data.prefetch", "data.cache_dir")
"""What may differ between starts of a study: it changes nothing of what a run of so many steps has learned."""


def _complete(subject: Read, config_name: str) -> bool:
    """Whether a run has all of its steps. ConfigError where its folder has another run."""
    from hybridlm.config.find import load_config
    from hybridlm.config.resume import changes
    from hybridlm.study.reading import is_run, read_run

    if not is_run(storage.names(subject.folder)):
        return False
    config = load_config(config_name, subject.words)
    found = read_run(subject.folder, like=config)
    pairs = changes(found.parsed, config).items() if found.parsed is not None and found.checkpoints else ()
    other = [f"{key} ({a} there, {b} now)" for key, (a, b) in pairs if key == "run.seed" or not key.startswith(OURS)]
    require(
        not other, f"{subject.folder} holds a run with another config: {', '.join(other[:3])}; choose another --dir"
    )
    return bool(found.checkpoints) and found.checkpoints[-1] >= config.run.steps


# Reading -------------------------------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace, subjects: Sequence[Read], words: list[str], folder: Path) -> None:
    """Reads each model by each method, but for what the study's file has, and writes numbers, figure and page."""
    from hybridlm.cli.start import start
    from hybridlm.eval.report import table
    from hybridlm.study import length_page
    from hybridlm.study.figures import as_png
    from hybridlm.study.length import as_rows, read_rows, sentences, write_rows

    asked = _asked(args, subjects, words)
    kept = {row.key: row for row in read_rows(folder / FILE)}
    start()
    storage.make_folder(folder)
    shown = []
    for n, (subject, config, row) in enumerate(asked, start=1):
        if row.key not in kept:
            print(f"[{n}/{len(asked)}] {subject.name}: {row.method}", file=sys.stderr, flush=True)
            with within(f"{subject.name}: "):
                row = row._replace(buckets=_read(subject, config, row, words, args.limit))
            kept[row.key] = row
        shown.append(kept[row.key])
        write_rows(folder / FILE, list(kept.values()), shown)
    title = f"Loss beyond the trained length: {folder.name}"
    storage.write_bytes(folder / FIGURE, as_png(length_page.drawn(shown, title)))
    storage.write_bytes(folder / PAGE, length_page.as_page(shown, title).encode("utf-8", "backslashreplace"))
    if args.json:
        print(storage.read_bytes(folder / FILE).decode())
        return
    head, cells = as_rows(shown)
    print("\n".join([table([head, *cells]), *sentences(shown), f"drawn: {folder / PAGE}"]))


def _asked(args: argparse.Namespace, subjects: Sequence[Read], words: Sequence[str]) -> list[tuple[Read, Any, Any]]:
    """(run, its config, a row without losses) of each reading, every one of which is checked before the first."""
    from hybridlm.config.find import read_config
    from hybridlm.study.length import Row, gate_of, readings
    from hybridlm.train.records import finished_steps
    from hybridlm.train.run_folder import stored_config

    like = None if args.config is None else read_config(args.config)
    found: list[tuple[Read, Any, Any]] = []
    trained, plain = None, {}
    for subject in subjects:
        storage.check(subject.folder, "the run's folder")
        config = stored_config(subject.folder, like)
        steps = finished_steps(subject.folder / "checkpoints")
        require(bool(steps), f"{subject.folder} has no checkpoint yet")
        rows = config.data.seq_len // args.times if subject.tuned else config.data.seq_len
        trained = trained or rows
        require(
            rows == trained, f"{subject.folder} was trained at rows of {rows} tokens, {subjects[0].folder} of {trained}"
        )
        if not subject.tuned:
            plain[str(subject.folder)] = config
        read = (*words, *([f"limit {args.limit}"] if args.limit else []), _digest(config))
        for method in subject.methods:
            if not subject.tuned:
                readings(config, method, rows * args.times)
            found.append(
                (subject, config, Row(str(subject.folder), steps[-1], gate_of(config), config.run.seed, method,
                                      subject.tuned, rows, rows * args.times, read, ()))
            )  # fmt: skip
    _check_alike(plain)
    return found


def _check_alike(configs: Mapping[str, Any]) -> None:
    """ConfigError where runs differ in more than gate and seed, or in neither: their losses would be taken together."""
    from hybridlm.config.tree import to_dict
    from hybridlm.study.differences import differences
    from hybridlm.study.length import gate_of, gates

    (first, of_first), *others = configs.items()
    known = {(gate_of(of_first), of_first.run.seed): first}
    for folder, config in others:
        may = (*OURS, *gates(config))
        found = [key for key in differences([to_dict(of_first), to_dict(config)]) if not key.startswith(may)]
        named = ", ".join(found[:4])
        require(not found, f"{first} and {folder} differ in {named}: read them apart, each with a --dir of its own")
        other = known.setdefault((gate_of(config), config.run.seed), folder)
        require(other == folder, f"{other} and {folder} have the same gate and run.seed: give one of them")


def _digest(config) -> str:
    """Of a run's config: what is read of it depends on it."""
    from hybridlm.config.tree import to_dict

    return hashlib.blake2b(json.dumps(to_dict(config), sort_keys=True).encode(), digest_size=8).hexdigest()


def _read(subject: Read, config, row, words: Sequence[str], limit: int) -> tuple:
    """The losses by position, of all held-out sets together."""
    from hybridlm.eval.sets import evaluate_sets
    from hybridlm.eval.subject import open_run
    from hybridlm.study.length import joined, readings

    ways = [(row.length, [])] if subject.tuned else readings(config, row.method, row.length)
    parts = []
    for length, scaling in ways:
        of_rows = [*words, *scaling, f"--data.seq_len={length}", "--data.packing=best_fit"]
        opened = open_run(subject.folder, row.step, of_rows, config)
        buckets = _together(evaluate_sets(opened, limit).values())
        n_long = sum(bucket.tokens for bucket in buckets)
        require(n_long > 0, f"no held-out document fills a row of {length} tokens: give --data.val_path of longer ones")
        parts.append(buckets)
    return joined(parts)


def _together(results) -> list:
    """Of each position the long documents of all sets."""
    from hybridlm.eval.report import label
    from hybridlm.study.length import Bucket

    found = []
    for of_each in zip(*(result.by_position for result in results), strict=True):
        tokens = sum(bucket.long_tokens for bucket in of_each)
        nats = sum(bucket.long_tokens * bucket.long_loss for bucket in of_each if bucket.long_tokens)
        first = of_each[0]
        found.append(Bucket(label(first), first.above, first.to, tokens, nats / tokens if tokens else 0.0))
    return found
