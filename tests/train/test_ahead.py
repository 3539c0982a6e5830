# SPDX-License-Identifier: Apache-2.0
"""A step that is compiled ahead is the step, traced once; what its compilation raises, the first step raises. Its
kernels are compiled by programs of their own, which say of each what the step says."""

import hashlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.sharding import MeshConfig, make_mesh
from hybridlm.train.ahead import TrainStep
from hybridlm.train.kernels_ahead import call_alone, compile_kernels, kernels
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


def test_raises_what_the_compilation_raised():
    def step(state, batch, lengths):
        raise ValueError("no room for it")

    train_step, mesh = TrainStep(jax.jit(step), LENGTHS), make_mesh(MeshConfig())
    train_step.prepare(mesh, jnp.float32(1), jnp.arange(4.0))
    with pytest.raises(ValueError, match="no room for it"):
        train_step(jnp.float32(1), jnp.arange(4.0))


@pytest.mark.newer
def test_each_kernel_of_a_program_has_a_program_of_its_own():
    x, w, device = jnp.ones((1, 128, 128), jnp.bfloat16), jnp.ones((128, 4), jnp.bfloat16), jax.devices()[0]

    def twice(x, w):
        y = causal_conv1d(x, w, activation="silu", implementation="gpu")
        return causal_conv1d(y, w, implementation="gpu").sum()

    with assume_platform("gpu", capability="9.0"):
        lowered = jax.jit(jax.value_and_grad(twice)).trace(x, w).lower(lowering_platforms=("cuda",))
    found = kernels(lowered)
    hashes = re.findall(r'kernel_hash = ("[^"]*")', lowered.as_text())
    assert len(found) == len(set(hashes)) == 4  # forward and backward, with and without activation
    for words in found:
        assert hashlib.sha256(words["module"]).digest() == words["kernel_hash"]
        assert kernels(call_alone(words, device)) == [words]


def test_what_cannot_be_compiled_alone_is_left_to_the_program(monkeypatch):
    mesh = make_mesh(MeshConfig())
    lowered = jax.jit(jnp.sin).lower(1.0)
    assert compile_kernels(lowered, mesh) == []  # it calls none
    words = {"kernel_hash": bytes(32), "module": b"no kernel"}  # and a CPU knows no such call
    monkeypatch.setattr("hybridlm.train.kernels_ahead.kernels", lambda lowered: [words, words])
    assert [future.result(60) for future in compile_kernels(lowered, mesh)] == [None, None]
