# SPDX-License-Identifier: Apache-2.0
"""A step that is compiled ahead is the step, traced once; what its compilation raises, the first step raises."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.sharding import MeshConfig, make_mesh
from hybridlm.train.ahead import TrainStep

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
