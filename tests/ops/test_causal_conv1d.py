# SPDX-License-Identifier: Apache-2.0
"""causal_conv1d: shifts and adds against direct taps in float64, and the properties of the contract."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import causal_conv1d
from pallas_kernels.layouts import LAYOUTS
from pallas_kernels.ops.causal_conv1d import cases, documents, xla
from tests.ops.support import check_against_oracle, check_by_one_program


def options(case):
    return {**cases.make_settings(case), "implementation": "xla"}


@pytest.mark.quick
@pytest.mark.parametrize("case", cases.TEST_CASES, ids=lambda case: case.name)
def test_equals_direct_taps(case):
    check_by_one_program("causal_conv1d", cases.make_inputs(case), **options(case))


DRAWN = dict(
    tokens=st.integers(1, 40),
    taps=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from([None, "silu"]),
    bias=st.booleans(),
    state=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=2)
@given(**DRAWN)
def test_equals_direct_taps_on_drawn_shapes(**drawn):
    check_drawn(**drawn)


@pytest.mark.slow
@settings(max_examples=30, derandomize=False)
@given(**DRAWN)
def test_equals_direct_taps_on_many_drawn_shapes(**drawn):
    check_drawn(**drawn)


def check_drawn(tokens, taps, layout, activation, bias, state, seed):
    case = cases.Case("drawn", 2, tokens, 5, taps, layout, activation, bias, state, state, seed)
    check_against_oracle("causal_conv1d", cases.make_inputs(case), **options(case))


@pytest.mark.parametrize("name", ["packed", "scattered"])
def test_bfloat16(name):
    case = cases.CASES[name]
    check_against_oracle("causal_conv1d", cases.make_inputs(case, "bfloat16"), dtype="bfloat16", **options(case))


def test_causal():
    inputs = cases.make_inputs(cases.Case("causal", 1, 20, 3, 4))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(causal_conv1d(x, inputs["w"])[:, 10])))(inputs["x"])
    assert not np.any(grad[:, 11:])
    assert not np.any(grad[:, :7])
    assert np.all(grad[:, 7:11])


def test_usual_padding_takes_the_straight_path(monkeypatch):
    """Padding that no pair of tokens spans costs no move of the tokens."""
    taken = []
    monkeypatch.setattr(jax.lax, "cond", lambda moves, *ways: taken.append(bool(moves)) or ways[1](*ways[2:]))
    for layout, state, moves in [
        ("packed", True, False), ("right", True, False), ("empty", True, False), ("left", False, False),
        ("left", True, True), ("scattered", False, True),
    ]:  # fmt: skip
        inputs = cases.make_inputs(cases.Case("case", 2, 20, 3, 4, layout, initial=state))
        options = {name: inputs[name] for name in ("segment_ids", "initial_state")}
        causal_conv1d(inputs["x"], inputs["w"], **options, implementation="xla")
        assert taken.pop() == moves, layout


@pytest.mark.parametrize("layout", ["packed", "edges", "singles", "right"])
def test_promised_absence_of_gaps_spares_the_decision(layout, monkeypatch):
    monkeypatch.setattr(jax.lax, "cond", None)
    case = cases.Case("case", 2, 20, 3, 4, layout, initial=True, final=True)
    check_by_one_program("causal_conv1d", cases.make_inputs(case), change="cond", **options(case), gaps=False)


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass():
    inputs = cases.make_inputs(cases.Case("kept", 2, 64, 128, 4, "packed"), "bfloat16")
    conv = lambda x: causal_conv1d(x, inputs["w"], activation="silu", segment_ids=inputs["segment_ids"])
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(conv, x)[1], inputs["x"]))
    assert sum(a.size * a.dtype.itemsize for a in kept) < 1.3 * inputs["x"].nbytes


@pytest.mark.parametrize("name", ["_sums", "_final_state", "_taps"])
def test_a_one_percent_error_is_seen(name, monkeypatch):
    module = documents if name == "_final_state" else xla
    original = getattr(module, name)

    def off(*args):
        out = original(*args)
        return [(tap * 1.01, counts) for tap, counts in out] if name == "_taps" else out * 1.01

    monkeypatch.setattr(module, name, off)
    with pytest.raises(AssertionError, match="relative RMS"):
        case = cases.CASES["packed"]
        check_against_oracle("causal_conv1d", cases.make_inputs(case), **options(case))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 50), np.float32)}, ValueError, r"x_BTD has shape \[2, 50\]"),
        ({"w": np.zeros((5, 4), np.float32)}, ValueError, r"w_DW has shape \[5, 4\], expected \[6, any\]"),
        ({"w": np.zeros((6, 0), np.float32)}, ValueError, "w_DW has 0 taps, at least 1"),
        ({"b": np.zeros(5, np.float32)}, ValueError, "b_D has shape"),
        ({"activation": "gelu"}, ValueError, r"activation \('gelu'\) not one of None, 'silu'"),
        ({"segment_ids": np.zeros((2, 41), np.int32)}, ValueError, "segment_ids has shape"),
        ({"initial_state": np.zeros((2, 4, 6), np.float32)}, ValueError, r"\[2, 4, 6\], expected \[2, 3, 6\]"),
        ({"implementation": "triton"}, ValueError, r"implementation \('triton'\)"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_limit(change, error, message):
    arguments = {**cases.make_inputs(cases.CASES["packed"]), **change}
    with pytest.raises(error, match=message):
        causal_conv1d(*[arguments.pop(name) for name in ("x", "w", "b")], **arguments)
