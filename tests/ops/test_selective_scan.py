# SPDX-License-Identifier: Apache-2.0
"""selective_scan: the blocked version against the token-by-token recurrence in float64; the contract's properties."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import assume_platform, selective_scan
from pallas_kernels.layouts import LAYOUTS
from pallas_kernels.ops.selective_scan import cases, xla
from tests.ops import contract
from tests.ops.support import check_against_oracle, check_by_one_program, check_curvature, check_outputs

BASE = cases.Case("base", 2, 40, 6, 4, 2, initial=True, final=True, decay="mixed", seed=3)
BY_TOKEN = ("x", "dt", "B", "C")
SETTINGS = {"implementation": "xla", "return_final_state": True}


def make(**changes):
    return cases.make_inputs(cases.Case(**{**BASE.__dict__, **changes}))


@pytest.fixture
def blocked(monkeypatch):
    """Chunks of 16 tokens in 4 blocks, as off the CPU; the CPU's own choice is one block."""
    monkeypatch.setattr(xla, "_sizes", lambda chunk, n_tokens: (16, 4))


RARELY = ("short", "weak", "strong", "zero_dt", "scattered")
"""Cases whose like is among the others, or in the contract; they are slow."""


@pytest.mark.quick
@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in RARELY)) for case in cases.TEST_CASES
])  # fmt: skip
def test_equals_the_recurrence(case):
    """Those that differ in documents or decays alone in one shape: they share programs."""
    tokens = 70 if case.layout != "dense" else 100 if case.name == "zero_dt" else case.tokens
    inputs = cases.make_inputs(dataclasses.replace(case, tokens=tokens))
    check_by_one_program("selective_scan", inputs, implementation="xla", return_final_state=case.final, chunk=32)


@pytest.mark.parametrize("name", ["one_token", "groups", "mixed", "packed", "scattered", "empty"])
def test_blocks_equal_the_recurrence(name, blocked):
    case = cases.CASES[name]
    inputs = cases.make_inputs(dataclasses.replace(case, tokens=70) if case.layout != "dense" else case)
    check_by_one_program("selective_scan", inputs, change="blocked", **SETTINGS)


@pytest.mark.parametrize(("n_tokens", "chunk"), [(1, None), (7, None), (300, None), (4096, 512), (10, 3)])
def test_sizes_off_the_cpu(n_tokens, chunk):
    with assume_platform("gpu"):
        tokens, blocks = xla._sizes(chunk, n_tokens)
    assert tokens % blocks == 0
    assert min(chunk or 256, n_tokens) <= tokens <= 1.5 * min(chunk or 256, n_tokens)


