# SPDX-License-Identifier: Apache-2.0
"""Real `train.py` processes whose data spoil steps: they go back, leave it out, and end as the run that was told to."""

import json
import signal

import pytest

from hybridlm.config.find import load_config
from hybridlm.train.metrics_log import read_metrics
from tests.faults.poison import marks, poisoned_config
from tests.faults.runs import Processes, clean

WORDS = ("--run.save_every=4", "--run.steps=16", "--optim.max_skipped=3")
BAD = range(6, 10)
"""Of steps 7 to 10; the third of them in a row is that of step 9, and the good checkpoint that of step 4."""


def numbers(run):
    """Loss and norms of each step, by step, to the bit."""
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
    return {r["step"]: (r["loss"], r["grad_norm"], r["update_norm"], r["skipped"]) for r in records}


def entries(run, step):
    record = json.loads((run / "checkpoints" / str(step) / "loop" / "metadata").read_text())
    return [(entry["step"], entry["skipped"]) for entry in record["data"]["entries"]]


def ends_well(config, *words, count=1):
    with Processes(config, *WORDS, *words, count=count) as processes:
        assert processes.ends(200) == [0] * count and clean(processes.said()), processes.said()
        return processes.text()


def check(nano, count=1):
    """Batch 9, the last bad one, is read after going back: it is skipped as one step is."""
    poison = f"poison(*{marks(load_config(str(nano), []), BAD)})"
    bad, told = poisoned_config(nano, "bad", poison), poisoned_config(nano, "told", poison, "tell(4, 5)")
    words = ["--data.workers=1"] if count > 1 else []
    run, expected = (nano.parent / name for name in ("run", "expected"))
    ends_well(told, f"--run.dir={expected}", count=count)
    with Processes(bad, *WORDS, *words, count=count) as killed:
        killed.wait_for("back to the checkpoint of step 4, without the next 5 batches (1 of 3 times)")
        killed.send(signal.SIGKILL)
        killed.ends()
    said = ends_well(bad, *words, count=count)
    assert "going on from the checkpoint of step 4" in said or "going on from the checkpoint of step 8" in said
    assert "; times gone back: 1, batches left out: 5, steps skipped: 1" in said
    assert numbers(run) == numbers(expected) and list(numbers(run)) == list(range(1, 17))
    assert numbers(run)[16][3] == 1 and entries(run, 16) == entries(expected, 16) == [(0, 0), (4, 5)]


@pytest.mark.slow
def test_killed_as_it_has_gone_back(nano):
    check(nano)


@pytest.mark.slow
def test_two_processes(nano):
    check(nano, count=2)
