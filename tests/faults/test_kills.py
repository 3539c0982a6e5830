# SPDX-License-Identifier: Apache-2.0
"""The real train.py, killed at random moments, on a full disk, started twice: each run then equals the undisturbed one
to the bit."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from tests.faults.runs import ROOT, Processes, clean, losses, newest, write_config

STEPS = 60
WORDS = (f"--run.steps={STEPS}", "--run.save_every=10")
MOMENTS = ("start-up", "step", "save", "end")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDS = {0, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 143, 130}
"""Exit codes of a run that was sent a signal; the negative ones where Python had not begun to handle it."""


def arrays(run: Path) -> list[np.ndarray]:
    """All of the train state of the newest checkpoint, in order."""
    folder = run / "checkpoints" / str(newest(run))
    handler = ocp.StandardCheckpointHandler()
    found = [handler.restore(epath.Path(folder / item)) for item in ("params", "trainer")]
    handler.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found)]


def check_equal(run: Path, reference: Path) -> None:
    """Every loss, and every bit of the final state."""
    assert newest(run) == STEPS and losses(run) == losses(reference) and len(losses(run)) == STEPS
    for one, other in zip(arrays(run), arrays(reference), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(config, folder of the run that nobody disturbs, seconds until its first step)."""
    folder = tmp_path_factory.mktemp("kills")
    config = write_config(folder)
    began = time.monotonic()
    with Processes(config, *WORDS, f"--run.dir={folder}/undisturbed") as one:
        one.wait_for_step(1)
        start = time.monotonic() - began
        assert one.ends() == [0], one.said()
    return config, folder / "undisturbed", start


def kill_once(config: Path, run: Path, start: float, moment: random.Random) -> tuple[str, int]:
    """Starts the run and sends it a signal at a random moment: (what it was at, exit code)."""
    at, signum = moment.choice(MOMENTS), moment.choice(SIGNALS)
    with Processes(config, *WORDS, f"--run.dir={run}") as one:
        process, end = one.all[0], time.monotonic() + 120
        begun = time.monotonic()
        step, wait = moment.randint(newest(run), STEPS), moment.uniform(0, start)
        there = {
            "start-up": lambda: time.monotonic() > begun + wait,
            "step": lambda: one.step() >= step,
            "save": lambda: one.step() and any("tmp" in path.name for path in run.glob("checkpoints/*")),
            "end": lambda: one.step() >= STEPS,
        }[at]
        while process.poll() is None and not there():
            assert time.monotonic() < end, one.said()
            time.sleep(0.001)
        time.sleep(moment.uniform(0, 0.02))
        process.send_signal(signum)
        code = one.ends()[0]
        assert code in ENDS, one.said()
        assert clean(one.text()) or (at == "start-up" and signum == signal.SIGINT), one.said()
        return at, code


def kill_and_finish(made, folder: Path, kills: int, seed: int) -> Counter:
    """Runs that are killed until so many were, each then finished and compared; how often at what."""
    config, reference, start = made
    moment, counted, run = random.Random(seed), Counter(), folder / "run-0"
    while sum(counted.values()) < kills:
        at, code = kill_once(config, run, start, moment)
        counted[at] += code != 0
        if code == 0:
            check_equal(run, reference)
            run = folder / f"run-{sum(counted.values())}-{seed}-{moment.random():.6f}"
    with Processes(config, *WORDS, f"--run.dir={run}") as last:
        assert last.ends(120) == [0], last.said()
    check_equal(run, reference)
    return counted


def test_a_run_killed_twice_equals_the_undisturbed_one(made, tmp_path):
    assert sum(kill_and_finish(made, tmp_path, 2, seed=2).values()) == 2


@pytest.mark.slow
def test_fifty_kills(made, tmp_path):
    counted = kill_and_finish(made, tmp_path, 50, seed=1)
    assert set(counted) == set(MOMENTS), counted


@pytest.mark.slow
def test_two_runs_in_one_folder(made, tmp_path):
    """The second one says so and changes nothing; of three at once, one trains."""
    config, reference, _ = made
    with Processes(config, *WORDS, f"--run.dir={tmp_path}/run") as first:
        first.wait_for_step(1)
        with Processes(config, *WORDS, f"--run.dir={tmp_path}/run") as second:
            assert second.ends() in ([1], [0]), second.said()
            in_use = second.all[0].returncode == 1
            assert "is in use by process" in second.text() if in_use else "is complete" in second.text()
        assert first.ends() == [0], first.said()
    check_equal(tmp_path / "run", reference)
    started = [Processes(config, *WORDS, f"--run.dir={tmp_path}/three") for _ in range(3)]
    try:
        codes = [one.ends(120)[0] for one in started]
    finally:
        for one in started:
            one.__exit__()
    assert codes.count(0) >= 1 and set(codes) <= {0, 1}, [one.said() for one in started]
    assert all(clean(one.text()) for one in started)
    check_equal(tmp_path / "three", reference)


def can_mount() -> bool:
    """Whether this user may have a small disk of its own."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    return tried.returncode == 0


@pytest.mark.slow
def test_a_full_disk(made, tmp_path):
    """A disk of 300 KB fills: one line that names the file, what was saved is whole, and goes on elsewhere."""
    config, reference, _ = made
    run, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    train = f"{sys.executable} {ROOT}/train.py --config {config} {' '.join(WORDS)} --run.keep=100"
    if can_mount():
        words = [
            "unshare", "-rm", "sh", "-c",
            f"mount -t tmpfs -o size=300k none {disk} && {train} --run.dir={disk}/run; c=$?; cp -r {disk}/run {run}; "
            "exit $c",
        ]  # fmt: skip
    else:  # files of at most 32 KiB stand for it
        words = ["bash", "-c", f"ulimit -f 32; exec {train} --run.dir={run}"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(r"cannot write .*(No space left|File too large)", errors[0]), done
    with Processes(config, *WORDS, f"--run.dir={run}") as again:
        assert again.ends(120) == [0] and "going on from the checkpoint" in again.text(), again.said()
    check_equal(run, reference)
