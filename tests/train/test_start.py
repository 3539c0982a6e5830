# SPDX-License-Identifier: Apache-2.0
"""What a start compiles, and that the next one finds its step without a trace."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from hybridlm.cli import train_main
from hybridlm.train import kept_step
from hybridlm.train.run_folder import read_metrics
from hybridlm.train.xla import OF_PROCESS, tell_process
from tests.tolerances import check_close

ROOT = Path(__file__).resolve().parents[2]

WORDS = ("--run.eval_every=-1", "--run.save_every=-1", "--run.sample_tokens=0")

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def events():
    """(event, function) of each trace and each compilation, as they come."""
    seen = []

    def note(event, duration, **about):
        if event.endswith(("jaxpr_trace_duration", "backend_compile_duration")):
            seen.append((event.split("/")[-1].removesuffix("_duration"), about["fun_name"]))

    monitoring.register_event_duration_secs_listener(note)
    yield seen
    monitoring.unregister_event_duration_listener(note)


def test_a_start_compiles_two_programs(mini, events):
    """One draws the state, one takes steps; an operation on arrays beside them would be a program of its own."""
    jax.clear_caches()  # of other tests: what they have compiled is no event
    assert train_main(["--config", str(mini), "--run.steps=2", *WORDS]) == 0
    compiled = [function for event, function in events if event == "backend_compile"]
    assert sorted(compiled) == ["jit(init)", "jit(train_step)"]
    text = jax.jit(lambda x: jnp.sin(x)).lower(1.0).as_text(debug_info=True)
    assert "test_start.py" in text and "callsite" not in text  # of the source, the innermost line alone


@pytest.mark.slow
def test_the_next_start_traces_no_step(mini, events, tmp_path, monkeypatch):
    """By the command line, from run to run; the losses are the same."""
    monkeypatch.delenv("HYBRIDLM_KEEP_STEPS")
    monkeypatch.setattr(kept_step, "PLATFORMS", ("cpu",))
    before, runs, losses = jax.config.jax_compilation_cache_dir, [tmp_path / "first", tmp_path / "second"], []
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    compilation_cache.reset_cache()  # so that the new folder is looked at
    try:
        for run in runs:
            jax.clear_caches()
            events.clear()
            assert (
                train_main(["--config", str(mini), "--run.steps=3", "--run.log_every=1", f"--run.dir={run}", *WORDS])
                == 0
            )
            assert (("jaxpr_trace", "train_step") in events) == (run == runs[0])
            losses.append([r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"])
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert len(list((tmp_path / "cache" / "steps").iterdir())) == 1
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("said", ["", "--xla_dump_to=folder"])
def test_what_xla_is_told_for_the_process_is_added(said, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", said)
    tell_process()
    tell_process()
    added = [f"{flag}={value}" for flag, value in OF_PROCESS.items()]
    assert os.environ["XLA_FLAGS"].split() == [*said.split(), *added]


def test_what_the_user_says_of_backends_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", said := "--xla_backend_extra_options=xla_cpu_optimize_for_size")
    tell_process()
    assert os.environ["XLA_FLAGS"] == said


@pytest.mark.slow
def test_programs_compiled_in_less_time_compute_the_same(mini):
    """As it ships beside XLA's own way: losses, norms of gradients and of updates of a process each."""
    found = []
    for name, flags in (("shipped", ""), ("plain", "--xla_backend_optimization_level=3")):
        words = [f"--run.dir={mini.parent}/{name}", "--run.steps=4", "--run.log_every=1", *WORDS]
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(mini), *words]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "0"}
        subprocess.run(command, check=True, env=environment, cwd=mini.parent, timeout=400)
        found.append([r for r in read_metrics(mini.parent / name / "metrics.jsonl") if r["kind"] == "train"])
    for key in ("loss", "grad_norm", "update_norm"):
        shipped, plain = ([record[key] for record in records] for records in found)
        check_close(shipped, plain, dtype="float32", what=key)
