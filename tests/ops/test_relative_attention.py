# SPDX-License-Identifier: Apache-2.0
"""`relative_attention`: its cases against the float64 reference, attention as the case of no terms, memory, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, relative_attention
from pallas_kernels.ops.relative_attention import cases, xla
from tests.ops.support import QUICK, check_against_oracle
from tests.tolerances import check_close

BY_DEFAULT = ("blocks_window_far", "far", "scattered")
CASES = [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name not in BY_DEFAULT))
         for case in cases.TEST_CASES]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    inputs, settings = cases.make_inputs(case), cases.make_settings(case)
    check_against_oracle("relative_attention", inputs, implementation="xla", **settings)


def compiled(function, **settings):
    return jax.jit(functools.partial(function, **settings), compiler_options=QUICK)


def drawn(batch=2, tokens=24, heads=4, kv_heads=2, width=8, profiles=3, extent=5):
    """q, k, v, r and profiles."""
    made = cases.make_inputs(cases.Case("drawn", batch, tokens, heads, kv_heads, width, extent, profiles))
    return [made[name] for name in ("q", "k", "v", "r", "profiles")]


@pytest.mark.parametrize("window", [None, 6])
def test_without_terms_it_is_attention(window):
    q, k, v, r, profiles = drawn(tokens=40)
    ids = np.repeat([[1, 2, 0]], (18, 15, 7), axis=1).repeat(2, axis=0).astype(np.int32)
    run = compiled(relative_attention, window=window)
    expected = compiled(attention, window=window)(q, k, v, segment_ids=ids)
    check_close(run(q, k, v, 0 * r, profiles, segment_ids=ids), expected, dtype="float32", what="no terms")
    assert np.abs(run(q, k, v, r, profiles, segment_ids=ids) - expected).max() > 1e-2


def test_a_term_that_grows_with_the_distance_weighs_as_it_says():
    """One key a query: with q = 0 the weights are the softmax of the terms alone, written out here."""
    q, k, v, r, _ = drawn(batch=1, tokens=7, heads=1, kv_heads=1, profiles=1, extent=3)
    slope = np.array([[0.0, 1.0, 2.0]], np.float32)
    found = np.asarray(compiled(relative_attention)(0 * q, k, v, np.ones_like(r), slope))
    for t in range(7):
        terms = np.array([slope[0, t - s] if t - s < 3 else 0.0 for s in range(t + 1)])
        weights = np.exp(terms) / np.exp(terms).sum()
        np.testing.assert_allclose(found[0, t, 0], weights @ v[0, : t + 1, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("positions", [False, True])
def test_queries_of_a_cache(positions):
    """Behind 20 others, by pairs: what all 24 give, for the last four."""
    q, k, v, r, profiles = drawn()
    run = compiled(relative_attention)
    whole = run(q, k, v, r, profiles)
    at, everywhere = (np.tile(np.arange(start, 24, dtype=np.int32), (2, 1)) for start in (20, 0))
    turned = everywhere[:, ::-1] if positions else everywhere  # keys in any order, as their positions are
    keys = [a[:, ::-1] if positions else a for a in (k, v)]
    last = run(q[:, 20:], *keys, r[:, 20:], profiles, positions=(at, turned))
    check_close(last, whole[:, 20:], dtype="float32", what="the last four")


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 64])
def test_memory_is_of_blocks(window):
    """Of forward and backward: twice the tokens, a little more than twice the memory; nothing is [T, T]."""

    def temporary(tokens: int) -> int:
        case = cases.Case("long", 1, tokens, 2, 1, 8, 64, window=window)
        arrays = [a for a in cases.make_inputs(case).values() if a is not None]

        def loss(arrays):
            return relative_attention(*arrays, window=window).sum()

        compiled = jax.jit(jax.grad(loss)).lower([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1 << 14) < 2.3 * temporary(1 << 13)
    assert temporary(1 << 14) < 4 * 2 * (1 << 14) ** 2  # of scores alone


@pytest.mark.parametrize("part", ["_banded", "_gathered"])
def test_a_one_percent_error_is_seen(part, monkeypatch):
    original = getattr(xla, part)
    monkeypatch.setattr(xla, part, lambda *args: 1.01 * original(*args))
    case = cases.CASES["dense" if part == "_banded" else "positions"]
    with pytest.raises(AssertionError, match="relative RMS"):
        check_against_oracle("relative_attention", cases.make_inputs(case), implementation="xla")


ERRORS = (
    ({"k": jnp.zeros((2, 24, 3, 8)), "v": jnp.zeros((2, 24, 3, 8))}, ValueError,
     r"heads of q_BTHP \(4\) not divisible by heads of k_BSKP \(3\)"),
    ({"k": jnp.zeros((2, 24, 2, 7))}, ValueError, r"k_BSKP has shape \[2, 24, 2, 7\], expected \[2, any, any, 8\]"),
    ({"r": jnp.zeros((2, 24, 4, 2))}, ValueError, r"profiles_RE has shape \[3, 5\], expected \[2, any\]"),
    ({"profiles": jnp.zeros((3, 0))}, ValueError, r"profiles_RE has 0 distances, at least 1 is needed"),
    ({"q": jnp.zeros((2, 24, 4, 8), int)}, TypeError, "q_BTHP has dtype int"),
    ({"window": 0}, ValueError, r"window \(0\) below its minimum \(1\)"),
    ({"segment_ids": np.zeros((2, 23), np.int32)}, ValueError, r"segment_ids has shape \[2, 23\]"),
    ({"positions": (np.zeros((2, 24), np.int32),)}, ValueError, "positions has 1 arrays, expected a pair"),
    ({"implementation": "gpu"}, NotImplementedError, r"implementation \('gpu'\) of relative_attention"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_argument_value_and_limit(change, error, message):
    given = dict(zip(("q", "k", "v", "r", "profiles"), drawn(), strict=True)) | change
    arrays = [given.pop(name) for name in ("q", "k", "v", "r", "profiles")]
    with pytest.raises(error, match=message) as raised:
        relative_attention(*arrays, **given)
    assert "\n" not in str(raised.value).partition("\n---")[0]
