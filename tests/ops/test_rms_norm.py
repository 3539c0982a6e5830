# SPDX-License-Identifier: Apache-2.0
"""The kernel of an RMS norm's gradient, interpreted, against the gradient of float32 arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.layers.norm import rms_normalise
from pallas_kernels import assume_platform
from pallas_kernels.rms_norm import LEAST, rms_norm_gradients, why_not
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close


@needs_gpu_interpreter
@pytest.mark.parametrize(("n_grads", "n_rows", "width"), [(1, 28, 768), (3, 14, 2048), (2, 7, LEAST)])
def test_equals_the_gradient_of_float32(n_grads, n_rows, width):
    """Four, two and one rows at a time, and more of them than thread blocks, some of which have more than others."""
    rng, eps = np.random.default_rng(0), 1e-2
    x, beside, *grads = (jnp.asarray(rng.normal(size=(n_rows, width)), jnp.bfloat16) for _ in range(2 + n_grads))
    weight = jnp.asarray(1 + 0.3 * rng.normal(size=width), jnp.float32)
    with mosaic_interpreted(), assume_platform("gpu", capability="9.0", multiprocessors=1):
        dx, d_weight = rms_norm_gradients(x, weight, grads, beside, eps)
    norm = lambda x, weight: rms_normalise(x, eps) * weight[None]
    reaches = sum(g.astype(jnp.float32) for g in grads)
    expected_dx, expected_weight = jax.vjp(norm, x.astype(jnp.float32), weight)[1](reaches)
    assert dx.dtype == jnp.bfloat16
    check_close(dx, expected_dx + beside.astype(jnp.float32), dtype="bfloat16", what="dx")
    check_close(d_weight, expected_weight, dtype="float32", what="d_weight")


def test_what_it_cannot_serve_is_named():
    with assume_platform("gpu", capability="9.0"):
        said = why_not(384, jnp.bfloat16)
        assert said and ("channels (384)" in said or "JAX" in said)
        assert why_not(2100, jnp.bfloat16) and why_not(8192, jnp.bfloat16) and why_not(2048, jnp.float32)
    with assume_platform("gpu", capability="8.0"):
        assert why_not(2048, jnp.bfloat16)
    array, weight = jnp.zeros((8, 2048)), jnp.ones(2048)
    with pytest.raises(NotImplementedError):
        rms_norm_gradients(array, weight, [array], array, 1e-5)
    with pytest.raises(ValueError, match="grads_RC"):
        rms_norm_gradients(array, weight, [], array, 1e-5)
