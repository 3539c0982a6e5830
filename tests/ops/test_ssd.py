# SPDX-License-Identifier: Apache-2.0
"""ssd: the chunked version against the token-by-token recurrence in float64, and the properties of the contract."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import oracle, platform, ssd
from pallas_kernels.layouts import LAYOUTS
from pallas_kernels.ops.ssd import cases, xla
from tests.ops.ssd_plain import plain_ssd
from tests.ops.support import (
    QUICK,
    check_against_oracle,
    check_by_one_program,
    check_curvature,
    check_outputs,
    run,
)
from tests.ops.support import oracle as wide
from tests.tolerances import check_close

BASE = cases.Case("base", 2, 50, 4, 8, 2, 8, skip="HP", initial=True, final=True, decay="mixed", seed=3)


def make(**changes):
    fields = {**BASE.__dict__, **changes}
    return cases.make_inputs(cases.Case(**fields))


RARELY = ("short", "groups_all", "zero_dt", "scattered", "apart")
"""Cases whose like is among the others, or in the contract; they are slow."""


@pytest.mark.quick
@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in RARELY)) for case in cases.TEST_CASES
])  # fmt: skip
def test_equals_the_recurrence(case):
    """Those that differ in documents alone in one shape: they share programs."""
    case = dataclasses.replace(case, tokens=70) if case.layout != "dense" else case
    check_by_one_program("ssd", cases.make_inputs(case), implementation="xla", return_final_state=case.final, chunk=32)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.TEST_CASES, ids=lambda case: case.name)
def test_equals_the_recurrence_optimized(case):
    check_against_oracle(
        "ssd", cases.make_inputs(case), implementation="xla", return_final_state=case.final, optimize=True
    )


@pytest.mark.slow
@settings(max_examples=30, derandomize=False)
@given(
    tokens=st.integers(1, 80),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    layout=st.sampled_from(LAYOUTS),
    decay=st.sampled_from(cases.DECAYS),
    chunk=st.sampled_from([None, 1, 7, 16, 33]),
    skip=st.sampled_from([None, "H", "HP"]),
    final=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_the_recurrence_on_drawn_shapes(tokens, groups, layout, decay, chunk, skip, final, seed):
    case = cases.Case("drawn", 2, tokens, groups[0], 4, groups[1], 8, layout, decay, skip, final, final, seed)
    check_against_oracle("ssd", cases.make_inputs(case), implementation="xla", return_final_state=final, chunk=chunk)


@pytest.mark.parametrize("case", [c for c in cases.TEST_CASES if c.name in ("mixed", "scattered")],
                         ids=lambda case: case.name)  # fmt: skip
def test_bfloat16(case):
    check_against_oracle(
        "ssd", cases.make_inputs(case, "bfloat16"), dtype="bfloat16", implementation="xla", return_final_state=True
    )


@pytest.mark.parametrize("name", ["mixed", "scattered", pytest.param("groups", marks=pytest.mark.slow)])
def test_bfloat16_with_sums_by_one_product(name):
    """As off CPUs."""
    inputs = cases.make_inputs(cases.CASES[name], "bfloat16")
    with platform.assume_platform("gpu", capability="8.0"):
        found = oracle.evaluate("ssd", inputs, implementation="xla", return_final_state=True, chunk=32,
                                compiler_options=QUICK)  # fmt: skip
    expected = wide("ssd", inputs, return_final_state=True)
    for name, (error, limit) in oracle.errors("ssd", found, expected, "bfloat16").items():
        assert error <= limit, f"{name}: relative RMS {error:.2e} above {limit:.0e}"


def test_the_forward_alone_takes_longer_chunks_on_gpus():
    """In 16 bits, where nobody says how long; it is as right as with gradients."""
    inputs = cases.make_inputs(dataclasses.replace(BASE, tokens=70, layout="packed"), "bfloat16")
    arrays, fixed = oracle.split("ssd", inputs)
    y = lambda arrays, chunk: oracle.call("ssd", arrays | fixed, implementation="xla", chunk=chunk)[0]
    with platform.assume_platform("gpu", capability="8.0"):
        alone, long, short = (jax.jit(y, static_argnums=1)(arrays, chunk) for chunk in (None, 64, 32))
        with_gradients = jax.jit(lambda arrays: jax.vjp(lambda a: y(a, None), arrays)[0])(arrays)
    np.testing.assert_array_equal(alone, long)
    np.testing.assert_array_equal(with_gradients, short)
    assert oracle.relative_rms(alone, wide("ssd", inputs)["out0"]) <= oracle.bound("bfloat16")


def test_small_steps_survive_large_sums_in_one_chunk():
    """Steps of -80 add up to -5000 before steps of -1e-6 that must still be seen, in gradients too."""
    case = cases.Case("tail", 1, 256, 2, 8, 1, 8, skip=None, initial=True, final=True)
    inputs = cases.make_inputs(case)
    decay = np.where(np.arange(256) % 4 == 0, 80.0, 1e-6) * (np.arange(256) < 200) + 1e-2 * (np.arange(256) >= 200)
    inputs["dt"] = np.broadcast_to(decay[None, :, None] / -inputs["A"], (1, 256, 2)).astype(np.float32)
    check_against_oracle("ssd", inputs, implementation="xla", return_final_state=True, chunk=256)


def test_gradient_of_A_where_almost_nothing_passes():
    """Only steps of -1e-6 and -80: the gradient of A is a millionth of the sums a careless formula subtracts."""
    rng = np.random.default_rng(0)
    inputs = make(groups=1, decay="weak", tokens=128, initial=False)
    a = np.float32(-4.0)
    inputs["A"] = np.full(4, a)
    inputs["dt"] = (np.where(rng.random((2, 128, 4)) < 0.5, 80.0, 1e-6) / -a).astype(np.float32)
    check_against_oracle("ssd", inputs, implementation="xla", return_final_state=True, chunk=64)


def test_long():
    case = cases.Case("long", 1, 5000, 2, 4, 1, 8, "packed", "mixed", "H", True, True)
    check_against_oracle("ssd", cases.make_inputs(case), implementation="xla", return_final_state=True)


@pytest.mark.slow
def test_very_long():
    case = cases.Case("very_long", 1, 70_000, 1, 4, 1, 4, "dense", "typical", "H", True, True)
    check_against_oracle("ssd", cases.make_inputs(case), implementation="xla", return_final_state=True)


@pytest.mark.parametrize("layout", ["dense", "scattered"])
def test_slabs_are_invisible(layout, monkeypatch):
    monkeypatch.setattr(xla, "_SLAB", 32)
    check_against_oracle(
        "ssd", make(layout=layout, tokens=110), implementation="xla", return_final_state=True, chunk=16
    )


def test_second_derivative():
    inputs = {k: jnp.asarray(v) for k, v in make(tokens=20, decay="typical").items() if v is not None}

    def loss(A):
        y = ssd(inputs["x"], inputs["dt"], A, inputs["B"], inputs["C"], D=inputs["D"], chunk=16)
        return jnp.sum(y**2)

    check_curvature(loss, inputs["A"])


@pytest.mark.quick
def test_sharded_over_batch_and_heads_without_gathers():
    made = make(batch=2, heads=8, groups=1, tokens=40, layout="packed")
    inputs = {k: jnp.asarray(v) for k, v in made.items() if v is not None}
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P = jax.sharding.PartitionSpec
    specs = {
        "x": P("data", None, "tensor"), "dt": P("data", None, "tensor"), "A": P("tensor"), "B": P("data"),
        "C": P("data"), "D": P("tensor"), "segment_ids": P("data"), "initial_state": P("data", "tensor"),
    }  # fmt: skip
    shardings = {k: jax.sharding.NamedSharding(mesh, spec) for k, spec in specs.items()}

    def loss(arrays, segment_ids):
        names = ("x", "dt", "A", "B", "C")
        y, state = ssd(*(arrays[n] for n in names), D=arrays["D"], segment_ids=segment_ids,
                       initial_state=arrays["initial_state"], return_final_state=True, chunk=16)  # fmt: skip
        return jnp.sum(y**2) + jnp.sum(state**2)

    ids = inputs.pop("segment_ids")
    placed = {k: jax.device_put(v, shardings[k]) for k, v in inputs.items()}
    step = jax.jit(jax.grad(loss), out_shardings={k: shardings[k] for k in inputs})
    compiled = step.lower(placed, jax.device_put(ids, shardings["segment_ids"])).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    actual, expected = (
        compiled(placed, jax.device_put(ids, shardings["segment_ids"])),
        jax.jit(jax.grad(loss))(inputs, ids),
    )
    for name in actual:
        check_close(actual[name], expected[name], dtype="float32", what=name)


def test_memory_is_linear_and_small():
    def shapes(tokens):
        s = jax.ShapeDtypeStruct
        return (s((1, tokens, 2, 16), jnp.bfloat16), s((1, tokens, 2), jnp.float32), s((2,), jnp.float32),
                s((1, tokens, 1, 16), jnp.bfloat16), s((1, tokens, 1, 16), jnp.bfloat16))  # fmt: skip

    def temporary(tokens):
        f = jax.jit(jax.grad(lambda *a: jnp.sum(ssd(*a).astype(jnp.float32)), argnums=(0, 1, 2, 3, 4)))
        return f.lower(*shapes(tokens)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1 << 16) < 2.2 * temporary(1 << 15)
    kept = jax.eval_shape(lambda *a: jax.vjp(ssd, *a)[1], *shapes(4096))
    given_bytes = sum(a.size * a.dtype.itemsize for a in shapes(4096))
    assert sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(kept)) < 1.2 * given_bytes


@pytest.mark.parametrize("name", ["_straddling_sums", "_cumulative_sums", "_carry", "_scale"])
def test_a_one_percent_error_is_seen(name, monkeypatch):
    """Guards the tests themselves: each part of the implementation, off by 1%, fails the comparison."""
    original = getattr(xla, name)

    def off(*args, **kwargs):
        return jax.tree.map(lambda a: a * 1.01, original(*args, **kwargs))

    monkeypatch.setattr(xla, name, off)
    check = check_against_oracle if name == "_straddling_sums" else check_outputs  # of which gradients alone are made
    with pytest.raises(AssertionError, match="relative RMS"):
        check("ssd", make(decay="typical"), implementation="xla", return_final_state=True, chunk=16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 50, 32), np.float32)}, ValueError, r"x_BTHP has shape \[2, 50, 32\]"),
        ({"x": np.zeros((2, 50, 4, 8), np.int32)}, TypeError, "x_BTHP has dtype int32"),
        ({"dt": np.zeros((2, 50, 3), np.float32)}, ValueError, r"dt_BTH has shape \[2, 50, 3\], expected \[2, 50, 4\]"),
        ({"dt": jnp.zeros((2, 50, 4), jnp.bfloat16)}, TypeError, "dt_BTH has dtype bfloat16, expected float32"),
        ({"A": np.zeros(3, np.float32)}, ValueError, "A_H has shape"),
        ({"B": np.zeros((2, 50, 3, 8), np.float32)}, ValueError, "C_BTGN has shape"),
        ({"B": np.zeros((2, 50, 3, 8), np.float32), "C": np.zeros((2, 50, 3, 8), np.float32)}, ValueError,
         r"heads of x_BTHP \(4\) not divisible by groups of B_BTGN \(3\)"),
        ({"D": np.zeros((4, 7), np.float32)}, ValueError, "D has shape"),
        ({"segment_ids": np.zeros((2, 49), np.int32)}, ValueError, r"segment_ids has shape \[2, 49\]"),
        ({"segment_ids": np.zeros((2, 50), np.float32)}, TypeError, "segment_ids has dtype float32"),
        ({"decay": np.zeros((2, 50, 4), np.float32)}, ValueError, "A_H and decay are both given: give one of them"),
        ({"A": None}, ValueError, "A_H and decay are both None: give one of them"),
        ({"A": None, "decay": np.zeros((2, 50), np.float32)}, ValueError, r"decay has shape \[2, 50\]"),
        ({"initial_state": np.zeros((2, 4, 8, 9), np.float32)}, ValueError, "initial_state has shape"),
        ({"states": "float16"}, ValueError, r"states \('float16'\) not one of None, 'recompute'"),
        ({"chunk": 0}, ValueError, r"chunk \(0\) below its minimum \(1\)"),
        ({"chunk": 8.0}, TypeError, r"chunk \(8.0\)"),
        ({"implementation": "cuda"}, ValueError, r"implementation \('cuda'\) not one of auto"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_limit(change, error, message):
    arguments = {**make(), **change}
    with pytest.raises(error, match=message):
        ssd(*[arguments.pop(name) for name in ("x", "dt", "A", "B", "C")], **arguments)


def test_one_step_of_state_zero_and_dt_zero():
    """dt = 0 changes nothing and reads the state as it is."""
    inputs = make(tokens=5)
    inputs["dt"] = np.zeros_like(inputs["dt"])
    result = run("ssd", inputs, implementation="reference", return_final_state=True)
    np.testing.assert_allclose(result["out1"], inputs["initial_state"], rtol=1e-7)
    check_against_oracle("ssd", inputs, implementation="xla", return_final_state=True)


@pytest.mark.parametrize("chunk", [16, 48])
def test_the_plain_version_that_times_are_held_against(chunk):
    """It is the same function, gradients included: a comparison of times says something."""
    inputs = make(tokens=48, groups=2, heads=4, decay="typical", skip="H", initial=False, final=False)
    plain = lambda x, dt, A, B, C, D: plain_ssd(x, dt, A, B, C, D, chunk=chunk)
    found = oracle.evaluate("ssd", inputs, function=plain, compiler_options=QUICK)
    for name, (error, limit) in oracle.errors("ssd", found, wide("ssd", inputs), "float32").items():
        assert error <= limit, f"{name}: relative RMS {error:.2e} above {limit:.0e}"
