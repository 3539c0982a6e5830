# SPDX-License-Identifier: Apache-2.0
"""A compiled step on disk is taken where nothing that makes it has changed, and what is in doubt is compiled."""

import dataclasses
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.cli.start import kept_steps
from hybridlm.config import Config
from hybridlm.config.overrides import override
from hybridlm.errors import ConfigError
from hybridlm.layers import MLP
from hybridlm.sharding import MeshConfig, make_mesh
from hybridlm.train import kept_step as kept_steps_module
from hybridlm.train.ahead import TrainStep
from hybridlm.train.kept_step import KEPT, KeptStep, kept_step, key
from hybridlm.train.step import make_program
from tests.train.conftest import small_config

LENGTHS = np.array([3], np.int32)
CONFIG = small_config()


def run(kept: KeptStep, n_traces: int, size: int = 4, event: str | None = None) -> tuple[float, float]:
    """(state, metric) after two steps of a newly made function, which is traced so often. event: that comes then."""
    traces = []

    def step(state, batch, lengths):
        traces.append(batch.shape)
        if event is not None:
            jax.monitoring.record_event(event)
        return {"sum": state["sum"] + batch.sum() * lengths[0]}, batch.max()

    jitted, mesh = jax.jit(step, donate_argnums=0), make_mesh(MeshConfig(), jax.devices()[:1])
    train_step, state, batch = TrainStep(jitted, LENGTHS), {"sum": jnp.float32(1)}, jnp.arange(float(size))
    with jax.set_mesh(mesh):
        train_step.prepare(mesh, *jax.tree.map(jnp.zeros_like, (state, batch)), kept)
        for _ in range(2):
            state, largest = train_step(state, batch)
    for thread in threading.enumerate():
        if thread.name == "compile":  # which writes the step behind the first one
            thread.join()
    assert len(traces) == n_traces
    return float(state["sum"]), float(largest)


def test_is_taken_without_a_trace(tmp_path):
    assert run(KeptStep(tmp_path, "a"), n_traces=1) == (37.0, 3.0)
    assert run(KeptStep(tmp_path, "a"), n_traces=0) == (37.0, 3.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.step"]


def test_a_program_of_jax_own_cache_is_not_kept(tmp_path):
    """Its file can lack functions."""
    assert run(KeptStep(tmp_path, "a"), n_traces=1, event="/jax/compilation_cache/cache_hits") == (37.0, 3.0)
    assert not list(tmp_path.iterdir())
    assert run(KeptStep(tmp_path, "a"), n_traces=1, event="/jax/compilation_cache/cache_misses") == (37.0, 3.0)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_hit_of_jax_own_cache_is_seen(tmp_path):
    """By the event that JAX sends, whatever it is called by then."""
    words = """
import sys, jax
from hybridlm.train.kept_step import cache_hits
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
with cache_hits() as hits:
    jax.jit(lambda x: x * 3 + 1).lower(1.0).compile()
print(len(hits))
"""
    command = [sys.executable, "-c", words, str(tmp_path)]
    seen = [subprocess.run(command, capture_output=True, text=True, timeout=120).stdout for _ in range(2)]
    assert [text.split()[-1] for text in seen] == ["0", "1"]


@pytest.mark.parametrize("harm", ["a bit", "the end", "all", "other arguments"])
def test_what_is_in_doubt_is_compiled(harm, tmp_path, caplog):
    kept, size = KeptStep(tmp_path, "a"), 4
    run(kept, n_traces=1)
    content = kept.path.read_bytes()
    if harm == "a bit":
        kept.path.write_bytes(content[:200] + bytes([content[200] ^ 4]) + content[201:])
    elif harm == "other arguments":
        size = 5
    else:
        kept.path.write_bytes(content[:-10] if harm == "the end" else b"")
    with caplog.at_level(logging.WARNING):
        assert run(kept, n_traces=1, size=size)[1] == size - 1
    said = [record.getMessage() for record in caplog.records if record.name == kept_steps_module.__name__]
    assert len(said) == 1 and said[0].startswith("compiled step not used") and "\n" not in said[0]
    assert run(kept, n_traces=0, size=size)[1] == size - 1  # the new one is in its place


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, caplog):
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert run(KeptStep(tmp_path / "file" / "steps", "a"), n_traces=1) == (37.0, 3.0)
    assert [r.getMessage()[:22] for r in caplog.records if r.name == kept_steps_module.__name__] == [
        "compiled step not kept"
    ]


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("whose", ["group", "all", "another user"])
def test_what_others_can_write_is_left_alone(place, whose, tmp_path, monkeypatch):
    kept = KeptStep(tmp_path / "steps", "a")
    run(kept, n_traces=1)
    assert (kept.folder.stat().st_mode & 0o777, kept.path.stat().st_mode & 0o777) == (0o700, 0o600)
    path = kept.folder if place == "folder" else kept.path
    if whose == "another user":
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    else:
        path.chmod(path.stat().st_mode | (0o020 if whose == "group" else 0o002))
    monkeypatch.setattr(kept_steps_module.pickle, "loads", lambda content: pytest.fail("it was read"))
    written = kept.path.stat().st_mtime_ns
    run(kept, n_traces=1)
    assert (kept.path.stat().st_mtime_ns == written) == (place == "folder" or whose == "another user")


