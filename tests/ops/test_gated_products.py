# SPDX-License-Identifier: Apache-2.0
"""The kernels of the products beside silu(gate) * up, interpreted, against those of float32 arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform
from pallas_kernels.gated_product import gated_products, hidden_gradients, why_not_products
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close

SIZES = [(512, 256, 384), (256, 64, 256)]
"""Rows, inputs, width: tiles of which the last repeats columns and more steps than are fetched at once; the least."""


def make_inputs(n_rows: int, n_inputs: int, width: int):
    """x, both matrices, h and the cotangent of what is left, bfloat16."""
    rng = np.random.default_rng(0)
    make = lambda std, *shape: jnp.asarray(std * rng.standard_normal(shape), jnp.bfloat16)
    x, w_in = make(1.0, n_rows, n_inputs), make(2 / n_inputs**0.5, n_inputs, 2, width)
    return x, w_in, make(width**-0.5, width, n_inputs), make(2.0, n_rows, 2, width), make(1.0, n_rows, n_inputs)


def on_hopper():
    return assume_platform("gpu", capability="9.0", multiprocessors=2)


@needs_gpu_interpreter
@pytest.mark.parametrize("sizes", SIZES)
def test_products_equal_those_of_float32(sizes):
    x, w, *_ = make_inputs(*sizes)
    with mosaic_interpreted(), on_hopper():
        h, hidden = gated_products(x, w)
    expected = jnp.einsum("rd,dcf->rcf", *(a.astype(jnp.float32) for a in (x, w)), precision="highest")
    assert h.dtype == hidden.dtype == jnp.bfloat16
    check_close(h, expected, dtype="bfloat16", what="h")
    own = h.astype(jnp.float32)
    check_close(hidden, jax.nn.silu(own[:, 0]) * own[:, 1], dtype="bfloat16", what="hidden")


@needs_gpu_interpreter
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_equal_those_of_float32(sizes):
    _, _, w, h, dy = make_inputs(*sizes)
    with mosaic_interpreted(), on_hopper():
        dh = hidden_gradients(dy, w, h)
    product = lambda h: jnp.dot(jax.nn.silu(h[:, 0]) * h[:, 1], w.astype(jnp.float32), precision="highest")
    expected = jax.vjp(product, h.astype(jnp.float32))[1](dy.astype(jnp.float32))[0]
    assert dh.dtype == jnp.bfloat16
    check_close(dh, expected, dtype="bfloat16", what="dh")


@needs_gpu_interpreter
def test_a_batch_of_them_one_after_the_other():
    x, w, *_ = make_inputs(256, 64, 256)
    with mosaic_interpreted(), on_hopper():
        h, hidden = jax.vmap(gated_products, in_axes=(0, None))(jnp.stack([x, -x]), w)
        alone = gated_products(x, w)
    np.testing.assert_array_equal(h[0], alone[0])
    np.testing.assert_array_equal(hidden[0], alone[1])
    np.testing.assert_array_equal(h[1], -h[0])


def test_what_they_cannot_serve_is_named():
    with on_hopper():
        for sizes, said in (((128, 64, 256), "rows (128)"), ((256, 96, 256), "inputs (96)"), ((256, 64, 320), "width")):
            reason = why_not_products(*sizes, jnp.bfloat16)
            assert reason and (said in reason or "JAX" in reason)
        assert why_not_products(256, 64, 128, jnp.bfloat16) and why_not_products(256, 64, 256, jnp.float32)
    with assume_platform("gpu", capability="8.0"):
        assert why_not_products(256, 64, 256, jnp.bfloat16)
    x, w_in, w_out, h, dy = make_inputs(256, 64, 256)
    with pytest.raises(NotImplementedError):
        gated_products(x, w_in)
    with pytest.raises(NotImplementedError):
        hidden_gradients(dy, w_out, h)


def test_a_plan_knows_their_cost():
    from hybridlm.plan.kernels import kernel_cost
    from pallas_kernels.cost import Array

    (x, w_in, w_out, h), hidden = (Array(a.shape, 2) for a in make_inputs(256, 64, 384)[:4]), Array((256, 384), 2)
    cost = kernel_cost("gated_products", [x, w_in], [h, hidden], gpu=True)
    assert cost.flops == 2 * 256 * 64 * 2 * 384 and cost.bytes == 2 * (256 * 64 + 64 * 768 + 256 * 3 * 384)
    cost = kernel_cost("hidden_gradients", [x, w_out, h], [h], gpu=True)
    assert cost.flops == 2 * 256 * 64 * 384 and cost.bytes == 2 * (256 * 64 + 384 * 64 + 2 * 256 * 2 * 384)
