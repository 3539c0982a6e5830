# SPDX-License-Identifier: Apache-2.0
"""`hybridlm study ratio`: a grid of tiny models trained on a task, side by side, and what they recall at what cost."""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.side_by_side import Job, at_once, cores, environment_with, logs_of, run_jobs, slots
from hybridlm.cli.study_words import check_settable, split, task_of
from hybridlm.errors import Exit, require
from hybridlm.fields import WHOLE

GATES = {"off": (False,), "on": (True,), "both": (False, True)}
USUAL = {
    "mqar": (
        ("--mqar.vocab_size=256", "--mqar.random_filler=False"),
        tuple(f"pairs={n}@{4 * n}" for n in (4, 8, 16, 32, 64)),
    ),
}
"""Of a task: its numbers, and the stages in which it is learned, unless words say otherwise. Of mqar rows are full of
pairs and their queries, of few enough keys to be learned in minutes."""


def run(words: list[str], prog: str) -> int:
    """Trains what is not done yet, and draws what is; see Command."""
    own, of_config, of_task = split(words)
    args = parse(_parser(prog), own)
    if args is None:
        return 0
    _check(args)
    import jax

    jax.config.update("jax_platforms", "cpu")  # this process looks at shapes alone: devices are the models'
    from hybridlm.study.ratio import alike, members, result

    study = _study(args, of_config, of_task)
    points = _points(args)
    folder = storage.as_path(args.dir or f"runs/study-ratio-{args.task}")
    found = members(study, points, range(args.seeds), folder)
    todo = [member for member in found if result(study, member) is None]
    print(f"{len(found)} models in {folder}: {len(found) - len(todo)} done, {len(todo)} to train", flush=True)
    if args.dry_run:
        print(_listed(study, found))
        return 0
    bundles = _in_order(alike(todo), args.together)
    n = min(at_once() if args.parallel is None else args.parallel, max(len(bundles), 1))
    code = _train(study, bundles, slots(n), len(found)) if todo else Exit.COMPLETE
    results = [one for member in found if (one := result(study, member)) is not None]
    if results:
        _write(study, results, folder, f"{prog} {shlex.join(words)}")
    return code


RATIO = Command("ratio", (("--task NAME [...]", "how much attention a task needs: a grid of tiny models"),), run)


def _parser(prog: str) -> argparse.ArgumentParser:
    from hybridlm.study.grid import POSITIONS, RATIOS, Sizes

    parser = make_parser(
        prog, "Trains tiny models of equal size on a task and draws what they recall; started again, it goes on."
    )
    parser.epilog = (
        "--NAME.FIELD=VALUE is a number of the task (--mqar.pairs=16); --data.seq_len, --data.batch_size, --run.steps, "
        "--run.log_every and --optim.KEY are those of training."
    )
    parser.add_argument("--task", default="mqar", metavar="NAME", help="what they learn: docs/probes.md (mqar)")
    parser.add_argument(
        "--ratios", nargs="+", default=RATIOS, metavar="A:B", help=f"attention to others ({' '.join(RATIOS)})"
    )
    parser.add_argument("--gate", choices=GATES, default="both", help="output gate of attention (both)")
    parser.add_argument(
        "--placement", nargs="+", default=["even"], metavar="WHERE", help="even, first, middle, last (even)"
    )
    parser.add_argument(
        "--arrangement", nargs="+", default=["sequential"], metavar="HOW", help="sequential, parallel (sequential)"
    )
    state = parser.add_mutually_exclusive_group()
    state.add_argument(
        "--state", nargs="+", type=int, default=[64], metavar="N", help="state of a head, 16 to 256 (64)"
    )
    state.add_argument(
        "--state-bytes", nargs="+", type=int, metavar="N", help="the same of all mixers by its bytes, of each sublayer"
    )
    parser.add_argument(
        "--mixers", nargs="+", default=["Mamba2"], metavar="NAME", help="what attention is mixed with (Mamba2)"
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[1.0], metavar="X", help="factors of the learning rates (1)"
    )
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="models of each kind (2)")
    parser.add_argument(
        "--stages",
        nargs="+",
        metavar="FIELD=VALUE@T",
        help="what is learned in turn (of mqar pairs=2@8 pairs=4@16 ...)",
    )
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="more lengths that are scored")
    for name, what in (
        ("d_model", "width"), ("depth", "mixers of the stack"), ("mlp_every", "mixers to a feed-forward"),
        ("d_head", "width of a head"), ("vocab_size", "tokens of the models"), ("params", "parameters of each"),
        ("conv", "tokens of the convolution in front; 0: none"),
    ):  # fmt: skip
        usual = getattr(Sizes(), "mixers" if name == "depth" else name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=usual, metavar="N", help=f"{what} ({usual})"
        )
    parser.add_argument("--qk-norm", action="store_true", help="norm queries and keys of attention")
    parser.add_argument("--positions", choices=POSITIONS, default=Sizes().positions, help="of attention (none)")
    parser.add_argument("--dir", metavar="FOLDER", help="of the models and the page (runs/study-ratio-TASK)")
    parser.add_argument("--parallel", type=int, metavar="N", help="models at once (one a GPU, or one a core)")
    parser.add_argument(
        "--together", type=int, default=1, metavar="N", help="seeds and rates of a kind in one program, on a GPU (1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and list the models")
    return parser


