# SPDX-License-Identifier: Apache-2.0
"""A run of several processes in a bucket, its data too: told to stop, with one lost, gone on with."""

import signal
import time

import pytest

from hybridlm import storage
from hybridlm.cli import train_main
from hybridlm.train.metrics_log import read_metrics
from hybridlm.train.records import finished_steps
from tests.faults.runs import Processes, losses, write_config
from tests.storage.conftest import upload

pytestmark = [pytest.mark.buckets, pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_hosts_come_and_go(bucket, tmp_path):
    """Two hosts, of which one is told to stop; three, of which one is killed; then two to the end."""
    folder = tmp_path / "run"
    folder.mkdir()
    config, far = write_config(folder), storage.as_path(f"{bucket}/runs/a")
    upload(folder, f"{bucket}/texts")
    words = [f"--run.dir={far}", f"--data.path={bucket}/texts/train-*.txt", f"--data.cache_dir={bucket}/cache"]
    words += [f"--data.val_path={bucket}/texts/val.txt", "--run.save_every=5", "--run.sample_tokens=0"]
    with Processes(config, *words, "--run.steps=100000", count=2) as two:
        two.wait_for_step(3)
        two.send(signal.SIGTERM, 1)
        assert two.ends(90) == [143, 143], two.said()
    saved = finished_steps(far / "checkpoints")[-1]
    with Processes(config, *words, "--run.steps=100000", count=3) as three:
        three.wait_for(f"from the checkpoint of step {saved}")
        until = time.monotonic() + 90
        while finished_steps(far / "checkpoints")[-1] == saved:
            assert time.monotonic() < until, three.said()
            time.sleep(0.2)
        three.send(signal.SIGKILL, 2)
        codes = three.ends(90)
        assert codes == [75, 75, -signal.SIGKILL] and "to resume" in three.text(), three.said()
    steps = finished_steps(far / "checkpoints")
    with Processes(config, *words, f"--run.steps={steps[-1] + 6}", count=2) as two:
        assert two.ends(120) == [0, 0], two.said()
        assert f"from the checkpoint of step {steps[-1]}" in two.text()
    assert train_main(["--config", str(config), f"--run.steps={steps[-1] + 6}", "--run.sample_tokens=0"]) == 0
    found = {r["step"]: r["loss"] for r in read_metrics(far / "metrics") if r["kind"] == "train"}
    assert found == pytest.approx(losses(folder / "run"), rel=1e-4)
    assert not storage.exists(far / "lock")
