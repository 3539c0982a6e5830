# SPDX-License-Identifier: Apache-2.0
"""Runs that live on: changed on the way, gone back, stopped in the start-up, never saved, begun from another run."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybridlm.cli import main, train_main
from hybridlm.optim import Cosine, LinearDecay, OptimConfig, Wsd
from hybridlm.optim.schedule import make_schedule, schedule_lengths
from hybridlm.sharding import make_mesh
from hybridlm.train import init_run, loop
from hybridlm.train.checkpoint import Checkpoints, finished_steps
from hybridlm.train.metrics_log import read_metrics
from hybridlm.train.run_folder import stored_config
from hybridlm.train.step import make_program
from tests.train.conftest import make_batch, small_config

pytestmark = pytest.mark.usefixtures("one_device")
QUIET = ("--run.eval_every=-1", "--run.sample_tokens=0")


def train(config, *words):
    return train_main(["--config", str(config), *QUIET, *words])


def of_kind(run, kind):
    return [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == kind]


@pytest.mark.slow
def test_a_run_that_is_changed_gone_back_and_lost(mini, capsys):
    """One run through all that may happen to it; each start is in its records."""
    run = mini.parent / "run"
    assert train(mini, "--run.steps=6", "--run.save_every=2", "--run.keep=5") == 0
    (start,) = of_kind(run, "start")
    assert start["step"] == 0 and "--config" in start["command"] and start["versions"]["jax"] == jax.__version__
    assert start["devices"].startswith("8 x ") and start["host"] and "commit" in start
    assert [record["step"] for record in of_kind(run, "save")] == [2, 4, 6]

    capsys.readouterr()
    words = ["--run.steps=8", "--run.save_every=2", "--run.keep=5", "--run.from_step=2", "--optim.lr=0.005"]
    assert train(mini, *words) == 0
    said = capsys.readouterr().out
    assert "going on from the checkpoint of step 2" in said and "checkpoints of step 4, 6 are now in" in said
    assert "changed since step 2: " in said and "optim.lr 0.01 -> 0.005" in said
    assert finished_steps(run / "checkpoints") == [2, 4, 6, 8]
    (changed,) = of_kind(run, "config")
    assert changed["step"] == 2 and changed["changed"]["optim.lr"] == [0.01, 0.005]
    assert of_kind(run, "train")[-1]["lr"] == pytest.approx(0.005)
    history = [json.loads(line) for line in (run / "config_history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["config"]["optim"]["lr"]) for line in history] == [(0, 0.01), (2, 0.005)]
    superseded = [json.loads(line) for line in (run / "superseded" / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in superseded if line["kind"] == "train"} == {3, 6}

    assert train(mini, *words) == 0 and "is complete: 8 steps" in capsys.readouterr().out  # the same command again
    (run / "config.json").unlink()
    assert train(mini, *words, "--run.steps=9") == 0
    assert "going on from the checkpoint of step 8" in capsys.readouterr().out and (run / "config.json").exists()
    assert [record["step"] for record in of_kind(run, "start")] == [0, 2, 8]
    assert main(["generate", "--run", str(run), "--prompt", "a", "--max-new-tokens", "2"]) == 0


def test_a_stop_in_the_start_leaves_what_can_be_resumed(mini, capsys, monkeypatch):
    """Wherever it comes: the config is the first file, and the next start is a start."""
    run = mini.parent / "run"
    words = ["--run.steps=2"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    for name in ("open_together", "make_program", "Meter", "Checkpoints", "Reports"):
        with monkeypatch.context() as patch:
            patch.setattr(loop, name, stop)
            assert train(mini, *words) == 130
        assert (run / "config.json").exists(), name
    assert (run / "checkpoints").is_dir()
    assert train(mini, *words) == 0 and finished_steps(run / "checkpoints") == [2]


def test_a_run_that_never_saves(mini, capsys, monkeypatch):
    run = mini.parent / "run"
    assert train(mini, "--run.steps=3", "--run.save_every=-1") == 0
    assert finished_steps(run / "checkpoints") == [] and len(of_kind(run, "train")) == 1
    capsys.readouterr()
    turns = iter((False, True))
    monkeypatch.setattr(loop.StopRequest, "agreed", lambda self: setattr(self, "signum", 2) or next(turns))
    (run / "metrics.jsonl").unlink()
    assert train(mini, "--run.steps=3", "--run.save_every=-1") == 130
    assert "stopped, unsaved (run.save_every=-1), at step 2 of 3" in capsys.readouterr().out
    assert finished_steps(run / "checkpoints") == []


def test_a_run_from_another_runs_parameters(mini, capsys, monkeypatch):
    run, new = mini.parent / "run", mini.parent / "new"
    assert train(mini, "--run.steps=4", "--run.save_every=2") == 0
    began = []
    params_of_run = init_run.params_of_run

    def seen(config, like):
        params, step = params_of_run(config, like)
        began.append((jax.device_get(params), step))
        return params, step

    monkeypatch.setattr(loop, "params_of_run", seen)
    other = ["--data.seq_len=16", "--data.batch_size=4", "--optim.schedule=cosine"]
    other += [
        "--model.blocks.*.rope.scaling=YaRN",
        "--model.blocks.*.rope.scaling.factor=8",
        "--model.blocks.*.scale=1",
    ]
    capsys.readouterr()
    assert train(mini, f"--init.run={run}@2", f"--run.dir={new}", "--run.steps=2", *other) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters of step 2 of")]
    assert "optimizer state, schedule and order of text begin anew; " in told
    assert "data.seq_len 32 -> 16" in told and "model.blocks.*.scale None -> 1.0" in told
    assert "model.blocks.*.rope.scaling None -> YaRN(factor=8.0, " in told and "batch_size" not in told
    assert of_kind(new, "train")[-1]["lr"] < 0.01 and stored_config(new).model.blocks["*"].rope.scaling.factor == 8
    checkpoints = Checkpoints(run / "checkpoints", keep=1, read_only=True)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), began[0][0])
    chex.assert_trees_all_equal(began[0][0], jax.device_get(checkpoints.restore(2, {"params": like})[0]["params"]))
    assert began[0][1] == 2 and of_kind(new, "start")[0]["init"] == {"run": f"{run}@2", "step": 2}
    capsys.readouterr()
    refusals = {
        f"--init.run={run}@3": "step 3 has no checkpoint, only [2, 4]",
        f"--init.run={mini.parent}/none": "has no checkpoint",
        f"--init.run={mini.parent}/third": "is run.dir itself",
    }
    for word, words in refusals.items():
        assert train(mini, word, f"--run.dir={mini.parent}/third") == 2
        assert words in capsys.readouterr().err
    assert train(mini, f"--init.run={run}", "--model.d_model=32", f"--run.dir={mini.parent}/fourth") == 2
    assert "is of another model: model.d_model (16 there, 32 now)" in capsys.readouterr().err


@pytest.mark.slow
def test_longer_rows_split_over_devices_are_those_of_one(mini, monkeypatch):
    """A run goes on from another one's parameters at longer rows with YaRN: tokens over four devices, rows over two."""
    run = mini.parent / "run"
    assert train(mini, "--run.steps=2") == 0
    words = [f"--init.run={run}", "--run.steps=3", "--run.log_every=1", "--data.seq_len=128", "--data.batch_size=4"]
    words += ["--model.blocks.*.rope.scaling=YaRN", "--model.blocks.*.rope.scaling.original_max_positions=32"]
    assert train(mini, *words, f"--run.dir={mini.parent}/one") == 0
    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:8]))
    assert train(mini, *words, "--mesh.context=4", "--mesh.data=2", f"--run.dir={mini.parent}/eight") == 0
    one, eight = ([r["loss"] for r in of_kind(mini.parent / name, "train")] for name in ("one", "eight"))
    assert len(one) == 3 and eight == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    "schedule", ["Cosine", *(pytest.param(s, marks=pytest.mark.slow) for s in ("LinearDecay", "Wsd", "Constant"))]
)
def test_a_longer_run_is_the_same_program(schedule):
    """What is compiled for 20 steps, and kept, serves for 4,000."""
    texts, rates = [], []
    for steps in (20, 4000):
        words = f"--optim.schedule={schedule}", f"--run.steps={steps}", "--optim.warmup_steps=4", "--model.pattern=-"
        config = small_config(*words)
        program = make_program(config, make_mesh(config.mesh, jax.devices()[:1]))
        texts.append(program.train_step.lower(program.state_like, make_batch(config, 0)).as_text())
        rates.append(program.train_step.lengths.tolist())
    assert texts[0] == texts[1]
    assert schedule == "Constant" or rates[0] != rates[1]


