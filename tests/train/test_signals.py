# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP sent to a real process."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridlm.train.checkpoint import finished_steps
from hybridlm.train.run_folder import read_metrics
from hybridlm.train.stop import ECHO_SECONDS
from tests.starting import python

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start_python():
    """Starts Python with the words given, in a process of its own; ended with the test."""
    processes = []

    def popen(*words, cwd=ROOT):
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            python(*words), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
        )
        processes.append(process)
        return process

    yield popen
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def start(start_python, mini):
    """Starts `train.py` on the mini config."""
    words = (str(ROOT / "train.py"), "--config", str(mini), "--run.log_every=1")
    return lambda *overrides: start_python(*words, *overrides, cwd=mini.parent)


def read_until(process, words, seconds=120):
    """The output up to the line that holds the words."""
    lines, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        line = process.stdout.readline()
        lines.append(line)
        if words in line:
            return lines
        if not line:
            break
    raise AssertionError(f"no {words!r} in:\n{''.join(lines)}")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_resume(mini, start, signum, code):
    """The line is what was typed, to the word: typed again, it goes on to the same length."""
    typed = ["--run.steps=100000", "--run.eval_every=-1", "--run.save_every=0", "--run.sample_prompt=it's a"]
    process = start(*typed)
    read_until(process, "step 5/")
    process.send_signal(signum)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert "finishing this step, then saving" in output and "Traceback" not in output
    run = mini.parent / "run"
    saved = finished_steps(run / "checkpoints")
    assert len(saved) == 1 and saved[0] >= 5
    steps = [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, saved[0] + 1))
    assert f"stopped and saved at step {saved[0]} of 100000; to resume: " in output
    command, *words = shlex.split(output.rpartition("; to resume: ")[2])
    assert words == [str(ROOT / "train.py"), "--config", str(mini), "--run.log_every=1", *typed]
    assert (mini.parent / command).resolve() == Path(sys.executable).resolve() or command == "python"


def test_an_ignored_hangup_stays_ignored(start_python):
    """As under nohup; Ctrl-C works there."""
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + LONG_STEP
    process = start_python("-c", code)
    read_until(process, "ready")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    read_until(process, "finishing this step, then saving")
    assert process.poll() is None


LONG_STEP = """
import time
from hybridlm.train.stop import StopRequest
with StopRequest() as stop:
    stop.arm()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_leaves_at_once_but_an_echo_does_not(start_python):
    process = start_python("-c", LONG_STEP)
    read_until(process, "ready")
    process.send_signal(signal.SIGINT)
    read_until(process, "finishing this step, then saving")
    process.send_signal(signal.SIGINT)  # as `timeout -s INT` sends it, to the process and to its group
    time.sleep(ECHO_SECONDS + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=20)[0]
    assert process.returncode == 143 and "stopped at once, without saving" in output


@pytest.mark.slow
def test_a_signal_before_the_first_step(mini, start):
    process = start()
    read_until(process, "mini: ")  # before it compiles
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "before the first step" in output and "Traceback" not in output
    process = start()
    assert "done: 20 steps" in process.communicate(timeout=120)[0] and process.returncode == 0
