# SPDX-License-Identifier: Apache-2.0
"""The kernels of norm and rotation of heads, interpreted, against float32 arrays and their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.layers.norm import rms_normalise
from hybridlm.layers.rope import Rope, YaRN, turns
from pallas_kernels import assume_platform
from pallas_kernels.head_norm import head_norm, head_norm_gradients, why_not
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close

EPS = 1e-2


def by_definition(x_RHP, weight_P, turn_RcC):
    y = rms_normalise(x_RHP, EPS) * weight_P[None, None]
    if turn_RcC is None:
        return y
    cos, sin = (turn_RcC[:, i, None] for i in range(2))
    first, second = jnp.split(y, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@needs_gpu_interpreter
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("n_rows", "n_heads", "width", "rope"),
    [
        (20, 32, 64, Rope()), (36, 8, 64, Rope(scaling=YaRN())), (48, 3, 64, Rope()), (24, 6, 128, Rope()),
        (10, 32, 128, None), (64, 1, 64, None),
    ],
)  # fmt: skip
def test_equals_float32(n_rows, n_heads, width, rope, wide):
    """Of a row at a time and of several, whose thread blocks have different numbers of tiles; positions start anew."""
    rng, factor = np.random.default_rng(0), 0.3 if wide else 1.0
    x, dy = (jnp.asarray(rng.normal(size=(n_rows, n_heads, width)), jnp.bfloat16) for _ in range(2))
    x = x.at[1].set(0)  # heads of zeros: the root is that of eps
    dy = jnp.asarray(rng.normal(size=dy.shape), jnp.float32) if wide else dy
    weight = jnp.asarray(1 + 0.3 * rng.normal(size=width), jnp.float32)
    positions = jnp.concatenate([jnp.arange(n_rows // 2) + 4000, jnp.arange(n_rows - n_rows // 2)])
    turn = None if rope is None else jnp.stack(turns(positions[None], rope, width), axis=2)[0]
    with mosaic_interpreted(), assume_platform("gpu", capability="9.0", multiprocessors=1):
        y = head_norm(x, weight, turn, EPS, factor)
        dx, d_weight = head_norm_gradients(x, weight, turn, dy, EPS, factor)
    pull = lambda x, weight: by_definition(x, weight * factor, turn)
    expected, back = jax.vjp(pull, x.astype(jnp.float32), weight)
    expected_dx, expected_weight = back(dy.astype(jnp.float32))
    assert y.dtype == dx.dtype == jnp.bfloat16
    check_close(y, expected, dtype="bfloat16", what="y")
    check_close(dx, expected_dx, dtype="bfloat16", what="dx")
    check_close(d_weight, expected_weight, dtype="float32", what="d_weight")


@needs_gpu_interpreter
@pytest.mark.parametrize(
    ("n_rows", "n_heads", "more", "width"), [(40, 8, 8, 64), (40, 4, 6, 64), (12, 4, 4, 128), (34, 8, 1, 128)]
)
def test_the_first_heads_of_several(n_rows, n_heads, more, width):
    """What is beside them is not normed, and its gradient handed on to the bit."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(n_rows, n_heads + more, width)), jnp.bfloat16) for _ in range(2))
    weight = jnp.asarray(1 + 0.3 * rng.normal(size=width), jnp.float32)
    turn = jnp.stack(turns(jnp.arange(n_rows)[None], Rope(), width), axis=2)[0]

    def run(x, dy):
        y = head_norm(x, weight, turn, EPS, 0.3, n_heads)
        return y, *head_norm_gradients(x, weight, turn, dy, EPS, 0.3, n_heads)

    with mosaic_interpreted(), assume_platform("gpu", capability="9.0", multiprocessors=1):
        y, dx, d_weight = jax.jit(run)(x, dy)
        with pytest.raises(ValueError, match="dy_RHP"):
            run(x, dy.astype(jnp.float32))
        with pytest.raises(ValueError, match="n_heads"):
            head_norm(x, weight, turn, EPS, n_heads=n_heads + more + 1)
    first = x[:, :n_heads].astype(jnp.float32)
    expected, back = jax.vjp(lambda x, weight: by_definition(x, weight * 0.3, turn), first, weight)
    expected_dx, expected_weight = back(dy[:, :n_heads].astype(jnp.float32))
    check_close(y, expected, dtype="bfloat16", what="y")
    check_close(dx[:, :n_heads], expected_dx, dtype="bfloat16", what="dx")
    check_close(d_weight, expected_weight, dtype="float32", what="d_weight")
    assert (dx[:, n_heads:] == dy[:, n_heads:]).all() and dx.shape == x.shape


def test_what_it_cannot_serve_is_named():
    with assume_platform("gpu", capability="9.0"):
        said = why_not(16, 8, 96, jnp.bfloat16)
        assert said and ("head width (96)" in said or "JAX" in said)
        assert why_not(17, 8, 64, jnp.bfloat16) and why_not(16, 8, 64, jnp.float32)
        assert why_not(1600, 25, 128, jnp.bfloat16)
    with assume_platform("gpu", capability="8.0"):
        assert why_not(16, 8, 64, jnp.bfloat16)
    x, weight = jnp.zeros((16, 8, 64)), jnp.ones(64)
    with pytest.raises(NotImplementedError):
        head_norm(x, weight, None, EPS)
    with pytest.raises(NotImplementedError):
        head_norm_gradients(x, weight, None, x, EPS)
    with pytest.raises(ValueError, match="dy_RHP"):
        head_norm_gradients(x, weight, None, x[1:], EPS)