@pytest.mark.slow
@settings(max_examples=80, derandomize=False)
@given(
    tokens=st.integers(1, 50),
    groups=st.sampled_from([None, 1, 3]),
    layout=st.sampled_from(LAYOUTS),
    decay=st.sampled_from(cases.DECAYS),
    sizes=st.sampled_from([(1, 1), (7, 1), (64, 1), (8, 2), (12, 4)]),
    skip=st.booleans(),
    final=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_the_recurrence_on_drawn_shapes(tokens, groups, layout, decay, sizes, skip, final, seed):
    case = cases.Case("drawn", 2, tokens, 3, 4, groups, layout, decay, skip, final, final, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_sizes", lambda chunk, n_tokens: sizes)
        check_against_oracle("selective_scan", cases.make_inputs(case), implementation="xla", return_final_state=final)


@pytest.mark.parametrize(("name", "steps"), [("mixed", "float32"), ("scattered", "bfloat16")])
def test_bfloat16(name, steps):
    """Step sizes too: those that are given in it are exact, and their gradient is in it."""
    inputs = cases.make_inputs(cases.CASES[name], "bfloat16")
    inputs["dt"] = inputs["dt"].astype(jnp.dtype(steps))
    check_against_oracle("selective_scan", inputs, dtype="bfloat16", **SETTINGS)


def test_small_steps_survive_large_ones_in_one_chunk(blocked):
    """dt A of -80 every fourth token, then steps of -1e-6 that must still be seen, in gradients too."""
    inputs = make(batch=1, tokens=64, groups=None, decay="typical")
    steps = np.where(np.arange(64) % 4 == 0, 80.0, 1e-6) * (np.arange(64) < 40) + 1e-6 * (np.arange(64) >= 40)
    inputs["dt"] = np.broadcast_to(steps[None, :, None], (1, 64, 6)).astype(np.float32)
    check_against_oracle("selective_scan", inputs, **SETTINGS)


def test_long():
    check_against_oracle(
        "selective_scan", make(batch=1, tokens=3000, width=3, groups=None, layout="packed"), **SETTINGS
    )


def test_padding_in_blocks(blocked):
    with contract.compiling_anew():
        contract.check_padding(contract.Subject("selective_scan", "xla"))


def test_second_derivative():
    inputs = {k: jnp.asarray(v) for k, v in make(tokens=12, decay="typical").items() if v is not None}

    def loss(A):
        y = selective_scan(inputs["x"], inputs["dt"], A, inputs["B"], inputs["C"], D=inputs["D"], chunk=8)
        return jnp.sum(y**2)

    check_curvature(loss, inputs["A"])


def test_memory_is_linear_and_small():
    def shapes(tokens):
        s = jax.ShapeDtypeStruct
        return (s((1, tokens, 32), jnp.bfloat16), s((1, tokens, 32), jnp.float32), s((32, 16), jnp.float32),
                s((1, tokens, 16), jnp.bfloat16), s((1, tokens, 16), jnp.bfloat16))  # fmt: skip

    def temporary(tokens):
        f = jax.jit(jax.grad(lambda *a: jnp.sum(selective_scan(*a).astype(jnp.float32)), argnums=(0, 1, 2, 3, 4)))
        return f.lower(*shapes(tokens)).compile().memory_analysis().temp_size_in_bytes

    states = 4 * 32 * 16  # bytes of a state
    assert temporary(1 << 15) < 2.2 * temporary(1 << 14)
    assert temporary(1 << 14) < 0.6 * states * (1 << 14)
    kept = jax.eval_shape(lambda *a: jax.vjp(selective_scan, *a)[1], *shapes(4096))
    given_bytes = sum(a.size * a.dtype.itemsize for a in shapes(4096))
    kept_bytes = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept))
    assert kept_bytes < given_bytes + 1.1 * states * 4096 / 64


@pytest.mark.parametrize("name", ["_decay", "_advance", "_carry", "_through"])
def test_a_one_percent_error_is_seen(name, monkeypatch, blocked):
    """Guards the tests themselves: each part of the implementation, off by 1%, fails the comparison."""
    original = getattr(xla, name)
    monkeypatch.setattr(xla, name, lambda *args, **kwargs: original(*args, **kwargs) * 1.01)
    with pytest.raises(AssertionError, match="relative RMS"):
        check_outputs("selective_scan", make(decay="weak"), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 40), np.float32)}, ValueError, r"x_BTD has shape \[2, 40\]"),
        ({"x": np.zeros((2, 40, 6), np.int32)}, TypeError, "x_BTD has dtype int32"),
        ({"dt": np.zeros((2, 40, 1), np.float32)}, ValueError, r"dt_BTD has shape \[2, 40, 1\], expected \[2, 40, 6\]"),
        ({"dt": np.zeros((2, 40, 6), np.int32)}, TypeError, "dt_BTD has dtype int32, expected bfloat16"),
        ({"A": np.zeros((3, 4), np.float32)}, ValueError, "A_DN has shape"),
        ({"B": np.zeros((2, 40, 5), np.float32)}, ValueError, r"B_BTN has shape \[2, 40, 5\], expected \[2, 40, 4\]"),
        ({"B": np.zeros((2, 40, 3, 4), np.float32)}, ValueError, "C_BTN has shape"),
        ({"B": np.zeros((2, 40, 4, 4), np.float32), "C": np.zeros((2, 40, 4, 4), np.float32)}, ValueError,
         r"channels of x_BTD \(6\) not divisible by groups of B_BTN \(4\)"),
        ({"D": np.zeros((7,), np.float32)}, ValueError, "D has shape"),
        ({"segment_ids": np.zeros((2, 39), np.int32)}, ValueError, r"segment_ids has shape \[2, 39\]"),
        ({"initial_state": np.zeros((2, 6, 5), np.float32)}, ValueError, "initial_state has shape"),
        ({"chunk": 0}, ValueError, r"chunk \(0\) below its minimum \(1\)"),
        ({"implementation": "gpu"}, NotImplementedError, r"implementation \('gpu'\) of selective_scan"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_limit(change, error, message):
    arguments = {**make(), **change}
    with pytest.raises(error, match=message):
        selective_scan(*[arguments.pop(name) for name in ("x", "dt", "A", "B", "C")], **arguments)
