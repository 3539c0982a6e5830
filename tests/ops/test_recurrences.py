# SPDX-License-Identifier: Apache-2.0
"""The recurrences in chunks: their cases against the float64 recurrence, decays of any size, memory, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import chunks, ops, oracle
from pallas_kernels.layouts import DECAYS, LAYOUTS
from pallas_kernels.ops import OPS
from tests.ops.support import QUICK, check_against_oracle, check_outputs, run
from tests.ops.support import oracle as wide

BY_DEFAULT = {
    "gated_delta_product": (),
    "gated_delta_rule": ("head",),
    "linear_attention": ("bonus", "head_packed"),
    "linear_scan": ("empty",),
    "long_conv": ("many_lags",),
    "mamba3": (),
    "mlstm": ("large_gates",),
    "rwkv4": ("large_keys",),
    "rwkv7": ("mixed",),
    "slstm": ("slabs",),
    "titans": (),
}
"""By op: cases that neither the contract's own nor test_golden.py shows and that are compared each time; the others are
slow."""

CHUNKED = ("gated_delta_rule", "gated_delta_product", "linear_attention", "rwkv7", "mamba3", "mlstm")


def inputs_of(name: str, dtype: str = "float32", **changes) -> dict:
    module = OPS[name].cases_module()
    inputs = module.make_inputs(dataclasses.replace(module.CONTRACT["xla"], **changes), dtype)
    return {key: array for key, array in inputs.items() if array is not None}


def settings_of(name: str, **changes) -> dict:
    return {**OPS[name].cases_module().make_settings(OPS[name].cases_module().CONTRACT["xla"]), **changes}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=[pytest.mark.slow] * (case.name not in BY_DEFAULT[name]),
                     id=f"{name}-{case.name}")
        for name in BY_DEFAULT
        for case in OPS[name].cases_module().TEST_CASES
    ],
)  # fmt: skip
def test_equals_the_recurrence(name, case):
    module = OPS[name].cases_module()
    check_against_oracle(name, module.make_inputs(case), implementation="xla", **module.make_settings(case))


def test_cases_named_here_are_there():
    for name, cases in BY_DEFAULT.items():
        assert {*cases} <= {case.name for case in OPS[name].cases_module().TEST_CASES}, name


@pytest.mark.slow
@settings(max_examples=5, derandomize=False)  # each is a program to compile
@given(
    tokens=st.integers(1, 40),
    layout=st.sampled_from(LAYOUTS),
    decay=st.sampled_from(DECAYS),
    chunk=st.sampled_from([1, 4, 16, None]),
    seed=st.integers(0, 10**6),
)
@pytest.mark.parametrize("name", [*CHUNKED, "linear_scan", "long_conv", "rwkv4", "slstm", "titans"])
def test_equals_the_recurrence_on_drawn_shapes(name, tokens, layout, decay, chunk, seed):
    changes = {"tokens": tokens, "layout": layout, "seed": seed}
    changes |= {"decay": decay} if name not in ("mlstm", "slstm", "long_conv", "titans") else {}
    more = {"chunk": chunk} if name in CHUNKED else {}
    check_against_oracle(name, inputs_of(name, **changes), implementation="xla", **settings_of(name, **more))


# Decays.


def segment_sums(steps):
    """[Q, Q]: sums over (j, i], float64."""
    size = steps.shape[0]
    never = np.full_like(steps[0], -np.inf)
    return np.array([[steps[j + 1 : i + 1].sum(0) if i >= j else never for j in range(size)] for i in range(size)])


def test_sums_between_tokens_lose_no_small_step_behind_a_large_one():
    """Log decays of -1e4 before steps of -1e-6: relative to each sum, not to what stands before it."""
    rng = np.random.default_rng(0)
    steps = -np.exp(rng.uniform(np.log(1e-6), np.log(1e4), (32, 1))).astype(np.float32)
    weights = jax.jit(lambda steps: chunks.log_weights(chunks.log_decays_of(steps, None)), compiler_options=QUICK)
    found = np.asarray(weights(steps[None, None, None]))[0, 0, 0]
    expected = segment_sums(steps.astype(np.float64))[..., 0]
    below = np.tril_indices(32, -1)
    np.testing.assert_allclose(found[below], expected[below], rtol=3e-6)
    assert np.isneginf(found[np.triu_indices(32, 1)]).all() and not found.diagonal().any()


@pytest.mark.parametrize("exclusive", [False, True])
def test_products_by_channel_are_those_of_all_pairs(exclusive):
    rng = np.random.default_rng(1)
    rows, cols = rng.standard_normal((2, 16, 3))
    steps = -np.exp(rng.uniform(np.log(1e-3), np.log(1e2), (16, 3)))
    given = [array.astype(np.float32)[None, None, None] for array in (rows, cols, steps)]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def products(rows, cols, steps):
        return chunks.products(rows, cols, chunks.decays_of(steps, None), exclusive=exclusive)[0, 0, 0]

    found = products(*given)
    sums = segment_sums(steps)
    shifted = np.concatenate([np.full_like(sums[:1], -np.inf), sums[:-1]])  # up to the token before i
    pairs = np.exp(shifted if exclusive else sums) * rows[:, None] * cols[None]
    np.testing.assert_allclose(found, pairs.sum(-1), atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_inverse_of_a_triangle(size):
    below = np.tril(np.random.default_rng(2).standard_normal((3, size, size)), -1) / np.sqrt(size)
    inverse = jax.jit(chunks.unit_inverse, compiler_options=QUICK)(below.astype(np.float32))
    found = np.asarray(inverse, np.float64)
    np.testing.assert_allclose(found @ (np.eye(size) + below), np.broadcast_to(np.eye(size), below.shape), atol=3e-5)


@pytest.mark.parametrize(
    ("asked", "tokens", "found"), [(None, 5000, 64), (7, 5000, 8), (64, 5, 8), (1, 9, 1), (999, 999, 256)]
)
def test_chunks_are_powers_of_two_that_fit(asked, tokens, found):
    assert chunks.chunk_size(asked, tokens) == found


@pytest.mark.parametrize("name", ["gated_delta_rule", "linear_attention", "linear_scan"])
def test_a_log_decay_of_minus_infinity_forgets(name):
    """As a document that starts there: values and gradients, none of them NaN."""
    inputs = inputs_of(name)
    inputs["g"][:, 11] = -np.inf
    more = {"normalize": False} if name == "gated_delta_rule" else {}
    found = run(name, inputs, **settings_of(name, implementation="xla", **more))
    expected = wide(name, inputs, **settings_of(name, **more))
    for tensor, (error, limit) in oracle.errors(name, found, expected, "float32").items():
        assert error <= limit, tensor
    assert not found["dg"][:, 11].any()


@pytest.mark.parametrize("part", ["unit_inverse", "products", "decays_of", "carry"])
def test_a_one_percent_error_is_seen(part, monkeypatch):
    """Guards the tests themselves: each part of the chunked forms, off by 1%, fails the comparison."""
    original = getattr(chunks, part)
    scaled = lambda tree: jax.tree.map(lambda a: 1.01 * a if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
    monkeypatch.setattr(chunks, part, lambda *args, **kwargs: scaled(original(*args, **kwargs)))
    with pytest.raises(AssertionError, match="relative RMS"):
        check_outputs("gated_delta_rule", inputs_of("gated_delta_rule", decay="weak"), implementation="xla",
                      **settings_of("gated_delta_rule"))  # fmt: skip


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHUNKED, "linear_scan", "long_conv", "rwkv4", "slstm", "titans"])
def test_memory_is_linear(name):
    """Of forward and backward: twice the tokens, at most 2.2 times the memory; nothing is [T, T] or [T, N, P]."""
    module = OPS[name].cases_module()

    def temporary(tokens: int) -> int:
        case = dataclasses.replace(module.CONTRACT["xla"], tokens=tokens, batch=1)
        inputs = {n: a for n, a in module.make_inputs(case).items() if a is not None and n != "segment_ids"}
        more = {"chunk": None} if name in CHUNKED else {}

        def loss(arrays):
            return sum(jnp.sum(o) for o in oracle.call(name, arrays, implementation="xla", **settings_of(name, **more)))

        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)
        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1 << 15) < 2.2 * temporary(1 << 14)


# Errors.


def error_cases():
    zeros = lambda *shape, dtype=np.float32: np.zeros(shape, dtype)
    delta = [
        ({"v": zeros(2, 24, 4)}, ValueError, r"v_BTHP has shape \[2, 24, 4\]"),
        ({"v": zeros(2, 24, 3, 4)}, ValueError, r"heads of v_BTHP \(3\) not divisible by groups of q_BTGN \(2\)"),
        ({"k": zeros(2, 24, 2, 7)}, ValueError, r"k_BTGN has shape \[2, 24, 2, 7\], expected \[2, 24, 2, 8\]"),
        ({"q": zeros(2, 24, 2, 8, dtype=np.int32)}, TypeError, "q_BTGN has dtype int32"),
        ({"beta": zeros(2, 24, 2)}, ValueError, "beta_BTH has shape"),
        ({"beta": zeros(2, 24, 4, dtype=np.float16)}, TypeError, "beta_BTH has dtype float16"),
        ({"g": zeros(2, 24, 4, 7)}, ValueError, r"g has shape \[2, 24, 4, 7\], expected \[2, 24, 4, 8\]"),
        ({"g": zeros(2, 24)}, ValueError, r"g has shape \[2, 24\], expected \[2, 24, 4\]"),
        ({"initial_state": zeros(2, 4, 4, 8)}, ValueError, "initial_state has shape"),
        ({"segment_ids": zeros(2, 23, dtype=np.int32)}, ValueError, r"segment_ids has shape \[2, 23\]"),
        ({"chunk": 0}, ValueError, r"chunk \(0\) below its minimum \(1\)"),
        ({"implementation": "gpu"}, NotImplementedError, r"implementation \('gpu'\) of gated_delta_rule"),
    ]
    linear = [
        ({"g": zeros(3)}, ValueError, r"g has shape \[3\], expected \[4\]"),
        ({"bonus": zeros(4, 7)}, ValueError, r"bonus has shape \[4, 7\], expected \[4, 8\]"),
        ({"feature_map": "elu"}, ValueError, r"feature_map \('elu'\) not one of None, 'taylor'"),
        ({"feature_map": "taylor", "bonus": zeros(4, 8)}, ValueError, r"bonus and feature_map \('taylor'\) cannot be"),
        ({"feature_map": "taylor"}, ValueError, r"g of shape \[2, 24, 4, 8\] decays by key channel"),
        ({"normalizer": True}, ValueError, r"initial_state has shape \[2, 4, 8, 4\], expected \[2, 4, 8, 5\]"),
    ]
    mamba3 = [
        ({"mimo_o": None}, ValueError, "mimo_v and mimo_o go together"),
        ({"mimo_z": None}, ValueError, "mimo_z goes with mimo_v and z: it is missing"),
        ({"angles": zeros(2, 24, 4, 5)}, ValueError, "angles_BTHS has 5 angles, k has 4 pairs of channels"),
        ({"rotary_pairs": "all"}, ValueError, r"rotary_pairs \('all'\) not one of 'adjacent', 'half'"),
        ({"initial_ssm": None}, ValueError, "initial_ssm is None, other initial states are not"),
        ({"initial_state": zeros(1)}, TypeError, "unexpected argument 'initial_state'"),
        ({"D": zeros(3)}, ValueError, r"D has shape \[3\], expected \[4\]"),
    ]
    others = {
        "gated_delta_product": [({"k": zeros(2, 24, 3, 2, 8)}, ValueError, "k_BTRGN has shape")],
        "titans": [
            (
                {"refresh_every": 5, "store_every": 2},
                ValueError,
                r"refresh_every \(5\) not a multiple of store_every \(2\)",
            ),
            ({"W2": zeros(2, 4, 4)}, ValueError, r"W2_HFP has shape \[2, 4, 4\], expected \[2, 16, 8\]"),
            ({"initial_state": zeros(2, 2, 9)}, ValueError, r"expected \[2, 2, 1059\]"),
        ],
        "long_conv": [({"h": zeros(0, 4)}, ValueError, "h_SD has 0 lags, at least 1 is needed")],
        "rwkv4": [({"g": zeros(5)}, ValueError, r"g_D has shape \[5\], expected \[4\]")],
        "rwkv7": [({"a": zeros(2, 24, 2, 7)}, ValueError, "a_BTHN has shape")],
        "linear_scan": [({"g": zeros(2, 24, 5)}, ValueError, "g_BTD has shape")],
        "mlstm": [({"initial_m": None}, ValueError, "initial_m is None, other initial states are not")],
        "slstm": [({"R": zeros(2, 3, 4, 4)}, ValueError, r"R_HGPP has shape \[2, 3, 4, 4\], expected \[2, 4, 4, 4\]")],
    }
    for name, found in {"gated_delta_rule": delta, "linear_attention": linear, "mamba3": mamba3, **others}.items():
        yield from (pytest.param(name, *case, id=f"{name}-{i}") for i, case in enumerate(found))


@pytest.mark.parametrize(("name", "change", "error", "message"), list(error_cases()))
def test_errors_name_argument_value_and_limit(name, change, error, message):
    arguments = {**inputs_of(name), **settings_of(name), **change}
    positional = [arguments.pop(key) for key in OPS[name].positional]
    with pytest.raises(error, match=message) as raised:
        ops.function(name)(*positional, **arguments)
    assert "\n" not in str(raised.value).partition("\n---")[0]


@pytest.mark.parametrize("activation", ["heavy_tail", "softplus"])
def test_decay_rates_of_mamba3(activation):
    raw = jnp.linspace(-30.0, 30.0, 61)
    rates = ops.mamba3.api.decay_rates(raw, activation, floor=1e-2)
    assert (rates <= -1e-2).all() and (jnp.diff(rates) <= 0).all()
    expected = {"heavy_tail": -31.0, "softplus": -30.0}[activation]
    np.testing.assert_allclose(rates[-1], expected, rtol=1e-6)
    slopes = jax.vmap(jax.grad(lambda x: ops.mamba3.api.decay_rates(x, activation)))(raw)
    assert jnp.isfinite(slopes).all()
    with pytest.raises(ValueError, match=r"activation \('relu'\) not one of 'heavy_tail', 'softplus'"):
        ops.mamba3.api.decay_rates(raw, "relu")
