# SPDX-License-Identifier: Apache-2.0
"""A step that never ends, a reader that is dead or stands still, a pipe that nobody reads, a folder that is gone."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from hybridlm.cli import train_main
from hybridlm.errors import AgainError, RunError
from hybridlm.train import report
from hybridlm.train.feed import Feed
from tests.faults.runs import ROOT, Processes, clean, losses, newest
from tests.starting import python

HANGS = """

import time
from hybridlm.train import report

add = report.Reports.add

def add_for_ever(self, step, metrics):
    add(self, step, metrics)
    if step == 4:
        time.sleep(1000)

report.Reports.add = add_for_ever
"""


def test_a_step_that_hangs(nano):
    """Stacks of all threads in a file, one line, exit code 75."""
    nano.write_text(nano.read_text() + HANGS)
    with Processes(nano, "--run.watchdog=6") as one:
        assert one.ends(120) == [75], one.said()
        line = one.text().splitlines()[-1]
        assert line.startswith("error: no step was finished for") and "to resume: " in line and clean(one.text())
    stacks = (nano.parent / "run" / "stacks-0.txt").read_text()
    assert "in add_for_ever" in stacks and stacks.count("Thread 0x") > 2


WATCHED = """
import sys, time
from pathlib import Path
from hybridlm.train.watchdog import Watchdog

with Watchdog(0.5, Path(sys.argv[1]), "COMMAND") as watchdog:
    watchdog.step()
    {}
    print("lives", flush=True)
"""


@pytest.mark.parametrize(
    ("doing", "end"),
    [
        ("time.sleep(3)", "no step was finished"),
        ("[(time.sleep(0.2), watchdog.step()) for _ in range(6)]", None),
        ("watchdog.rest(); time.sleep(1.5)", None),
        ("with watchdog.during('saving'): time.sleep(1.5)", None),
        pytest.param("with watchdog.during('saving'): time.sleep(9)", "saving did not get on", marks=pytest.mark.slow),
        ("time.sleep(0.4); watchdog.step(); time.sleep(1.2); watchdog.step()", None),
    ],
)
def test_what_the_watchdog_counts(tmp_path, doing, end):
    code = textwrap.dedent(WATCHED).format(doing)
    words = [sys.executable, "-c", code, str(tmp_path / "stacks.txt")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "lives" in done.stdout) == ((0, True) if end is None else (75, False)), done.stderr
    assert (tmp_path / "stacks.txt").exists() == (end is not None) and (end or "") in done.stderr


def test_time_that_stood_still_does_not_count(tmp_path):
    code = textwrap.dedent(WATCHED).format("print('up', flush=True); time.sleep(1.5); watchdog.step()")
    words = [sys.executable, "-c", code.replace("0.5", "2"), str(tmp_path / "stacks.txt")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "lives\n" and process.returncode == 0
    finally:
        process.kill()


class Text:
    """A loader whose batches are numbers, and which does at some of them what it is told."""

    def __init__(self, acts: dict):
        self.step, self.acts, self.loader = 0, acts, self

    def __next__(self):
        if acts := self.acts.get(self.step):
            acts.pop(0)()
        self.step += 1
        return self.step - 1

    def get_state(self):
        return {"step": self.step}

    def put(self, batch):
        return batch


def fail():
    raise OSError("shard-3 cannot be read")


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_batch_that_cannot_be_read_is_read_again(failures):
    said = []
    feed = Feed(Text({2: [fail] * failures}), 0, lambda: False, said.append)
    assert [feed.next(), feed.next()] == [0, 1]
    if failures < 3:
        assert [feed.next(), feed.next()] == [2, 3] and len(said) == failures and "shard-3" in said[0]
        assert feed.state() == {"step": 4}
    else:
        with pytest.raises(RunError, match=r"3 times in a row \(shard-3"):
            feed.next()
        assert feed.state() == {"step": 2}
    feed.close()


def test_batches_are_on_the_devices_before_they_are_asked_for():
    """By the thread that reads them; one that does not get there ends the run: to read on would leave it out."""
    text, by = Text({}), []
    text.put = lambda batch: by.append(threading.current_thread().name) or [batch][0 if batch < 2 else 1]
    feed = Feed(text, 0, lambda: False, print)
    assert [feed.next(), feed.next()] == [0, 1] and set(by) == {"feed"}
    with pytest.raises(RunError, match="a batch cannot be put on the devices: list index out of range"):
        feed.next()
    assert feed.state() == {"step": 2}
    feed.close()


def test_a_batch_that_does_not_come(monkeypatch):
    """The state is that of the batches handed out, whatever the reader does later."""
    monkeypatch.setattr("hybridlm.train.feed.GRACE", 0.05)
    wait = lambda: time.sleep(0.5)
    feed = Feed(Text({1: [wait]}), 0.2, lambda: False, print)
    assert feed.next() == 0
    with pytest.raises(AgainError, match="no batch of text came for 0 s"):
        feed.next()
    assert feed.stuck
    time.sleep(0.6)
    assert feed.state() == {"step": 1}
    feed.close()
    for act in (wait, fail):
        stopping = Feed(Text({0: [act]}), 0, lambda: True, print)
        assert stopping.next() is None and stopping.state() == {"step": 0}
        stopping.close()


def test_the_next_batch_is_read_ahead():
    """Not beyond the last one; the state is that of the batches handed out; going back leaves out what was read."""
    text = Text({})
    text.set_state = lambda state: setattr(text, "step", state["step"])
    text.skip = lambda n: setattr(text, "step", text.step + n)
    feed = Feed(text, 0, lambda: False, print)
    read = lambda n: [time.sleep(0.01) for _ in range(300) if text.step < n] and text.step
    assert feed.next() == 0 and read(2) == 2 and feed.state() == {"step": 1}
    assert feed.next() == 1 and read(3) == 3 and feed.state() == {"step": 2}
    feed.go_back({"step": 1}, 3)
    assert feed.state() == {"step": 4} and feed.next() == 4 and not feed.stuck
    assert feed.next(last=True) == 5 and feed.state() == {"step": 6}
    time.sleep(0.05)
    assert text.step == 6
    feed.close()


def worker_of(pid: int) -> int:
    """The data worker among the children of a process."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [child for thread in threads for child in thread.read_text().split()]
    found = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert found, "no data worker"
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_data_worker_is_replaced(nano, signum):
    words = ("--run.steps=3000", "--data.workers=1", "--run.watchdog=20")
    with Processes(nano, *words) as one:
        one.wait_for_step(5)
        os.kill(worker_of(one.all[0].pid), signum)
        assert one.ends(200) == [0] and clean(one.text()) and "once more with new workers" in one.text(), one.said()
    with Processes(nano, "--run.steps=3000", f"--run.dir={nano.parent}/other") as other:
        assert other.ends(200) == [0]
    assert losses(nano.parent / "run") == losses(nano.parent / "other")