def test_a_schedule_of_a_traced_length_is_that_of_the_number():
    """As it was with optax's own of the number: to the bit as XLA compiles for users, within a millionth here."""
    counts = jnp.arange(0, 900, dtype=jnp.int32)
    for shape in (Cosine(0.1), LinearDecay(0.0), Wsd(0.2, 0.02)):
        for steps in (21, 400, 799, 30):
            optim = OptimConfig(lr=3e-3, schedule=shape, warmup_steps=20)
            left = max(steps - 21, 1)
            rise = optax.linear_schedule(0.0, 3e-3, 20)
            if isinstance(shape, Cosine):
                after, bounds = [optax.cosine_decay_schedule(3e-3, left, alpha=0.1)], []
            elif isinstance(shape, LinearDecay):
                after, bounds = [optax.linear_schedule(3e-3, 0.0, left)], []
            else:
                decay = min(round(0.2 * steps), max(steps - 21, 0))
                stable = optax.constant_schedule(3e-3)
                fall = optax.linear_schedule(3e-3, 0.02 * 3e-3, decay) if decay else stable
                after, bounds = [stable, fall], [steps - 1 - decay]
            before = jax.jit(optax.join_schedules([rise, *after], [20, *bounds]))(counts)
            now = jax.jit(lambda c, n, optim=optim, steps=steps: make_schedule(optim, steps, 3e-3, n)(c))
            found = now(counts, np.array(schedule_lengths(optim, steps), np.int32))
            np.testing.assert_allclose(found[:steps], before[:steps], rtol=1e-6)
