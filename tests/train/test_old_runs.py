# SPDX-License-Identifier: Apache-2.0
"""Runs that earlier code stored go on, from the config as it was written then, with the records of that code.

`tests/fixtures/make_run.py` says what the fixtures are and makes them.
"""

import json
import shutil
from pathlib import Path

import pytest

from hybridlm.cli import main, train_main
from hybridlm.train.checkpoint import finished_steps
from hybridlm.train.run_folder import read_metrics

RUNS = Path(__file__).resolve().parents[1] / "fixtures" / "runs"
NAMES = sorted(file.parent.name for file in RUNS.glob("*/config.py"))
LOSSES = {"loss": 1e-5, "bits_per_byte": 1e-5}
"""Relative differences that other machines may make; of other numbers 1e-4."""


@pytest.fixture(params=[n if n == "hybrid" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def old_run(request, tmp_path, monkeypatch, one_device):
    """Name of a stored run that lies in the working folder with its config and texts."""
    shutil.copytree(RUNS / request.param, tmp_path, dirs_exist_ok=True)
    shutil.copytree(RUNS / "texts", tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    return request.param


def test_goes_on_with_the_records_of_before(old_run, capsys):
    assert main(["generate", "--run", "run", "--prompt", "ab", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("ab")
    kept = read_metrics(Path("run/metrics.jsonl"))
    assert train_main(["--config", "config.py"]) == 0
    assert "going on from the checkpoint of step 6" in capsys.readouterr().out
    assert finished_steps(Path("run/checkpoints")) == [6, 12]
    records = read_metrics(Path("run/metrics.jsonl"))
    assert records[: len(kept)] == kept
    added = [record for record in records[len(kept) :] if record["kind"] in ("train", "val")]
    expected = json.loads(Path("expected.json").read_text())
    assert [(r["kind"], r["step"]) for r in added] == [(r["kind"], r["step"]) for r in expected]
    for now, then in zip(added, expected, strict=True):
        for name, value in then.items() - {("kind", then["kind"])}:
            assert now[name] == pytest.approx(value, rel=LOSSES.get(name, 1e-4)), (name, then["step"])
