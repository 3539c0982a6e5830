# SPDX-License-Identifier: Apache-2.0
"""Kernels of one token, interpreted, against the same in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import one_token
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close

pytestmark = needs_gpu_interpreter
K, EPS = 1024, 1e-5


def bf16(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape, np.float32), jnp.bfloat16)


def f64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def silu(x):
    return x / (1 + np.exp(-x))


def rms_normed(x):
    return x / np.sqrt((x * x).mean() + EPS)


MADE = {
    "normed": lambda x, w: rms_normed(x) * w,
    "plain": lambda x: x,
    "silu": lambda h: silu(h[: h.size // 2]) * h[h.size // 2 :],
    "gated_norm": lambda y, z, w: rms_normed(y * silu(z[: y.size])) * w,
    "norm_gate": lambda y, z, w: rms_normed(y) * w * silu(z[: y.size]),
}


@pytest.mark.parametrize(
    ("name", "n_inputs", "columns"),
    [
        ("normed", K, (128, 64)),
        ("normed", 2 * K, (64,)),
        ("silu", 2 * K, (64,)),
        ("gated_norm", 2 * K, (64,)),
        pytest.param("norm_gate", K, (64,), marks=pytest.mark.slow),
        pytest.param("plain", K, (64,), marks=pytest.mark.slow),
        pytest.param("normed", K, (6400,), marks=pytest.mark.slow),
    ],
)
def test_products(name, n_inputs, columns):
    from pallas_kernels.one_token.vectors import VECTORS

    rng, vector = np.random.default_rng(0), VECTORS[name]
    parts = [bf16(rng, 1, width * n_inputs, scale=2.0) for width in vector.widths]
    if vector.root is not None:
        parts[-1] = jnp.asarray(rng.uniform(0.5, 2, n_inputs), jnp.float32)
    if len(parts) == 3:  # what stands behind the gate is not read
        parts[1] = jnp.concatenate([parts[1], jnp.full_like(parts[1], jnp.nan)], axis=1)
    weights = [bf16(rng, n_inputs, n, scale=n_inputs**-0.5) for n in columns]
    with mosaic_interpreted():
        found = one_token.products(name, parts, weights, eps=EPS)
    v = MADE[name](*(part.reshape(-1) for part in f64(*parts)))
    for y, w in zip(found, weights, strict=True):
        assert y.shape == (1, w.shape[1])
        check_close(np.asarray(y[0], np.float64), v @ np.asarray(w, np.float64), dtype="bfloat16", what="y")


@pytest.mark.parametrize(
    ("heads", "width", "groups", "bias", "limit"),
    [(2, 64, 2, True, (0.0, np.inf)), (2, 128, 1, False, (0.2, 0.4))],
)
def test_a_step_of_mamba2(heads, width, groups, bias, limit):
    from pallas_kernels.one_token.mamba2_step import mamba2_step

    rng, (B, N, W) = np.random.default_rng(2), (2, 128, 4)
    zx, BC, dt = bf16(rng, B, 2, heads, width), bf16(rng, B, 2, groups, N), bf16(rng, B, heads, scale=4.0)
    windows = [bf16(rng, B, W - 1, heads, width), bf16(rng, B, W - 1, 2, groups, N)]
    state = jnp.asarray(rng.standard_normal((B, heads, width, N)), jnp.float32)
    shapes = [(heads, width, W), (heads, width), (2, groups, N, W), (2, groups, N), (heads,), (heads,), (heads,)]
    drawn = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    weights = one_token.Weights(*(None if i in (1, 3) and not bias else a for i, a in enumerate(drawn)))
    with mosaic_interpreted():
        found = jax.jit(lambda *a: mamba2_step(*a, weights, dt_limit=limit))(zx, BC, dt, *windows, state)

    taken = [
        np.concatenate([*f64(old), *f64(new[:, None])], axis=1)
        for old, new in zip(windows, (zx[:, 1], BC), strict=True)
    ]
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


def test_what_is_served():
    assert one_token.product_fits(2048, 64) and not one_token.product_fits(2048, 40)
    assert not one_token.product_fits(1000, 64) and not one_token.product_fits(16384, 64)
    assert one_token.step_fits(64, 128) and not one_token.step_fits(32, 128) and not one_token.step_fits(64, 64)
    assert one_token.why_not(jnp.bfloat16)  # of a CPU
