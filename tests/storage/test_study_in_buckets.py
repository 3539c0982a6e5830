# SPDX-License-Identifier: Apache-2.0
"""Runs in a bucket are listed, compared and reported like those of folders."""

import json
import time

import pytest

from hybridlm import storage
from hybridlm.cli import main
from hybridlm.study.reading import read_run
from tests.storage.conftest import upload
from tests.study.folders import write_run

pytestmark = pytest.mark.buckets


def test_runs_of_a_bucket(bucket, tmp_path, capsys):
    """Listed, compared and reported like those of folders."""
    for name in ("a", "b"):
        run = write_run(tmp_path / name, steps=())
        (run / "checkpoints" / "20").mkdir(parents=True)
        (run / "checkpoints" / "20" / "manifest.json").write_text("{}")
        upload(run, f"{bucket}/runs/group/{name}")
    (tmp_path / "other.txt").write_text("x")
    upload(tmp_path / "b" / "checkpoints", f"{bucket}/runs/foreign/inner")
    assert main(["runs", f"{bucket}/runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["a", "complete", "20/20"], ["b", "complete", "20/20"]]
    assert lines[3:] == ["foreign: no run: there is inner"]
    assert main(["report", f"{bucket}/runs/group/a"]) == 0
    assert main(["compare", f"{bucket}/runs/group", "--out", f"{bucket}/page.html"]) == 0
    assert "2 runs: " in capsys.readouterr().out
    assert main(["runs", f"{bucket}/nowhere"]) == 2


def test_a_lease_says_whether_a_run_is_running(bucket, tmp_path):
    """Renewed lately it does, left behind it does not."""
    upload(write_run(tmp_path / "run", steps=()), f"{bucket}/run")
    run, lock = storage.as_path(f"{bucket}/run"), storage.as_path(f"{bucket}/run/lock")
    for age, word in ((5, "running"), (100, "complete"), (10_000, "complete")):
        storage.write_text(
            lock, json.dumps({"owner": "process 1 on there", "process": None, "time": time.time() - age})
        )
        assert read_run(run).state.word == word
    storage.write_text(lock, "no json")
    assert read_run(run).state.word == "complete"
