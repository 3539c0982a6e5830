# SPDX-License-Identifier: Apache-2.0
"""A step that is compiled ahead is the step, traced once; what its compilation raises, the first step raises. Its
kernels are compiled by programs of their own, which say of each what the step says."""

import hashlib
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.sharding import MeshConfig, make_mesh
from hybridlm.train import kernels_ahead
from hybridlm.train.ahead import TrainStep
from hybridlm.train.kept_step import KeptStep
from hybridlm.train.kernels_ahead import Kernels, call_alone, calls, without_texts
from pallas_kernels import causal_conv1d
from pallas_kernels.platform import assume_platform

LENGTHS = np.array([3], np.int32)


def test_is_compiled_in_a_thread_and_taken():
    threads, mesh = [], make_mesh(MeshConfig())

    def step(state, batch, lengths):
        threads.append(threading.current_thread().name)
        assert jax.sharding.get_abstract_mesh().shape == dict(mesh.shape)  # the thread has the run's mesh
        return state + batch.sum() * lengths[0], batch.max()

    train_step, state, batch = TrainStep(jax.jit(step), LENGTHS), jnp.float32(1), jnp.arange(4.0)
    with jax.set_mesh(mesh):
        train_step.prepare(mesh, *jax.tree.map(jnp.zeros_like, (state, batch)))
        for _ in range(2):
            state, largest = train_step(state, batch)
    assert (float(state), float(largest)) == (37.0, 3.0)
    assert threads == ["compile"]
    assert float(TrainStep(jax.jit(lambda *a: a[0] + a[2][0]), LENGTHS)(state, batch)) == 40.0  # not prepared


def test_waits_until_it_is_lowered_and_no_longer():
    go, events, mesh = threading.Event(), [], make_mesh(MeshConfig())

    def step(state, batch, lengths):
        assert go.wait(60)
        events.append("traced")
        return state + batch.sum(), lengths[0]

    train_step = TrainStep(jax.jit(step), LENGTHS)
    train_step.wait_until_lowered()  # nothing is
    train_step.prepare(mesh, jnp.float32(1), jnp.arange(4.0))
    waiting = threading.Thread(target=lambda: (train_step.wait_until_lowered(), events.append("waited")))
    waiting.start()
    go.set()
    waiting.join(60)
    assert events == ["traced", "waited"]
    train_step(jnp.float32(1), jnp.arange(4.0))  # which its thread waits for


def test_a_step_is_kept_when_the_first_one_is_on_its_way():
    kept, stored, mesh = KeptStep(Path(), "step"), Future(), make_mesh(MeshConfig())
    kept.load, kept.store = lambda *_: None, lambda step: stored.set_result((step, train_step.writes()))
    train_step = TrainStep(jax.jit(lambda state, batch, lengths: (state + batch.sum(), lengths[0])), LENGTHS)
    with jax.set_mesh(mesh):
        train_step.prepare(mesh, jnp.float32(1), jnp.arange(4.0), kept)
        train_step._ahead.result()
        time.sleep(0.3)
        assert not stored.done() and not train_step.writes()
        assert float(train_step(jnp.float32(1), jnp.arange(4.0))[0]) == 7.0
    assert stored.result(60) == (train_step._ahead.result(), True)
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join(60)
    assert not train_step.writes()


def test_raises_what_the_compilation_raised():
    def step(state, batch, lengths):
        raise ValueError("no room for it")

    train_step, mesh = TrainStep(jax.jit(step), LENGTHS), make_mesh(MeshConfig())
    train_step.prepare(mesh, jnp.float32(1), jnp.arange(4.0))
    train_step.wait_until_lowered()
    with pytest.raises(ValueError, match="no room for it"):
        train_step(jnp.float32(1), jnp.arange(4.0))


@pytest.fixture(scope="module")
def lowered():
    """Of a program that calls four kernels of `causal_conv1d`: forward and backward, with and without activation."""
    x, w = jnp.ones((1, 128, 128), jnp.bfloat16), jnp.ones((128, 4), jnp.bfloat16)

    def twice(x, w):
        y = causal_conv1d(x, w, activation="silu", implementation="gpu")
        return causal_conv1d(y, w, implementation="gpu").sum()

    with assume_platform("gpu", capability="9.0"):
        return jax.jit(jax.value_and_grad(twice)).trace(x, w).lower(lowering_platforms=("cuda",))


@pytest.mark.newer
def test_each_kernel_of_a_program_has_a_program_of_its_own(lowered):
    found = calls(lowered)
    assert len({words["kernel_hash"] for words in found}) == 4
    assert {words["kernel_hash"]: words["module"] for words in found}.items() <= kernels_ahead._known().items()
    for words in found:
        assert hashlib.sha256(words["module"]).digest() == words["kernel_hash"]
        assert calls(call_alone(words, jax.devices()[0])) == [words]


@pytest.mark.newer
def test_texts_are_left_out_and_put_back(lowered):
    before, text = calls(lowered), lowered.as_text()
    with without_texts(lowered):
        assert calls(lowered) == [words | {"module": b""} for words in before]
        assert len(lowered.as_text()) < len(text) / 4
    assert lowered.as_text() == text


