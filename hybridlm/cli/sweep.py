# SPDX-License-Identifier: Apache-2.0
"""`hybridlm sweep`: the runs of a product over options, one after the other or several at once, compared at the end."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hybridlm import storage
from hybridlm.cli.command import Command, make_parser, parse
from hybridlm.cli.side_by_side import Job, environment_with, logs_of, run_jobs, slots
from hybridlm.cli.words import split_overrides
from hybridlm.errors import ConfigError, Exit, RunError, require

CHECK_SECONDS = 1800.0
DONE = ("complete", "running")
"""States in which a member is left alone."""


def run(words: list[str], prog: str) -> int:
    """Trains the members that are not complete; see Command."""
    for name in (word.partition("=")[0] for word in words):
        ours = name in ("--run.dir", "--name")
        require(not ours, f"{name}: each run has a folder of its own; give --dir of the sweep")
    own, overrides = split_overrides(words)
    args = parse(_parser(prog), own)
    if args is None:
        return 0
    from hybridlm.config.find import load_config
    from hybridlm.study.sweep import members, read_alternatives

    places = slots(args.parallel)
    alternatives = read_alternatives([word for given in args.sweep for word in given])
    stem = args.config.removesuffix(".py").rpartition("/")[2].replace(":", "_")
    folder = storage.as_path(args.dir or f"runs/sweep-{stem}")
    config = load_config(args.config, overrides)
    found = members(config, alternatives, folder, overrides)
    states = _checked(args.config, found, places[0])
    todo = [member for member, state in zip(found, states) if state not in DONE]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"{len(found)} runs in {folder}: {counts}", flush=True)
    if args.dry_run:
        print("\n".join(f"{member.name}: {state}" for member, state in zip(found, states)))
        return 0
    logs = logs_of("sweeps", folder) if len(places) > 1 else None
    jobs = [Job(m.name, _command(args.config, m.words), logs and logs / f"{m.name}.log") for m in todo]
    code = _train(jobs, places, args.stop_on_failure, len(found))
    if "running" in states and code == 0:
        code = Exit.AGAIN
    return _closed(found, folder, code)


SWEEP = Command(
    "sweep", (("--config NAME --sweep KEY=VALUE ... [...]", "train the product of alternatives, and compare"),), run
)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, "Trains every combination of the alternatives; started again, it goes on.")
    parser.epilog = "All options of train may stand beside these, as --optim.warmup_steps=100; they hold for every run."
    parser.add_argument("--config", required=True, metavar="NAME", help="a name or FILE.py, as of train")
    parser.add_argument(
        "--sweep", required=True, nargs="+", action="append", metavar="KEY=VALUE",
        help="optim.lr=1e-3 optim.lr=3e-4 model.pattern=M-: values of one key are alternatives",
    )  # fmt: skip
    parser.add_argument("--dir", metavar="FOLDER", help="of the runs' folders and the page (runs/sweep-NAME)")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="runs at once, each on its share of GPUs (1)"
    )
    parser.add_argument("--stop-on-failure", action="store_true", help="begin no further run behind one that fails")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs")
    return parser


def _command(config: str, words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "hybridlm", "train", "--config", config, *words]


def _checked(config: str, found: Sequence, place: dict[str, str]) -> list[str]:
    """The state of each member; ConfigError for the first that cannot be trained. Asked of another process, which sees
    the devices as a member does: this one never takes any."""
    asked = json.dumps({"config": config, "members": found})
    words = [sys.executable, "-m", "hybridlm.cli.sweep_check"]
    env = os.environ | environment_with(place)
    try:
        done = subprocess.run(
            words, input=asked, capture_output=True, text=True, env=env, timeout=CHECK_SECONDS, check=True
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())[-300:]
        raise RunError(f"the runs of the sweep could not be checked: {said}") from error
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer["states"]


def _train(jobs: list[Job], places: list[dict[str, str]], stop_on_failure: bool, n_members: int) -> int:
    """The exit code of the sweep: that of a signal, else the failures' where it is one and the same, else 1."""
    codes: list[int] = []
    begun = n_members - len(jobs)

    def began(job: Job) -> None:
        nonlocal begun
        begun += 1
        print(f"[{begun}/{n_members}] {job.name}: {job.log or shlex.join(job.words)}", flush=True)

    def ended(job: Job, code: int) -> bool:
        codes.append(code)
        word = "complete" if code == 0 else f"ended with exit code {code}" + (f", see {job.log}" if job.log else "")
        print(f"{job.name}: {word}", flush=True)
        return code == 0 or not stop_on_failure

    signum = run_jobs(jobs, [environment_with(place) for place in places], began, ended)
    if signum is not None:
        return 128 + signum
    failures = {code for code in codes if code}
    return failures.pop() if len(failures) == 1 else Exit.FAILED if failures else Exit.COMPLETE


def _closed(found: Sequence, folder: Path, code: int) -> int:
    """The table of the runs, and the page, of those that have begun."""
    from hybridlm.cli.compare import write
    from hybridlm.study.reading import Run, is_run, read_each
    from hybridlm.study.survey import as_text

    paths = [storage.as_path(member.folder) for member in found]
    read = read_each([path for path in paths if is_run(storage.names(path))])
    if read:
        print(as_text(read))
    runs = [each for each in read if isinstance(each, Run) and each.records]
    if runs:
        page = folder / "compare.html"
        write(runs, page, folder / "compare.png", f"Sweep {folder.name}")
        print(f"compared: {page}")
    return code
