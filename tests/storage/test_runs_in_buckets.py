# SPDX-License-Identifier: Apache-2.0
"""Whole runs whose data, cache and folder lie in a bucket: equal to the bit to those on a disk, as hard to break."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import pytest

from hybridlm import storage
from hybridlm.cli import main, train_main
from hybridlm.config.find import load_config
from hybridlm.storage.cell import Cell
from hybridlm.train import lease, loop
from hybridlm.train import step as step_module
from hybridlm.train.metrics_log import read_metrics
from hybridlm.train.records import ASIDE, finished_steps
from hybridlm.train.run_folder import stored_config
from tests.faults.poison import marks, poisoned
from tests.hf.hf_support import FOLDER
from tests.starting import python
from tests.storage.conftest import forget_clients, upload
from tests.train.conftest import CONFIG, write_texts
from tests.train.test_run import TIMES

pytestmark = [pytest.mark.buckets, pytest.mark.usefixtures("one_device")]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def mini(tmp_path):
    """Path of a config file that does all in the test's folder."""
    write_texts(tmp_path)
    file = tmp_path / "mini.py"
    file.write_text(CONFIG.format(folder=tmp_path))
    return file


def far(bucket: str, name: str = "run") -> list[str]:
    """Overrides that put the run and the token cache into the bucket."""
    return [f"--run.dir={bucket}/{name}", f"--data.cache_dir={bucket}/cache", "--run.sample_tokens=0"]


def train(config: Path, *words: str) -> int:
    return train_main(["--config", str(config), *words])


def records(path: Path) -> list[dict]:
    """What a run recorded of its steps, without what depends on the clock."""
    kept = [r for r in read_metrics(path) if r["kind"] in ("train", "val")]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in kept]


def listed(path: str) -> list[str]:
    """Names of all objects under a path."""
    base = storage.as_path(path)
    return [file.relative_to(base).as_posix() for file in storage.find(path)[1]]


