# SPDX-License-Identifier: Apache-2.0
"""Runs whose data changes: it is said, recorded, and what was trained on from which step on stays so."""

import json
import shutil

import pytest

from hybridlm.cli import train_main
from hybridlm.train.run_folder import read_metrics

pytestmark = pytest.mark.usefixtures("one_device")
QUIET = ["--run.eval_every=-1", "--run.sample_tokens=0", "--run.log_every=1", "--run.save_every=1", "--run.keep=9"]


def train(mini, *words):
    assert train_main(["--config", str(mini), *QUIET, *words]) == 0


def losses(run):
    return {r["step"]: (r["loss"], r["tokens"]) for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"}


def test_another_mixture_on_resume_is_recorded_and_exact(mini, capsys):
    """A run goes on with a mixture, is stopped, and goes on again: as the one that was not stopped."""
    folder = mini.parent
    train(mini, "--run.steps=2")
    shutil.copytree(folder / "run", folder / "other")
    mixture = [f"--data.path={folder}/train-0.txt", f"{folder}/train-1*.txt", "--data.weights", "1", "3"]
    train(mini, *mixture, "--run.steps=5")
    out = capsys.readouterr().out
    assert "other batches from step 2 on: data " in out
    (event,) = [r for r in read_metrics(folder / "run" / "metrics.jsonl") if r["kind"] == "data"]
    assert event["step"] == 2 and "x 3" in event["changed"]
    other = f"--run.dir={folder}/other"
    train(mini, other, *mixture, "--run.steps=4")
    capsys.readouterr()
    train(mini, other, *mixture, "--run.steps=5", "--data.workers=1")
    assert "other batches" not in capsys.readouterr().out
    assert losses(folder / "run") == losses(folder / "other") and len(losses(folder / "run")) == 5
    record = json.loads((folder / "run" / "checkpoints" / "5" / "loop" / "metadata").read_text())
    assert [entry["step"] for entry in record["data"]["entries"]] == [0, 2]


@pytest.mark.slow
def test_shards_train_as_their_text_does(mini, capsys):
    from hybridlm.cli import main

    folder = mini.parent
    words = ["--val", f"{folder}/val-*.txt", "--out", f"{folder}/shards", "--workers", "1"]
    assert main(["tokenize", f"{folder}/train-*.txt", *words]) == 0
    train(mini, "--run.steps=3")
    shards = [f"--data.path={folder}/shards", f"--data.val_path={folder}/shards", f"--run.dir={folder}/of-shards"]
    train(mini, *shards, "--run.steps=3")
    assert losses(folder / "run") == losses(folder / "of-shards")
    (record,) = [r for r in read_metrics(folder / "run" / "metrics.jsonl") if r["kind"] == "train" and r["step"] == 3]
    assert 0.0 <= record["data_wait"] <= 1.0
