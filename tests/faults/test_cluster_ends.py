# SPDX-License-Identifier: Apache-2.0
"""Runs of several processes over loopback: told to stop, or with one of them lost, and what is started again after."""

import random
import signal
import time

import pytest

from hybridlm.cli import train_main
from tests.faults.runs import HEARTBEAT, STOPS, Processes, clean, losses, newest

STEPS = 40
AGAIN = 75
LONG = "--run.steps=100000"


@pytest.fixture
def undisturbed(nano, one_device):
    """Losses of the same run by one process, this one, that nobody disturbs."""

    def run(steps: int, folder: str = "one") -> dict[int, float]:
        assert train_main(["--config", str(nano), f"--run.dir={nano.parent}/{folder}", f"--run.steps={steps}"]) == 0
        return losses(nano.parent / folder)

    return run


def check_stopped(processes: Processes, signum: int) -> None:
    """All saved the same step, and say how to go on."""
    assert set(processes.ends()) == {STOPS[signum]}, processes.said()
    assert clean(processes.said()), processes.said()
    if "before the first step" not in processes.text():
        assert "to resume: " in processes.text()


def check_lost(processes: Processes, which: int, end: int) -> None:
    """The others ended by themselves, within a minute, with one line, and `which` as it was ended."""
    codes = processes.ends(60)
    assert codes.pop(which) == end and set(codes) == {AGAIN}, processes.said()
    for i in set(range(len(processes.all))) - {which}:
        text = processes.text(i)
        assert clean(text) and text.count("error: ") == 1 and "to resume" in text, processes.said()


@pytest.mark.quick
def test_a_run_of_two_processes_ends_and_goes_on(nano, undisturbed, capsys):
    """Stopped by a signal to one, then without process 0, which hosts JAX's service, then gone on with by one alone."""
    run, moment = nano.parent / "run", random.Random(11)
    with Processes(nano, LONG, count=2) as both:
        both.wait_for_step(moment.randint(2, 6))
        both.send(signal.SIGTERM, 1)
        step = both.step()
        check_stopped(both, signal.SIGTERM)
        assert LONG in both.text().splitlines()[-1]
    saved = newest(run)
    assert step <= saved <= step + 100 and list(losses(run)) == list(range(1, saved + 1))
    with Processes(nano, LONG, count=2) as both:
        both.wait_for_step(saved + moment.randint(1, 4))
        both.send(signal.SIGKILL, 0)
        check_lost(both, 0, -signal.SIGKILL)
        assert "lost process 0" in both.text(1)
    alone = undisturbed(saved + 10, "run")
    assert f"from the checkpoint of step {saved}" in capsys.readouterr().out
    assert alone == pytest.approx(undisturbed(saved + 10), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ten_moments(nano, count):
    """One run, ended ten times at random moments in ten ways, equals the undisturbed one to the bit."""
    moment = random.Random(count)
    ways = [(signal.SIGKILL, (i,)) for i in range(count)]
    signals = [(signum, which) for signum in STOPS for which in ((0,), (count - 1,), ())]
    ways += moment.sample(signals, 10 - count)
    moment.shuffle(ways)
    for signum, which in ways:
        with Processes(nano, LONG, "--run.save_every=5", count=count) as all_of_them:
            all_of_them.wait_for("nano: ")
            time.sleep(moment.uniform(0, 4))
            all_of_them.send(signum, *which)
            if signum == signal.SIGKILL:
                check_lost(all_of_them, which[0], -signum)
            else:
                check_stopped(all_of_them, signum)
    steps = newest(nano.parent / "run") + 5
    for folder in ("run", "undisturbed"):
        with Processes(nano, f"--run.steps={steps}", f"--run.dir={nano.parent}/{folder}", count=count) as all_of_them:
            assert all_of_them.ends(200) == [0] * count, all_of_them.said()
    assert losses(nano.parent / "run") == losses(nano.parent / "undisturbed")


def contents(folder) -> dict:
    """What a folder holds but for its lock, which a new run may take over, and for checkpoints that have no name yet,
    which a new run deletes."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "lock" and "checkpoint-tmp" not in str(f)]
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_process_that_stands_still(nano, which):
    """The others end without it; when it goes on it ends without writing."""
    run = nano.parent / "run"
    with Processes(nano, LONG, "--run.save_every=5", count=3) as three:
        three.wait_for_step(7)
        three.send(signal.SIGSTOP, which)
        others = [three.all[i] for i in range(3) if i != which]
        end = time.monotonic() + 60
        while any(process.poll() is None for process in others):
            assert time.monotonic() < end, three.said()
            time.sleep(0.1)
        before = contents(run)
        three.send(signal.SIGCONT, which)
        assert three.ends() == [AGAIN] * 3 and clean(three.said()), three.said()
        assert contents(run) == before
    with Processes(nano, f"--run.steps={newest(run) + 5}", count=3) as three:
        assert three.ends(200) == [0] * 3, three.said()


@pytest.mark.slow
def test_other_numbers_of_processes_read_the_same_rows(nano, undisturbed):
    """2, then 4, 3 and 1 processes go on with a run, ten steps each."""
    for turn, count in enumerate((2, 4, 3, 1), 1):
        with Processes(nano, f"--run.steps={10 * turn}", count=count) as processes:
            assert processes.ends(200) == [0] * count, processes.said()
    assert losses(nano.parent / "run") == pytest.approx(undisturbed(40), rel=1e-4)


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(nano):
    """Process 0 cannot write its metrics: the others end with its line, not with a riddle."""
    with Processes(nano, LONG, count=3) as three:
        three.wait_for_step(3)
        (nano.parent / "run").rename(nano.parent / "elsewhere")
        assert three.ends(4 * HEARTBEAT) == [1, 1, 1], three.said()
        assert all("was deleted while the run wrote to it" in three.text(i) for i in range(3)), three.said()
        assert clean(three.said()), three.said()
