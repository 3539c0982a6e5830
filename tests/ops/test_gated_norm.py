# SPDX-License-Identifier: Apache-2.0
"""The kernels of a gated norm and its gradient, interpreted, against those of float32 arrays by XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.layers.norm import gated_rms_norm
from pallas_kernels import assume_platform
from pallas_kernels.gated_norm import LEAST, gated_norm, gated_norm_gradients, why_not
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close


@needs_gpu_interpreter
@pytest.mark.parametrize(("before_gate", "n_rows", "width"), [(False, 28, LEAST), (True, 14, 2048), (False, 7, 1536)])
def test_equals_float32(before_gate, n_rows, width):
    """Four, two and one rows at a time, and more of them than thread blocks, some of which have more than others."""
    rng, eps = np.random.default_rng(0), 1e-2
    y, z, d = (jnp.asarray(rng.normal(size=(n_rows, width)), jnp.bfloat16) for _ in range(3))
    weight = jnp.asarray(1 + 0.3 * rng.normal(size=width), jnp.float32)
    with mosaic_interpreted(), assume_platform("gpu", capability="9.0", multiprocessors=1):
        out = gated_norm(y, z, weight, eps, before_gate)
        dy, dz, d_weight = gated_norm_gradients(y, z, weight, d, eps, before_gate)
    of_rows = lambda a: a.astype(jnp.float32)[None, :, None]
    norm = lambda y, z, w: gated_rms_norm(y, z, w, eps, 1, before_gate, "float32")
    expected_out, pull = jax.vjp(norm, of_rows(y), of_rows(z), weight[None])
    expected = pull(of_rows(d))
    assert out.dtype == dy.dtype == dz.dtype == jnp.bfloat16
    check_close(out, expected_out[0, :, 0], dtype="bfloat16", what="out")
    check_close(dy, expected[0][0, :, 0], dtype="bfloat16", what="dy")
    check_close(dz, expected[1][0, :, 0], dtype="bfloat16", what="dz")
    check_close(d_weight, expected[2][0], dtype="float32", what="d_weight")


def test_what_it_cannot_serve_is_named():
    with assume_platform("gpu", capability="9.0"):
        said = why_not(384, jnp.bfloat16)
        assert said and ("channels (384)" in said or "JAX" in said)
        assert why_not(2100, jnp.bfloat16) and why_not(8192, jnp.bfloat16) and why_not(2048, jnp.float32)
    with assume_platform("gpu", capability="8.0"):
        assert why_not(2048, jnp.bfloat16)
    with pytest.raises(NotImplementedError):
        gated_norm_gradients(*[jnp.zeros((8, 2048))] * 2, jnp.ones(2048), jnp.zeros((8, 2048)), 1e-5, False)
    with pytest.raises(NotImplementedError):
        gated_norm(*[jnp.zeros((8, 2048))] * 2, jnp.ones(2048), 1e-5, False)
