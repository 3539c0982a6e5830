# SPDX-License-Identifier: Apache-2.0
"""Whole runs through the command line: exact resume, what a second start does, what a run leaves behind."""

import fcntl
import gc
import json
import math
import os

import chex
import jax
import pytest

from hybridlm.cli import main, train_main
from hybridlm.model.flops import train_flops
from hybridlm.page import text as as_text
from hybridlm.study.reading import read_run
from hybridlm.train import loop, report
from hybridlm.train import step as step_module
from hybridlm.train.checkpoint import finished_steps
from hybridlm.train.run_folder import read_metrics

TIMES = {"tokens_per_second", "seconds_left", "seconds", "mfu", "data_wait"}

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def states(monkeypatch):
    """The train state and data position that each run saved at its step 20."""
    seen = []
    save = loop.Checkpoints.save

    def saving(self, step, state, config, record):
        if step == 20:
            seen.append((jax.device_get(state), record["data"]))
        save(self, step, state, config, record)

    monkeypatch.setattr(loop.Checkpoints, "save", saving)
    return seen


@pytest.fixture
def stop_at(monkeypatch):
    """Makes a run stop after a step as if Ctrl-C had come during it."""

    now, add = [None], report.Reports.add

    def add_and_note(self, step, metrics):
        now[0] = step
        add(self, step, metrics)

    monkeypatch.setattr(report.Reports, "add", add_and_note)

    def arrange(step):
        def agreed(self):
            self.signum = 2 if step is not None and now[0] == step else None
            return self.signum is not None

        monkeypatch.setattr(loop.StopRequest, "agreed", agreed)

    return arrange


def train(config, *overrides):
    return train_main(["--config", str(config), *overrides])


def records(folder, kinds=("train", "val")):
    """The records of metrics.jsonl without what depends on the clock."""
    kept = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] in kinds]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in kept]


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_twenty_steps_equal_ten_and_ten(mini, states, stop_at, capsys, name):
    folder = mini.parent
    options = [f"--optim.name={name}", "--optim.schedule=cosine"]
    assert train(mini, *options, f"--run.dir={folder}/whole") == 0
    stop_at(10)
    assert train(mini, *options, f"--run.dir={folder}/parts") == 130
    said = capsys.readouterr().out
    assert "stopped and saved at step 10 of 20; to resume: " in said and "python train.py --config" in said
    stop_at(None)
    assert train(mini, *options, f"--run.dir={folder}/parts") == 0
    assert "going on from the checkpoint of step 10" in capsys.readouterr().out
    (whole, whole_data), (parts, parts_data) = states  # the stopped one never came to its end
    assert whole_data == parts_data and whole_data["step"] == 20
    chex.assert_trees_all_equal(whole, parts)
    assert records(folder / "whole") == records(folder / "parts")
    assert (folder / "whole" / "sample.txt").read_text() == (folder / "parts" / "sample.txt").read_text()


def test_what_a_run_leaves_and_a_second_start(mini, capsys):
    run = mini.parent / "run"
    assert train(mini, "--run.tensorboard=True") == 0
    said = capsys.readouterr().out
    assert "bits per byte (byte bigram: " in said and "hybridlm generate --run " in said and "--run.steps=40" in said
    assert finished_steps(run / "checkpoints") == [10, 15, 20]  # run.keep
    assert {r["step"] for r in records(run, ["train"])} == {3, 6, 9, 12, 15, 18, 20}
    assert [r["step"] for r in records(run, ["val"])] == [10, 20]
    assert all(math.isfinite(r["loss"]) for r in records(run))
    assert json.loads((run / "config.json").read_text())["model"]["d_model"] == 16
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (run / "sample.txt").read_text().startswith("a") and list((run / "tensorboard").iterdir())

    before = {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.name != "lock"}
    assert train(mini) == 0
    said = capsys.readouterr().out
    assert "is complete: 20 steps" in said and "--run.steps=40" in said
    assert before == {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.name != "lock"}

    assert train(mini, "--run.steps=22") == 0
    assert "going on from the checkpoint of step 20" in capsys.readouterr().out
    steps = [(r["kind"], r["step"]) for r in records(run)]
    assert len(steps) == len(set(steps)) and steps[-2:] == [("train", 22), ("val", 22)]

    assert main(["generate", "--run", str(run), "--prompt", "abc", "--max-new-tokens", "5", "--step", "15"]) == 0
    assert capsys.readouterr().out.startswith("abc")
    texts = []
    for seed in ("1", "1"):
        assert main(["generate", "--run", str(run), "--prompt", "ab", "--max-new-tokens", "8", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["generate", "--run", str(run), "--step", "3"]) == 2
    assert "step (3) has no checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_records_after_the_restored_step_are_dropped(mini, stop_at, capsys):
    """And how each start ended is in the records and on the run's page, which is as new as they are."""
    run, page = mini.parent / "run", mini.parent / "run" / "report.html"
    stop_at(8)
    assert train(mini, "--run.report=True") == 130
    assert read_run(run).state == ("stopped", "at step 8, the newest checkpoint is of step 8")
    assert "mini: stopped" in page.read_text()
    with open(run / "metrics.jsonl", "a") as file:  # as a process killed at step 12 would have left them
        file.write(
            '{"kind": "train", "step": 9, "loss": 1.0}\n{"kind": "train", "step": 12, "loss": 1.0}\n{"kind": "tr'
        )
    stop_at(None)
    capsys.readouterr()
    assert train(mini, "--run.report=True") == 0
    assert f", {page}\n" in capsys.readouterr().out
    assert [r["step"] for r in records(run, ["train"])] == [3, 6, 9, 12, 15, 18, 20]
    assert [(r["step"], r["signal"]) for r in records(run, ["stop"])] == [(8, 2)]
    found = read_run(run)
    flops = train_flops(found.parsed.model, found.parsed.data.seq_len)
    assert found.state == ("complete", "") and [r["flops_per_token"] for r in found.of_kind("start")] == [flops] * 2
    written = page.read_text()
    assert "mini: complete" in written and "tokens a second" in written
    assert as_text((run / "sample.txt").read_bytes().decode("utf-8", "replace")) in written
    before = page.stat().st_mtime_ns
    assert train(mini, "--run.report=True") == 0 and page.stat().st_mtime_ns == before  # nothing was trained


def test_a_run_cut_off_before_its_end_is_closed(mini, capsys, monkeypatch):
    """Killed after the last save: the second start evaluates and writes the figure, and trains no step."""

    read = loop.Validation.read

    def killed(self, step, params):
        if step == 20:
            raise KeyboardInterrupt
        return read(self, step, params)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Validation, "read", killed)
        assert train(mini) == 130
    assert finished_steps(mini.parent / "run" / "checkpoints")[-1] == 20
    assert not (mini.parent / "run" / "loss.png").exists()
    capsys.readouterr()
    assert train(mini) == 0
    assert (mini.parent / "run" / "loss.png").exists() and "first step" not in capsys.readouterr().out


