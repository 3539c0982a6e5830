# SPDX-License-Identifier: Apache-2.0
"""Two processes that share the parameters, through the real command: the same run as one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hybridlm.train.run_folder import read_metrics
from tests.starting import python

ROOT = Path(__file__).resolve().parents[2]


def run_cluster(mini, *overrides):
    """Output of the first of two processes on one machine; both have to succeed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }  # fmt: skip
    words = python(str(ROOT / "train.py"), "--config", str(mini), "--mesh.fsdp=2", *overrides)
    processes = [
        subprocess.Popen(
            words, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True, cwd=mini.parent
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


@pytest.mark.slow
def test_two_processes_equal_one(mini):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    one = [sys.executable, str(ROOT / "train.py"), "--config", str(mini), f"--run.dir={mini.parent}/one"]
    subprocess.run(one, check=True, env=env, cwd=mini.parent, timeout=400)
    first, second = run_cluster(mini, "--run.steps=12")
    assert "done: 12 steps" in first and "step" not in second  # one of them speaks
    first, _ = run_cluster(mini)
    assert "going on from the checkpoint of step 12" in first
    expected, found = (read_metrics(mini.parent / name / "metrics.jsonl") for name in ("one", "run"))
    expected = {(r["kind"], r["step"]): r.get("loss") for r in expected if r["kind"] in ("train", "val")}
    found = {(r["kind"], r["step"]): r.get("loss") for r in found if r["kind"] in ("train", "val")}
    assert found == pytest.approx(expected | {("val", 12): found[("val", 12)]}, rel=1e-4)