@pytest.mark.slow
def test_a_signal_while_a_data_worker_stands_still(nano):
    with Processes(nano, "--run.steps=100000", "--data.workers=1") as one:
        one.wait_for_step(5)
        os.kill(worker_of(one.all[0].pid), signal.SIGSTOP)
        time.sleep(2)
        one.send(signal.SIGTERM)
        assert one.ends(30) == [143] and "stopped and saved at step" in one.text() and clean(one.text()), one.said()
    assert newest(nano.parent / "run") >= 5


def test_a_closed_pipe_saves_and_ends(nano):
    """As in `train.py ... | head -3`."""
    words = python(str(ROOT / "train.py"), "--config", str(nano), "--run.steps=100000")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=nano.parent)
    try:
        while "step 3/" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 129 and error == "", error
    finally:
        process.kill()
    saved = newest(nano.parent / "run")
    assert saved >= 3 and list(losses(nano.parent / "run")) == list(range(1, saved + 1))


def test_a_folder_that_was_deleted(nano, one_device, monkeypatch, capsys):
    """Noticed at the next record or save."""
    add = report.Reports.add

    def add_and_delete(self, step, metrics):
        if step == 7:
            shutil.rmtree(nano.parent / "run")
        add(self, step, metrics)

    monkeypatch.setattr(report.Reports, "add", add_and_delete)
    assert train_main(["--config", str(nano)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "was deleted while the run wrote" in error
    assert not (nano.parent / "run" / "metrics.jsonl").exists()
