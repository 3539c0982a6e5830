# SPDX-License-Identifier: Apache-2.0
"""Interpreted kernels end within their context, whenever XLA runs them, and leave nothing to the next."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter

ROWS = 64


@jax.jit
def made_late(x):
    """x, by thousands of products: XLA does not have its caller wait for that."""
    one = jnp.eye(len(x), dtype=x.dtype)
    return jax.lax.fori_loop(0, 3000, lambda _, x: x @ one, x)


def copied(x, first):
    """x by a kernel that writes from row `first[0]` on."""

    @functools.partial(plgpu.kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))
    def copy(x_g, first_g, out_g):
        out_g[pl.ds(first_g[0], ROWS)] = x_g[...]

    return copy(x, first)


@needs_gpu_interpreter
def test_kernels_that_start_late_end_in_their_context():
    """One that fails says so there, and fails no other."""
    x = jnp.arange(ROWS * ROWS, dtype=jnp.float32).reshape(ROWS, ROWS)
    right, wrong = jnp.array([0]), jnp.array([1])
    with mosaic_interpreted():
        copy = jax.jit(copied).lower(x, right).compile()
        late = made_late.lower(x).compile()
        y = copy(late(x), right)
    assert y.is_ready()
    np.testing.assert_array_equal(y, x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds"), mosaic_interpreted():
        copy(late(x), wrong)
    with mosaic_interpreted():
        np.testing.assert_array_equal(copy(x, right), x)