def test_those_used_last_stay(tmp_path):
    for i in range(KEPT + 2):
        (tmp_path / f"{i}.step").touch()
        os.utime(tmp_path / f"{i}.step", (i, i))
    run(KeptStep(tmp_path, "new"), n_traces=1)
    assert {path.stem for path in tmp_path.iterdir()} == {"new", *(str(i) for i in range(3, KEPT + 2))}


def one_device(**fields):
    return make_mesh(MeshConfig(**fields), jax.devices()[:1])


SAME = ["--run.steps=7", "--run.dir=elsewhere", "--run.log_every=1", "--data.workers=1"]
OTHER = [
    "--model.d_model=64", "--model.pattern=M-*", "--optim.lr=0.5", "--optim.accumulate=2", "--data.seq_len=64",
    "--data.batch_size=2", "--run.seed=1", "--model.remat=full", "--model.blocks.M.chunk=4",
]  # fmt: skip


@pytest.mark.parametrize("word", SAME + OTHER)
def test_the_key_hangs_on_what_the_program_does(word):
    changed = key(override(CONFIG, [word]), one_device())
    assert (changed == key(CONFIG, one_device())) == (word in SAME)


def test_another_source_version_flag_or_device_is_another_key(tmp_path, monkeypatch):
    keys = [key(CONFIG, one_device())]
    keys.append(key(CONFIG, make_mesh(MeshConfig(), jax.devices()[:2])))
    keys.append(key(CONFIG, make_mesh(MeshConfig(), jax.devices()[1:2])))
    for name, value in (("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"), ("LIBTPU_INIT_ARGS", "--some=1")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            keys.append(key(CONFIG, one_device()))
    with monkeypatch.context() as patched:
        patched.setattr(kept_steps_module, "versions", lambda: {"jax": "0.0"})
        keys.append(key(CONFIG, one_device()))
    old = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    keys.append(key(CONFIG, one_device()))
    jax.config.update("jax_default_prng_impl", old)
    monkeypatch.setattr(kept_steps_module, "SOURCES", {"toy": tmp_path})
    for name, source in (("__init__.py", ""), ("inner/a.py", "x = 1"), ("inner/a.py", "x = 2"), ("b.py", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
        keys.append(key(CONFIG, one_device()))
    assert len(set(keys)) == len(keys)
    assert key(CONFIG, one_device()) == keys[-1]


def others(part) -> Iterator[tuple[str, object]]:
    """(field, part with another value of it), of all fields that can have another one by themselves."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        for other in (not value, 7, 0.5, "x", ("x",), "dna", "chat", "best_fit", (0.25,), (3, 4), 10**6):
            try:
                changed = dataclasses.replace(part, **{field.name: other})
            except (ConfigError, TypeError):
                continue
            if getattr(changed, field.name) != value:
                yield field.name, changed
                break


@pytest.mark.slow
@pytest.mark.parametrize("part", ["data", "run"])
def test_configs_with_one_key_have_one_program(part):
    """Each field of text and run: where the key is the same, the lowered text is the same."""
    mesh = one_device()

    def text(config):
        program = make_program(config, mesh)
        return program.train_step.lower(program.state_like, program.batch_like(config.data)).as_text()

    with jax.set_mesh(mesh):
        ours, tried, same = text(CONFIG), [], []
        for name, changed in others(getattr(CONFIG, part)):
            config = dataclasses.replace(CONFIG, **{part: changed})
            tried.append(name)
            if key(config, mesh) == key(CONFIG, mesh):
                same.append(name)
                assert text(config) == ours, name
    fields = {field.name for field in dataclasses.fields(getattr(CONFIG, part))}
    assert len(tried) > len(fields) - 5 and len(same) > len(fields) / 3, set(fields) - set(tried)


class OtherMLP(MLP):
    """Of a module that nobody looks at."""


def test_is_kept_nowhere_where_it_is_in_doubt(tmp_path, monkeypatch):
    assert kept_step(tmp_path, CONFIG, one_device()) is None  # on a CPU
    monkeypatch.setattr(kept_steps_module, "PLATFORMS", ("cpu",))
    blocks = {**CONFIG.model.blocks, "-": OtherMLP(**dataclasses.asdict(CONFIG.model.blocks["-"]))}
    own: Config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, blocks=blocks))
    assert kept_step(tmp_path, own, one_device()) is None
    assert kept_step(None, CONFIG, one_device()) is None
    assert kept_step(tmp_path, CONFIG, one_device()).folder == tmp_path
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert kept_step(tmp_path, CONFIG, one_device()) is None


def test_the_folder_is_beside_the_compiled_programs(monkeypatch):
    assert os.environ["HYBRIDLM_KEEP_STEPS"] == "0" and kept_steps() is None
    monkeypatch.delenv("HYBRIDLM_KEEP_STEPS")
    assert str(kept_steps()) == f"{jax.config.jax_compilation_cache_dir}/steps"