def _check(args: argparse.Namespace) -> None:
    require(1 <= args.seeds <= 100, f"--seeds ({args.seeds}) must be between 1 and 100")
    for length in args.lengths or ():
        require(1 <= length <= WHOLE, f"--lengths ({length}) must be at least 1")
    require(1 <= args.together <= 256, f"--together ({args.together}) must be between 1 and 256")
    for name in ("ratios", "placement", "arrangement", "state", "state_bytes", "mixers", "rates", "lengths"):
        values = getattr(args, name) or ()
        twice = [value for value in values if list(values).count(value) > 1]
        require(not twice, f"--{name.replace('_', '-')} ({twice[0] if twice else ''}) is there twice")


def _study(args: argparse.Namespace, of_config: list[str], of_task: list[str]):
    from hybridlm.config.overrides import override
    from hybridlm.study.grid import Sizes
    from hybridlm.study.on_task import Trial
    from hybridlm.study.ratio import MAY_SET, RECIPE, Study

    check_settable(of_config, MAY_SET, "study ratio")
    config = override(RECIPE, of_config)
    usual, stages = USUAL.get(args.task, ((), ()))
    own = any(word.startswith(f"--{args.task}.") for word in of_task) or config.data != RECIPE.data
    stages = args.stages or ([] if own else stages)
    words = [*usual, *of_task]
    learned = [_stage(args.task, words, stage) for stage in stages or [f"@{config.data.seq_len}"]]
    last = learned[-1]
    tests = [last, *(Trial(last.task, length) for length in args.lengths or ()), *reversed(learned[:-1])]
    sizes = Sizes(
        args.d_model, args.depth, args.mlp_every, args.d_head, args.vocab_size, args.params, args.conv, args.positions,
        args.qk_norm,
    )  # fmt: skip
    return Study(args.task, tuple(learned), tuple(dict.fromkeys(tests)), config, sizes)


def _stage(task: str, words: list[str], stage: str):
    """The trial of `pairs=8@32`, or of `@32`."""
    from hybridlm.study.on_task import Trial

    fields, at, length = stage.rpartition("@")
    fits = bool(at) and length.isascii() and length.isdecimal() and 1 <= int(length) <= WHOLE
    require(fits, f"--stages ({stage}) must be FIELD=VALUE,...@LENGTH, as pairs=8@32")
    return Trial(task_of(task, [*words, *(f"--{task}.{field}" for field in fields.split(",") if field)]), int(length))


def _points(args: argparse.Namespace) -> list:
    from hybridlm.study.grid import points

    return points(
        {
            "ratio": args.ratios, "gate": GATES[args.gate], "placement": args.placement,
            "arrangement": args.arrangement, "state": args.state, "mixer": args.mixers, "rate": args.rates,
            "state_bytes": args.state_bytes or [None],
        }
    )  # fmt: skip


