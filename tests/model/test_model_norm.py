# SPDX-License-Identifier: Apache-2.0
"""The gated norm and its written-out gradient against plain float64 differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.layers.norm import gated_rms_norm
from pallas_kernels.compat import enable_x64
from tests.tolerances import check_close

EPS = 1e-5


def plain(y, z, weight, n_groups, before_gate):
    gate = z / (1 + jnp.exp(-z))
    u = y if before_gate else y * gate
    grouped = u.reshape(*u.shape[:2], n_groups, -1)
    out = (grouped / jnp.sqrt((grouped**2).mean(-1, keepdims=True) + EPS)).reshape(u.shape) * weight[None, None]
    return out * gate if before_gate else out


@pytest.mark.quick
@pytest.mark.parametrize("before_gate", [False, True])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_plain_differentiation(dtype, n_groups, before_gate):
    rng = np.random.default_rng(n_groups)
    y, z, d_out = (rng.standard_normal((2, 5, 4, 8)).astype(jnp.dtype(dtype)) for _ in range(3))
    y[:, 1], y[0, 2, :2] = 0, 0  # a token and a group of channels without output: the root is that of eps
    z[:, 3] *= np.asarray(30, z.dtype)  # gates at 0 and far from it
    weight = rng.standard_normal((4, 8)).astype(np.float32)

    out, pull = jax.vjp(lambda *args: gated_rms_norm(*args, EPS, n_groups, before_gate, dtype), y, z, weight)
    found = (out, *pull(jnp.asarray(d_out)))
    with enable_x64():
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (y, z, weight, d_out)]
        out, pull = jax.vjp(lambda *args: plain(*args, n_groups, before_gate), *wide[:3])
        expected = [np.asarray(a) for a in (out, *pull(wide[3]))]
    for name, a, b in zip(("out", "dy", "dz", "dweight"), found, expected, strict=True):
        assert a.dtype == (jnp.float32 if name == "dweight" else jnp.dtype(dtype))
        check_close(a, b, dtype=dtype, what=name)


def test_keeps_roots_alone():
    """Nothing in float32 of the size of y stands between forward and backward."""
    y, z = (jax.ShapeDtypeStruct((2, 64, 4, 8), jnp.bfloat16) for _ in range(2))
    weight = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    run = lambda *args: gated_rms_norm(*args, EPS, 2, False, "bfloat16")
    _, pull = jax.eval_shape(lambda *args: jax.vjp(run, *args), y, z, weight)
    assert max(leaf.size for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32) == 2 * 64 * 2