@pytest.mark.newer
def test_what_a_cpu_cannot_compile_is_started_once_and_not_compiled(lowered, monkeypatch):
    assert not Kernels(jax.devices()[0]).of(lowered)  # it is no GPU
    monkeypatch.setattr(kernels_ahead, "platform_of", lambda device: "gpu")
    found, kernels, known = calls(lowered), Kernels(jax.devices()[0]), {bytes(32): b"of another program"}
    with kernels.from_known(lambda: known):
        known[found[0]["kernel_hash"]] = found[0]["module"]
        deadline = time.monotonic() + 30
        while not kernels.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert list(kernels.started) == [found[0]["kernel_hash"]]
    assert kernels.of(lowered)
    assert set(kernels.started) == {words["kernel_hash"] for words in found}
    kernels.wait()
    assert not kernels.waiting() and kernels.failed()
    assert [future.result() for future in kernels.started.values()] == [False] * 4
    assert not Kernels(jax.devices()[0]).of(jax.jit(jnp.sin).lower(1.0))  # it calls none


def test_settled_is_what_waits_for_the_lock_or_is_through(monkeypatch):
    kernels, go = Kernels(jax.devices()[0]), threading.Event()

    def alone(words, device):
        assert go.wait(60)
        return jax.jit(jnp.sin).lower(1.0)

    monkeypatch.setattr(kernels_ahead, "call_alone", alone)
    monkeypatch.setattr(kernels_ahead, "SOON", 0.3)
    assert not kernels.waiting()
    kernels.settle()
    began = time.monotonic()
    for name in (b"1", b"2"):
        kernels.start({"kernel_hash": name, "module": b""})
    kernels.settle()
    assert time.monotonic() - began > 0.3 and kernels.waiting() and not kernels.failed()
    go.set()
    kernels.wait()
    assert not kernels.waiting() and not kernels.failed()
    monkeypatch.setattr(kernels_ahead, "SOON", 60)
    kernels.settle()  # nothing waits


WITHOUT, WITH = "without texts", "with texts"


@pytest.mark.newer
@pytest.mark.parametrize(
    "kernel, refused, tried",
    [
        (True, [], [WITHOUT]),
        (True, [WITHOUT], [WITHOUT, WITH]),
        (True, [WITHOUT, WITH], [WITHOUT, WITH]),
        (False, [], [WITH]),
        ("will be", [], [WITHOUT]),
        ("will be", ["too early"], [WITHOUT, WITHOUT]),
        ("will be", [WITHOUT], [WITHOUT, WITHOUT, WITH]),
        ("will not be", ["too early"], [WITHOUT, WITH]),
    ],
)
def test_a_program_is_compiled_without_texts_beside_its_kernels(kernel, refused, tried, lowered, monkeypatch):
    """Where a kernel was not there yet once more when it is; what is refused then, or has none, with its texts."""
    one, seen, told = Future(), [], []
    if isinstance(kernel, bool):
        one.set_result(kernel)

    def compile_(self):
        seen.append(WITH if calls(self)[0]["module"] else WITHOUT)
        assert told == ["lowered"]
        early = "too early" in refused and not one.done()
        if not isinstance(kernel, bool) and not one.done():
            threading.Timer(0.05, one.set_result, [kernel == "will be"]).start()
        if early or seen[-1] in refused:
            raise jax.errors.JaxRuntimeError("no kernel")
        return seen[-1]

    monkeypatch.setattr(kernels_ahead, "platform_of", lambda device: "gpu")
    monkeypatch.setattr(Kernels, "of", lambda self, lowered: self.started.update({b"one": one}) or True)
    monkeypatch.setattr(type(lowered), "compile", compile_)
    monkeypatch.setattr(kernels_ahead, "processes", lambda: 0)
    traced = SimpleNamespace(lower=lambda: lowered)
    run = lambda: kernels_ahead.compile_ahead(lambda: traced, make_mesh(MeshConfig()), lambda: told.append("lowered"))
    if WITH in refused:
        with pytest.raises(jax.errors.JaxRuntimeError, match="no kernel"):
            run()
    else:
        assert run() == tried[-1]
    assert seen == tried


def test_kernels_are_not_kept_on_disk_and_a_step_is_when_there_is_time(tmp_path):
    """In a process of its own, as JAX looks up its cache's folder once: of three programs the first is not there, the
    second when it is asked for, the third at once."""
    program = """
import pathlib
import sys

import jax

from hybridlm.train.kernels_ahead import not_kept
from hybridlm.train.written_later import written_later

kept = lambda: len(list(pathlib.Path(sys.argv[1]).glob("*-cache")))
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
one, two, three = (jax.jit(lambda x, n=n: x * n).lower(1.0) for n in (2, 3, 4))
found = []
with not_kept():
    one.compile()
found.append(kept())
with written_later() as write:
    two.compile()
found.append(kept())
write()
found.append(kept())
three.compile()
print(*found, kept())
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0", "1", "2"]