def _in_order(kinds: Sequence[Sequence], together: int) -> list[Sequence]:
    """What is trained one after the other, up to `together` models of a kind by one program: the first of each kind,
    then the second of each, ..., so that what stands side by side compiles nothing twice."""
    of_kinds = [[kind[i : i + together] for i in range(0, len(kind), together)] for kind in kinds]
    return [bundle for turn in itertools.zip_longest(*of_kinds) for bundle in turn if bundle is not None]


def _listed(study, found: Sequence) -> str:
    """A line for each kind of model."""
    from hybridlm.eval.report import table
    from hybridlm.study.grid import mixer_of, share
    from hybridlm.study.mixers import bytes_of
    from hybridlm.study.ratio import measures
    from hybridlm.train.progress import short

    rows = [["model", "pattern", "parameters", "state of a mixer", "cache of a row", "FLOPs a token", "models"]]
    for point in dict.fromkeys(member.point for member in found):
        of = [member for member in found if member.point == point]
        costs, alone = measures(of[0].config, study.tests), share(point.ratio) == 1
        state = 0 if alone else bytes_of(mixer_of(point, study.sizes), study.sizes.d_model)
        rows.append([
            point.name, of[0].config.model.pattern, f"{costs['params']:,}", "-" if alone else f"{state:,} B",
            f"{costs['cache_bytes'][0]:,} B", short(costs["flops_per_token"][0]), str(len(of)),
        ])  # fmt: skip
    return table(rows)


def _train(study, bundles: Sequence[Sequence], places: list[dict[str, str]], n_members: int) -> int:
    """Trains the models, as many bundles at once as there are places, one in a process; the exit code."""
    from hybridlm.study.ratio import MEMBER, asked

    jobs, sizes = [], {}
    for bundle in bundles:
        for member in bundle:
            storage.make_folder(member.folder)
            storage.write_text(member.folder / MEMBER, json.dumps(asked(study, member), indent=1) + "\n")
        words = [sys.executable, "-m", "hybridlm.cli.study_member", *(str(member.folder) for member in bundle)]
        name = bundle[0].name + (f" and {len(bundle) - 1} more" if len(bundle) > 1 else "")
        jobs.append(Job(name, words, logs_of("studies", bundle[0].folder) / "log.txt"))
        sizes[name] = len(bundle)
    done, codes = n_members - sum(sizes.values()), []

    def began(job: Job) -> None:
        nonlocal done
        done += sizes[job.name]
        print(f"[{done}/{n_members}] {job.name}: {job.log}", flush=True)

    def ended(job: Job, code: int) -> bool:
        codes.append(code)
        told = _last_line(job.log)
        print(f"{job.name}: {told if code == 0 else f'ended with exit code {code}: {told}; see {job.log}'}", flush=True)
        return code != Exit.CHANGE  # a mistake is that of all; one that diverges leaves the others

    share = {"NPROC": str(max(1, cores() // len(places)))}  # threads of XLA
    env = [environment_with(share | place) for place in places]
    signum = run_jobs(jobs, env, began, ended)
    if signum is not None:
        return 128 + signum
    return next((code for code in codes if code), Exit.COMPLETE)


def _last_line(log: Path | None) -> str:
    lines = [] if log is None else log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "done"


def _write(study, results: Sequence[dict[str, Any]], folder: Path, command: str) -> None:
    """The table on the screen; figure, page and JSON in the folder, each whole or not at all."""
    from hybridlm.study.figures import as_png
    from hybridlm.study.ratio import as_json, kinds
    from hybridlm.study.ratio_page import as_page, as_text, figure

    found = kinds(results)
    print(as_text(study, found))
    numbers = {"command": command, **as_json(study, found, results)}
    storage.write_text(folder / "ratio.json", json.dumps(numbers, indent=1) + "\n")
    storage.write_bytes(folder / "ratio.png", as_png(figure(study, found)))
    page = folder / "ratio.html"
    storage.write_bytes(page, as_page(study, found, results, command).encode("utf-8", "backslashreplace"))
    print(f"{len(results)} models: {page}, {folder / 'ratio.png'}, {folder / 'ratio.json'}")