@pytest.mark.parametrize("bucket", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
def test_a_run_equals_one_on_a_disk(mini, bucket, states, stop_at, capsys):
    """Train, stop, resume, generate; data and cache in the bucket. The trainer's and the user's files are all there."""
    here = mini.parent / "run"
    for file in mini.parent.glob("*.txt"):
        storage.copy(file, storage.as_path(f"{bucket}/texts/{file.name}"))
    assert train(mini) == 0
    texts = [f"--data.{name}={bucket}/texts/{split}-*.txt" for name, split in (("path", "train"), ("val_path", "val"))]
    options = [*far(bucket), *texts, "--run.sample_tokens=4", "--run.tensorboard=True"]
    stop_at(10)
    assert train(mini, *options) == 130
    assert f"--run.dir={bucket}/run" in capsys.readouterr().out
    stop_at(None)
    assert train(mini, *options) == 0
    said = capsys.readouterr().out
    assert "going on from the checkpoint of step 10" in said and f"--run {bucket}/run" in said
    (expected, position), (found, far_position) = states
    assert far_position == position
    chex.assert_trees_all_equal(found, expected)
    run = storage.as_path(f"{bucket}/run")
    assert records(run / "metrics") == records(here / "metrics.jsonl")
    assert storage.read_bytes(run / "sample.txt") == (here / "sample.txt").read_bytes()
    assert storage.read_bytes(run / "loss.png").startswith(b"\x89PNG")
    assert finished_steps(run / "checkpoints") == finished_steps(here / "checkpoints") == [10, 15, 20]
    assert stored_config(run).model == stored_config(here).model

    names = listed(f"{bucket}/run")
    metrics = [name for name in names if name.startswith("metrics/")]
    assert metrics == ["metrics/000001-after-0.jsonl", "metrics/000002-after-10.jsonl"]  # an object a start
    assert len([name for name in names if name.startswith("tensorboard/events")]) == 2
    assert {"config.json", "config_history.jsonl"} < set(names)
    assert not [name for name in names if name.startswith("lock") or name.endswith(".part") or "/.probe" in name]

    texts = []
    for path in (here, run):
        assert main(["generate", "--run", str(path), "--prompt", "ab", "--max-new-tokens", "8"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert train(mini, *options) == 0 and "is complete: 20 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_a_run_starts_from_another_and_is_traced(mini, bucket, capsys):
    """`init.run` takes the parameters of a run in a bucket; a trace of the steps lands there, and is found again."""
    assert train(mini, "--run.steps=10") == 0
    assert train(mini, *far(bucket), "--run.steps=10") == 0
    more = ["--run.steps=4", "--run.sample_tokens=0", "--optim.warmup_steps=1"]
    assert train(mini, *more, f"--init.run={mini.parent}/run@10", f"--run.dir={mini.parent}/next") == 0
    assert train(mini, *far(bucket, "next"), *more, f"--init.run={bucket}/run@10", "--run.profile_steps", "2", "3") == 0
    far_records = records(storage.as_path(f"{bucket}/next/metrics"))
    assert far_records and far_records == records(mini.parent / "next" / "metrics.jsonl")
    assert [name for name in listed(f"{bucket}/next/profile") if name.endswith(".xplane.pb")]
    capsys.readouterr()
    assert main(["profile", f"{bucket}/next"]) == 2
    assert "has no kernels of a GPU or TPU" in capsys.readouterr().err
    assert train(mini, *far(bucket), f"--init.run={bucket}/none", f"--run.dir={bucket}/other") == 2
    assert f"{bucket}/none" in capsys.readouterr().err


def test_published_there_and_back(bucket, capsys):
    """From a published checkpoint in a bucket to a run in a bucket to a published checkpoint in a bucket: no byte is
    another."""
    upload(FOLDER / "llama", f"{bucket}/published")
    assert main(["convert", "from-hf", f"{bucket}/published", f"{bucket}/run"]) == 0
    assert main(["convert", "to-hf", f"{bucket}/run", f"{bucket}/out"]) == 0
    assert f"{bucket}/out: " in capsys.readouterr().out
    weights = storage.read_bytes(storage.as_path(f"{bucket}/out/model.safetensors"))
    assert main(["convert", "from-hf", str(FOLDER / "llama"), f"{bucket}/again"]) == 0
    assert main(["convert", "to-hf", f"{bucket}/again", f"{bucket}/out2"]) == 0
    assert storage.read_bytes(storage.as_path(f"{bucket}/out2/model.safetensors")) == weights
    assert main(["convert", "to-hf", f"{bucket}/run", f"{bucket}/out"]) == 2
    assert "holds a checkpoint already" in capsys.readouterr().err
    assert main(["convert", "from-hf", f"{bucket}/published", f"{bucket}/run"]) == 2
    assert "is not empty" in capsys.readouterr().err


LATER = [pytest.param(name, marks=pytest.mark.slow) for name in ("cut", "gone", "record", "manifest")]


@pytest.mark.parametrize("damage", ["flipped", *LATER])
def test_a_broken_checkpoint_is_marked(mini, bucket, damage, capsys, caplog):
    """It stays where it is, does not count, and gives way when the run reaches its step again."""
    assert train(mini, *far(bucket), "--run.steps=10") == 0
    base = f"{bucket}/run/checkpoints/10"
    part = {"record": "loop/metadata", "manifest": "manifest.json"}.get(damage, "params/")
    name = next(name for name in listed(base) if name.startswith(part) and ("/d/" in name or part != "params/"))
    victim = storage.as_path(f"{base}/{name}")
    content = storage.read_bytes(victim)
    if damage == "gone":
        storage.remove(victim)
    else:
        half = len(content) // 2
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        storage.write_bytes(victim, content[:-1] if damage == "cut" else flipped)
    before = set(listed(base))
    assert train(mini, *far(bucket), "--run.steps=12", "--run.save_every=3") == 0
    assert "going on from the checkpoint of step 5" in capsys.readouterr().out
    assert "checkpoint of step 10 cannot be read" in caplog.text
    assert set(listed(base)) == before | {ASIDE}
    assert finished_steps(storage.as_path(f"{bucket}/run/checkpoints")) == [6, 9, 12]


@pytest.mark.slow
def test_a_marked_one_gives_way(mini, bucket, states, capsys):
    """Going back marks what comes after; the run writes there again, and ends as one that never went back."""
    assert train(mini, *far(bucket)) == 0
    assert train(mini, *far(bucket), "--run.from_step=10") == 0
    assert "going on from the checkpoint of step 10" in capsys.readouterr().out
    chex.assert_trees_all_equal(states[0], states[1])
    steps = storage.as_path(f"{bucket}/run/checkpoints")
    assert finished_steps(steps) == [10, 15, 20]
    assert not [name for name in listed(str(steps)) if name.endswith(ASIDE)]


@pytest.mark.slow
def test_a_run_moves_between_a_disk_and_a_bucket(mini, bucket, stop_at, states, capsys):
    """Copied there half-way, gone on with, copied back, gone on with: as if it had stayed; and all is verified."""
    whole = mini.parent / "whole"
    assert train(mini, f"--run.dir={whole}") == 0
    stop_at(6)
    assert train(mini) == 130
    upload(mini.parent / "run", f"{bucket}/run")
    stop_at(12)
    assert train(mini, f"--run.dir={bucket}/run") == 130
    assert "going on from the checkpoint of step 6" in capsys.readouterr().out
    back = mini.parent / "back"
    for name in listed(f"{bucket}/run"):
        (back / name).parent.mkdir(parents=True, exist_ok=True)
        storage.copy(storage.as_path(f"{bucket}/run/{name}"), back / name)
    stop_at(None)
    assert train(mini, f"--run.dir={back}") == 0
    assert "going on from the checkpoint of step 12" in capsys.readouterr().out
    chex.assert_trees_all_equal(states[1], states[0])
    assert records(back / "metrics.jsonl") == records(whole / "metrics.jsonl")
    assert not (back / "metrics").exists()  # what it held is in the file
    victim = next(f for f in sorted((back / "checkpoints" / "12" / "params" / "d").iterdir()))
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")
    assert main(["generate", "--run", str(back), "--step", "12"]) == 1
    assert "differs from its checksum" in capsys.readouterr().err


def test_a_folder_in_use(mini, bucket, monkeypatch, capsys):
    """One line while somebody renews the lease; what a killed machine left runs out."""
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    path = storage.as_path(f"{bucket}/run/lock")
    with lease.Lease(path):
        assert train(mini, *far(bucket)) == 1
    told = capsys.readouterr().err
    assert f"{bucket}/run is in use by process {os.getpid()} on " in told and "--run.dir=NEW" in told
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    cell = Cell(path)
    cell.swap(cell.read()[1], json.dumps({"owner": "process 1 on gone", "time": time.time()}).encode())
    assert train(mini, *far(bucket), "--run.steps=2") == 0
    assert "is held by process 1 on gone" in capsys.readouterr().out


def test_a_run_that_was_taken_over_ends_before_it_saves(mini, bucket, monkeypatch, capsys):
    taken = []

    def check(self):
        if not taken:
            cell = Cell(storage.as_path(f"{bucket}/run/lock"))
            taken.append(cell.swap(cell.read()[1], b'{"owner": "another"}'))
            self._renew()
        return original(self)

    original = lease.Lease.check
    monkeypatch.setattr(lease.Lease, "check", check)
    assert train(mini, *far(bucket)) == 1
    assert "was taken over by another process" in capsys.readouterr().err
    assert finished_steps(storage.as_path(f"{bucket}/run/checkpoints")) == []
    assert Cell(storage.as_path(f"{bucket}/run/lock")).read()[0] == b'{"owner": "another"}'


@pytest.mark.parametrize("what", ["bucket", "run.dir", "init.hf", "no client", "not a run", "credentials"])
def test_what_cannot_work_is_one_line_before_anything_is_compiled(mini, bucket, what, monkeypatch, capsys):
    words = far(bucket)
    match what:
        case "bucket":
            words.append("--data.path=s3://no-such-bucket/*.txt")
            told = "data.path (s3://no-such-bucket/*.txt): there is no bucket"
        case "run.dir":
            words, told = (
                [*words, "--run.dir=s3://no-such-bucket/run"],
                "run.dir (s3://no-such-bucket/run): there is no",
            )
        case "init.hf":
            words, told = [*words, "--init.hf=s3://no-such-bucket/model"], "there is no bucket s3://no-such-bucket"
        case "no client":
            words, told = [*words, "--run.dir=gs://bucket/run"], "pip install 'hybridlm[gs]'"
            monkeypatch.setitem(sys.modules, "gcsfs", None)
            forget_clients()
        case "not a run":
            storage.write_text(storage.as_path(f"{bucket}/run/notes.txt"), "mine")
            told = "has files but no run"
        case "credentials":
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name)
            for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
                monkeypatch.setenv(name, str(mini.parent / "none"))
            forget_clients()
            told = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    monkeypatch.setattr(loop, "make_program", lambda *_: pytest.fail("it went on to compile"))
    assert train(mini, *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and told in lines[0]


@pytest.mark.slow
def test_killed_runs_go_on(mini, bucket, states, s3):
    """`train.py` killed at three moments, each time started again at once: the losses of the undisturbed run."""
    assert train(mini, "--run.steps=40", "--run.save_every=5") == 0
    command = python("train.py", "--config", str(mini), *far(bucket), "--run.steps=40", "--run.save_every=5")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    steps = storage.as_path(f"{bucket}/run/checkpoints")
    for reached in (5, 15, 25):
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            until = time.monotonic() + 180
            while max(finished_steps(steps), default=0) < reached and process.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert records(storage.as_path(f"{bucket}/run/metrics")) == records(mini.parent / "run" / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_a_run_that_diverges_goes_back(mini, bucket, monkeypatch, capsys):
    """In a bucket as on a disk, and when it is stopped after that: the next start does not diverge again."""
    words = ["--optim.max_skipped=3", "--run.save_every=3", "--run.steps=13", "--run.log_every=1"]
    bad = marks(load_config(str(mini), []), (7, 8, 9))
    monkeypatch.setattr(step_module, "make_objective", poisoned(step_module.make_objective, bad))
    assert train(mini, *words, "--run.sample_tokens=0") == 0
    assert train(mini, *words, *far(bucket)) == 0
    assert "back to the checkpoint of step 6, without the next 4 batches" in capsys.readouterr().out
    assert train(mini, *words, *far(bucket), "--run.steps=15") == 0
    assert "back to" not in capsys.readouterr().out
    run = storage.as_path(f"{bucket}/run")
    expected = records(mini.parent / "run" / "metrics.jsonl")
    found = records(run / "metrics.jsonl")
    assert [r for r in found if r["step"] <= 13] == expected
    assert [r["step"] for r in found if r["kind"] == "train"] == list(range(1, 16))
