# SPDX-License-Identifier: Apache-2.0
"""The kernels of exponentials and their sums, interpreted, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform
from pallas_kernels.exponentials import exponentials, product_exponentials, why_not, why_not_products
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close


@needs_gpu_interpreter
@pytest.mark.parametrize("n_columns", [256, 1000, 2 * 5 * 256 + 8])
def test_rows_beside_bases_that_fit_and_that_do_not(n_columns):
    """Tiles of 256 columns, of which the last may repeat some; more of them than are fetched at once."""
    rng, factor = np.random.default_rng(0), 0.7
    z = rng.standard_normal((8, n_columns)) * 4
    z[2:5] *= 100
    z[3, -1], z[6, 0] = 3e3, -np.inf
    base = factor * z[:, 0]
    base[6:] = -100.0, 500.0  # too low by far; so high that all of the row is zero
    z, base = z.astype(np.float32), base.astype(np.float32)
    with mosaic_interpreted(), assume_platform("gpu", capability="9.0"):
        p, sums, bases = exponentials(jnp.asarray(z), jnp.asarray(base), factor)
    scaled = factor * z.astype(np.float64)
    e = np.exp(np.clip(scaled - np.asarray(bases, np.float64)[:, None], None, 700))
    walked_again = scaled.max(1) - base > 80
    assert walked_again.any() and not walked_again.all()
    expected = np.where(walked_again, scaled.max(1), base)
    check_close(bases, expected, dtype="float32", what="bases")
    check_close(sums, e.sum(1), dtype="float32", what="sums")
    assert p.dtype == jnp.bfloat16
    for row, like in zip(np.asarray(p, np.float64), e, strict=True):
        check_close(row, like, dtype="bfloat16", what="exponentials")


@needs_gpu_interpreter
@pytest.mark.parametrize("few_inputs", [64, 128])
def test_products_beside_bases_that_fit_and_that_do_not(few_inputs, monkeypatch):
    """Of three tiles of columns the last repeats some; rows of one of three clusters' are walked again, and clusters
    have several tiles."""
    monkeypatch.setattr("pallas_kernels.exponentials.products.FEW_INPUTS", few_inputs)
    jax.clear_caches()  # traced of the other
    rng, factor, n_rows, n_columns = np.random.default_rng(0), 0.7, 768, 576
    x = jnp.asarray(rng.standard_normal((n_rows, 128)), jnp.bfloat16)
    w = jnp.asarray(0.2 * rng.standard_normal((n_columns, 128)), jnp.bfloat16)
    scaled = factor * np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    base = scaled[:, 0].astype(np.float32)
    base[[265, 330]] -= 200
    with mosaic_interpreted(), assume_platform("gpu", capability="9.0", multiprocessors=4):
        p, sums, bases = product_exponentials(x, w, jnp.asarray(base), factor)
    expected = np.where(np.isin(np.arange(n_rows), (265, 330)), scaled.max(1), base)
    e = np.exp(scaled - np.asarray(bases, np.float64)[:, None])
    check_close(bases, expected, dtype="float32", what="bases")
    check_close(sums, e.sum(1), dtype="float32", what="sums")
    assert p.dtype == jnp.bfloat16
    check_close(p, e, dtype="bfloat16", what="exponentials")


@pytest.mark.newer
@pytest.mark.parametrize("down", [1, 8, 21])
def test_every_tile_of_products_is_done_once(down):
    from pallas_kernels.exponentials import products

    plan = products.Plan(down * products.CLUSTER * products.ROWS, 64, 9 * products.COLUMNS + 8, 1.0, 132)
    tiles = [tuple(map(int, products._place(plan, i))) for i in range(plan.down * plan.across)]
    assert sorted(tiles) == [(row, column) for row in range(down) for column in range(10)]
    assert len({row for row, _ in tiles[: products.HEIGHT]}) == min(down, products.HEIGHT)  # below each other


def test_products_that_it_cannot_serve_are_named():
    with assume_platform("gpu", capability="9.0", multiprocessors=2):
        for sizes, said in (((192, 64, 256), "rows"), ((256, 64, 128), "columns"), ((256, 96, 256), "summed axis")):
            reason = why_not_products(*sizes, jnp.bfloat16)
            assert reason and (said in reason or "JAX" in reason)
        assert why_not_products(256, 64, 256, jnp.float32) and why_not_products(128, 64, 256, jnp.bfloat16)
    with pytest.raises(NotImplementedError):
        product_exponentials(jnp.zeros((256, 64)), jnp.zeros((256, 64)), jnp.zeros(256))


def test_what_it_cannot_serve_is_named():
    with assume_platform("gpu", capability="9.0"):
        assert "columns (250)" in why_not(8, 250, jnp.bfloat16) or "JAX" in why_not(8, 250, jnp.bfloat16)
        assert why_not(6, 256, jnp.bfloat16) and why_not(8, 260, jnp.bfloat16) and why_not(8, 256, jnp.float32)
    with assume_platform("gpu", capability="8.0"):
        assert why_not(8, 256, jnp.bfloat16)
    with pytest.raises(NotImplementedError):
        exponentials(jnp.zeros((8, 256)), jnp.zeros(8))


def test_a_plan_knows_its_cost():
    from hybridlm.plan.kernels import kernel_cost
    from pallas_kernels.cost import Array

    z, of_rows, p = Array((8, 256), 4), Array((8,), 4), Array((8, 256), 2)
    cost = kernel_cost("exponentials", [z, of_rows], [p, of_rows, of_rows], gpu=True)
    assert cost.flops == 0 and cost.bytes == 8 * (256 * 6 + 3 * 4)
    x, w = Array((8, 64), 2), Array((256, 64), 2)
    cost = kernel_cost("product_exponentials", [x, w, of_rows], [p, of_rows, of_rows], gpu=True)
    assert cost.flops == 2 * 8 * 64 * 256
