# SPDX-License-Identifier: Apache-2.0
"""Kernels of one token, interpreted, against the same in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mamba2_step, one_row
from tests.ops.support import triton_interpreted
from tests.tolerances import check_close

K, EPS = 1024, 1e-5


def bf16(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32), jnp.bfloat16)


def f64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("gated", [None, "silu"])
def test_products_of_what_is_normed(gated):
    rng = np.random.default_rng(0)
    x, norm = bf16(rng, K, scale=3.0), jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32)
    weights = [bf16(rng, K, n, scale=K**-0.5) for n in (96, 32, 64)]
    with triton_interpreted() as names:
        ys = one_row.normed(x, norm, weights, eps=EPS, gated=gated)
    assert names == ["normed_products"]
    x, norm, *weights = f64(x, norm, *weights)
    for y, w in zip(ys, weights, strict=True):
        expected = x / np.sqrt((x * x).mean() + EPS) * norm @ w
        n = w.shape[1] // 2
        expected = silu(expected[:n]) * expected[n:] if gated else expected
        check_close(np.asarray(y, np.float64), expected, dtype="bfloat16", what="y")


@pytest.mark.parametrize("before_gate", [None, False, True])
def test_products_that_are_added(before_gate):
    rng = np.random.default_rng(1)
    x, y, zx = bf16(rng, 48), bf16(rng, K), bf16(rng, 2 * K)
    w, norm = bf16(rng, K, 48, scale=K**-0.5), jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32)
    parts, read, eps = ((y,), one_row.as_it_is, None)
    if before_gate is not None:
        parts, read, eps = (y, zx, norm), one_row.gated_norm(before_gate), EPS
    with triton_interpreted() as names:
        out = one_row.added(x, parts, read, w, eps=eps, multiplier=0.5)
    assert names == ["added_product"]
    x, y, zx, w, norm = f64(x, y, zx, w, norm)
    if before_gate is not None:
        gate = silu(zx[:K])
        u = y if before_gate else y * gate
        y = u / np.sqrt((u * u).mean() + EPS) * norm * (gate if before_gate else 1)
    check_close(np.asarray(out, np.float64), x + 0.5 * (y @ w), dtype="bfloat16", what="out")


@pytest.mark.parametrize(
    ("heads", "width", "groups", "bias", "limit"),
    [(4, 16, 2, True, (0.0, np.inf)), (2, 32, 1, False, (0.2, 0.4))],
)
def test_a_step_of_mamba2(heads, width, groups, bias, limit):
    rng, (B, N, W) = np.random.default_rng(2), (3, 16, 4)
    zx, BC, dt = bf16(rng, B, 2, heads, width), bf16(rng, B, 2, groups, N), bf16(rng, B, heads)
    windows = [bf16(rng, B, W - 1, heads, width), bf16(rng, B, W - 1, 2, groups, N)]
    state = jnp.asarray(rng.standard_normal((B, heads, width, N)), jnp.float32)
    shapes = [(heads, width, W), (heads, width), (2, groups, N, W), (2, groups, N), (heads,), (heads,), (heads,)]
    drawn = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    weights = mamba2_step.Weights(*(None if i in (1, 3) and not bias else a for i, a in enumerate(drawn)))
    with triton_interpreted() as names:
        found = mamba2_step.mamba2_step(zx, BC, dt, *windows, state, weights, dt_limit=limit)
    assert names == ["mamba2_step"]

    taken = [np.concatenate([*f64(old), *f64(new[:, None])], axis=1) for old, new in zip(windows, (zx[:, 1], BC))]
    of = [None if a is None else np.asarray(a, np.float64) for a in weights]
    x = silu(np.einsum("bwhp,hpw->bhp", taken[0], of[0]) + (of[1] if bias else 0))
    both = silu(np.einsum("bwcgn,cgnw->bcgn", taken[1], of[2]) + (of[3] if bias else 0))
    both = np.repeat(both, heads // groups, axis=2)
    step = np.clip(np.log1p(np.exp(np.asarray(dt, np.float64) + of[4])), *limit)[..., None]
    expected = np.exp(-step * np.exp(of[5])[:, None])[..., None] * np.asarray(state, np.float64)
    expected += (step * x)[..., None] * both[:, 0, :, None]
    y = (expected * both[:, 1, :, None]).sum(-1) + of[6][:, None] * x
    check_close(np.asarray(found[0], np.float64), y, dtype="bfloat16", what="y")
    check_close(found[3], expected, dtype="bfloat16", what="state")
    for actual, window in zip(found[1:3], taken, strict=True):
        np.testing.assert_array_equal(np.asarray(actual, np.float64), window[:, 1:])


def test_matrices_that_cannot_be_cut():
    assert one_row.fits(2048, 64) and not one_row.fits(2048, 40) and not one_row.fits(100, 64)
