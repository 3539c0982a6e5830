# SPDX-License-Identifier: Apache-2.0
"""Worker processes are bounded, are replaced when they die or hang, and end with their parent at any moment."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hybridlm.data import make_loader, open_corpus
from hybridlm.data.guard import WORKER_NAME
from hybridlm.errors import ConfigError
from tests.data.support import check_equal, take

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (dict(workers=500), r"data.workers \(500\) must be 0..64 processes of each host"),
        (dict(workers=-1), r"data.workers \(-1\) must be 0..64"),
        (dict(prefetch=10**20), r"data.prefetch \(100000000000000000000\) must be 1..1024 batches"),
        (dict(prefetch=0), r"data.prefetch \(0\) must be 1..1024"),
        (dict(weights=(1.0, 2.0)), r"data.weights has 2 numbers for the 1 patterns of data.path"),
        (dict(weights=(-1.0,)), r"data.weights \(-1.0\) must be a number from 0 on"),
        (dict(weights=(0.0,)), r"data.weights \(0.0,\) must be positive"),
        (dict(path=("a", "b"), epochs=(1.0, 2.0)), "data.epochs counts passes over each pattern"),
    ],
)
def test_limits_are_one_line(config, fields, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        config(**fields)
    assert "\n" not in str(caught.value)


def workers():
    return [p for p in multiprocessing.active_children() if p.name.startswith(WORKER_NAME)]


def test_a_worker_that_dies_is_replaced_and_one_that_hangs_holds_up_no_end(config):
    corpus = open_corpus(config())
    whole = take(make_loader(config(), seed=2, corpus=corpus), 16)
    with make_loader(config(workers=1, prefetch=1), seed=2, corpus=corpus) as loader:
        got = [next(loader) for _ in range(3)]
        (worker,) = workers()
        os.kill(worker.pid, signal.SIGKILL)
        while len(got) < 16:
            try:
                got.append(next(loader))
            except RuntimeError as error:
                assert "Worker process was terminated" in str(error) and len(got) == loader.step
        check_equal(got, whole)
        (worker,) = workers()
        os.kill(worker.pid, signal.SIGSTOP)
        began = time.monotonic()
    assert time.monotonic() - began < 15 and not worker.is_alive() and not workers()


SCRIPT = """
import sys
from hybridlm.data import make_loader
from hybridlm.data.config import DataConfig
if __name__ == "__main__":
    config = DataConfig(path=(sys.argv[1],), seq_len=64, batch_size=4, cache_dir=sys.argv[2], workers=int(sys.argv[3]))
    loader = make_loader(config)
    print("ready", flush=True)
    while True:
        next(loader)
"""


def killed_after(config, tmp_path, n_workers, moments):
    """Kills a trainer so many seconds after it began to start its workers; how long those outlived it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    outlived = []
    for seconds in moments:
        process = subprocess.Popen(
            [sys.executable, str(script), config().path[0], config().cache_dir, str(n_workers)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(seconds)
            process.kill()
            began = time.monotonic()
            process.stdout.read()  # until the last process that holds the pipe has ended
            outlived.append(time.monotonic() - began)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return outlived


@pytest.mark.slow
def test_workers_end_with_their_parent_while_they_start(config, tmp_path):
    open_corpus(config())
    assert max(killed_after(config, tmp_path, 6, [0.15, 0.6])) < 15


@pytest.mark.slow
def test_workers_end_with_their_parent_at_any_moment(config, tmp_path):
    open_corpus(config())
    moments = np.random.default_rng(0).uniform(0.0, 8.0, 12)
    assert max(killed_after(config, tmp_path, 24, moments)) < 30
