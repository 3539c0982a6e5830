# SPDX-License-Identifier: Apache-2.0
"""The kernel of the gradient of silu(gate) * up, interpreted, against the gradient of float32 arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform
from pallas_kernels.gated_product import gated_product_gradients, why_not
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close


@needs_gpu_interpreter
def test_equals_the_gradient_of_float32():
    """Of nine tiles thread blocks have different numbers."""
    rng, n_rows, width = np.random.default_rng(0), 48, 384
    h = jnp.asarray(2 * rng.normal(size=(n_rows, 2, width)), jnp.bfloat16)
    d = jnp.asarray(rng.normal(size=(n_rows, width)), jnp.bfloat16)
    with mosaic_interpreted(), assume_platform("gpu", capability="9.0", multiprocessors=1):
        dh = gated_product_gradients(h, d)
    product = lambda h: jax.nn.silu(h[:, 0]) * h[:, 1]
    expected = jax.vjp(product, h.astype(jnp.float32))[1](d.astype(jnp.float32))[0]
    assert dh.dtype == jnp.bfloat16
    check_close(dh, expected, dtype="bfloat16", what="dh")


def test_what_it_cannot_serve_is_named():
    with assume_platform("gpu", capability="9.0"):
        said = why_not(8, 256, jnp.bfloat16)
        assert said and ("rows (8)" in said or "JAX" in said)
        assert why_not(16, 200, jnp.bfloat16) and why_not(16, 256, jnp.float32)
    with assume_platform("gpu", capability="8.0"):
        assert why_not(16, 256, jnp.bfloat16)
    with pytest.raises(NotImplementedError):
        gated_product_gradients(jnp.zeros((16, 2, 256)), jnp.zeros((16, 256)))
