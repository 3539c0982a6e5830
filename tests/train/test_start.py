# SPDX-License-Identifier: Apache-2.0
"""What a start compiles, and that the next one finds its step without a trace."""

import jax
import jax.numpy as jnp
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from hybridlm.cli import train_main
from hybridlm.train import kept_step
from hybridlm.train.run_folder import read_metrics

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