def test_another_config_is_refused(mini, stop_at, capsys):
    stop_at(4)
    assert train(mini) == 130
    before = {f: f.read_bytes() for f in (mini.parent / "run").rglob("*") if f.is_file() and f.name != "lock"}
    capsys.readouterr()
    assert train(mini, "--model.d_model=32", "--run.seed=5", "--optim.lr=1e-3", "--run.log_every=1") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    assert "model.d_model (16 there, 32 now), run.seed (0 there, 5 now)" in error and "--run.dir=NEW" in error
    assert "log_every" not in error and "optim.lr" not in error
    assert train(mini, "--optim.rule=Muon") == 2 and "optim.rule (AdamW" in capsys.readouterr().err
    assert before == {f: f.read_bytes() for f in before}
    stop_at(None)
    assert train(mini, "--optim.max_skipped=5", "--run.log_every=1", "--run.keep=1", "--data.prefetch=1") == 0
    assert json.loads((mini.parent / "run" / "config.json").read_text())["run"]["log_every"] == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_a_broken_checkpoint_costs_its_steps_alone(mini, states, stop_at, caplog):
    whole = mini.parent / "whole"
    assert train(mini, f"--run.dir={whole}") == 0
    stop_at(10)
    assert train(mini) == 130
    checkpoint = mini.parent / "run" / "checkpoints" / "10"
    for file in (checkpoint / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    stop_at(None)
    assert train(mini) == 0
    gc.collect()  # the failed reads, here and not in a later test
    assert "going back to step 5" in caplog.text
    chex.assert_trees_all_equal(states[0][0], states[-1][0])


def test_two_processes_in_one_folder(mini, capsys):
    run = mini.parent / "run"
    run.mkdir()
    folder = os.open(run, os.O_RDONLY)  # as a running process has it, whose lock file was deleted
    fcntl.flock(folder, fcntl.LOCK_EX)
    assert train(mini) == 1 and "is in use by another process" in capsys.readouterr().err
    assert list(run.iterdir()) == []
    os.close(folder)
    with open(run / "lock", "w") as lock:
        lock.write("process 123 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train(mini) == 1
        error = capsys.readouterr().err
        assert "is in use by process 123 on elsewhere" in error and error.count("\n") == 1
    assert train(mini, "--run.steps=3", "--run.eval_every=-1", "--run.sample_tokens=0") == 0  # a lock left by the dead


def test_a_tokenizer_larger_than_the_vocabulary(mini, capsys):
    assert train(mini, "--model.vocab_size=200") == 2
    assert "model.vocab_size (200) is smaller than the vocabulary of data.tokenizer" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_left_alone(mini, capsys):
    assert train(mini, f"--run.dir={mini.parent}") == 2
    assert "has files but no run" in capsys.readouterr().err


@pytest.mark.slow
def test_accumulation_and_mesh_may_change_on_the_way(mini, stop_at, monkeypatch):
    from hybridlm.sharding import make_mesh

    stop_at(10)
    assert train(mini) == 130
    stop_at(None)
    monkeypatch.setattr("hybridlm.train.loop.make_mesh", lambda config: make_mesh(config, jax.devices()[:4]))
    assert train(mini, "--mesh.fsdp=2", "--mesh.data=2", "--optim.accumulate=2", "--run.steps=20") == 0
    assert [r["step"] for r in records(mini.parent / "run", ["train"])] == [3, 6, 9, 12, 15, 18, 20]


def test_a_run_traces_its_step_once(mini, monkeypatch):
    """Evaluations, saves and a trace of the profiler on the way."""
    make = step_module.make_train_step
    monkeypatch.setattr(step_module, "make_train_step", lambda *a: chex.assert_max_traces(make(*a), n=1))
    words = ["--run.steps=6", "--run.eval_every=4", "--run.profile_steps", "3", "5", "--run.sample_tokens=0"]
    assert train(mini, *words, "--model.pattern=-") == 0
    assert list((mini.parent / "run" / "profile").rglob("*.xplane.pb"))
