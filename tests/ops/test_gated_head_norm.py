# SPDX-License-Identifier: Apache-2.0
"""The kernels of gated norms of heads, interpreted, against float32 arrays and their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.layers.norm import GATES, rms_normalise
from pallas_kernels import assume_platform
from pallas_kernels import gated_head_norm as kernels
from pallas_kernels.gated_head_norm import gated_head_norm, gated_head_norm_gradients, why_not
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close

EPS = 1e-2


def test_gates_are_those_of_layers():
    assert sorted(kernels.GATES) == sorted(GATES)


@needs_gpu_interpreter
@pytest.mark.parametrize("gating", kernels.GATES)
@pytest.mark.parametrize(("n_rows", "width"), [(16, 128), (16 * 11, 128), (32 * 9, 64)])
def test_equals_float32(n_rows, width, gating):
    """Of one thread block, and of several that have different numbers of tiles."""
    rng = np.random.default_rng(0)
    y, z, d = (jnp.asarray(rng.normal(size=(n_rows, width)), jnp.bfloat16) for _ in range(3))
    y = y.at[1].set(0)  # a head of zeros: the root is that of eps
    z = z.at[2].multiply(40)  # gates at 0 and far from it
    weight = jnp.asarray(1 + 0.3 * rng.normal(size=width), jnp.float32)
    with mosaic_interpreted(), assume_platform("gpu", capability="9.0", multiprocessors=1):
        out = gated_head_norm(y, z, weight, EPS, gating)
        dy, dz, d_weight = gated_head_norm_gradients(y, z, weight, d, EPS, gating)
    by_definition = lambda y, z, weight: rms_normalise(y, EPS) * weight[None] * GATES[gating](z)
    expected, back = jax.vjp(by_definition, y.astype(jnp.float32), z.astype(jnp.float32), weight)
    expected_dy, expected_dz, expected_weight = back(d.astype(jnp.float32))
    assert out.dtype == dy.dtype == dz.dtype == jnp.bfloat16
    check_close(out, expected, dtype="bfloat16", what="out")
    check_close(dy, expected_dy, dtype="bfloat16", what="dy")
    check_close(dz, expected_dz, dtype="bfloat16", what="dz")
    check_close(d_weight, expected_weight, dtype="float32", what="d_weight")


def test_what_it_cannot_serve_is_named():
    with assume_platform("gpu", capability="9.0"):
        said = why_not(64, 96, jnp.bfloat16)
        assert said and ("head width (96)" in said or "JAX" in said)
        assert why_not(24, 128, jnp.bfloat16) and why_not(16, 64, jnp.bfloat16) and why_not(64, 128, jnp.float32)
    with assume_platform("gpu", capability="8.0"):
        assert why_not(64, 128, jnp.bfloat16)
    y, weight = jnp.zeros((64, 128)), jnp.ones(128)
    with pytest.raises(NotImplementedError):
        gated_head_norm(y, y, weight, EPS, "silu")
    with pytest.raises(NotImplementedError):
        gated_head_norm_gradients(y, y, weight, y, EPS, "silu")
    with pytest.raises(ValueError, match="one shape"):
        gated_head_norm_gradients(y, y, weight, y[1:], EPS, "silu")
    with pytest.raises(ValueError, match="gating"):
        gated_head_norm(y, y, weight, EPS, "relu")
