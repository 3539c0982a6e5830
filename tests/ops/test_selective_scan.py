# SPDX-License-Identifier: Apache-2.0
"""selective_scan: the blocked version against the token-by-token recurrence in float64; the contract's properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import assume_platform, selective_scan
from pallas_kernels.layouts import LAYOUTS
from pallas_kernels.ops.selective_scan import cases, xla
from pallas_kernels.oracle import make_weights
from tests.ops.support import check_against_oracle, run
from tests.tolerances import check_close

BASE = cases.Case("base", 2, 40, 6, 4, 2, initial=True, final=True, decay="mixed", seed=3)
BY_TOKEN = ("x", "dt", "B", "C")
SETTINGS = {"implementation": "xla", "return_final_state": True}


def make(**changes):
    return cases.make_inputs(cases.Case(**{**BASE.__dict__, **changes}))


@pytest.fixture
def blocked(monkeypatch):
    """Chunks of 16 tokens in 4 blocks, as off the CPU; the CPU's own choice is one block."""
    monkeypatch.setattr(xla, "_sizes", lambda chunk, n_tokens: (16, 4))


@pytest.mark.quick
@pytest.mark.parametrize("case", cases.TEST_CASES, ids=lambda case: case.name)
def test_equals_the_recurrence(case):
    inputs = cases.make_inputs(case)
    check_against_oracle("selective_scan", inputs, implementation="xla", return_final_state=case.final, chunk=32)


@pytest.mark.parametrize("name", ["one_token", "groups", "mixed", "packed", "scattered", "empty"])
def test_blocks_equal_the_recurrence(name, blocked):
    case = cases.CASES[name]
    inputs = cases.make_inputs(case)
    check_against_oracle("selective_scan", inputs, implementation="xla", return_final_state=case.final)


@pytest.mark.parametrize(("n_tokens", "chunk"), [(1, None), (7, None), (300, None), (4096, 512), (10, 3)])
def test_sizes_off_the_cpu(n_tokens, chunk):
    with assume_platform("gpu"):
        tokens, blocks = xla._sizes(chunk, n_tokens)
    assert tokens % blocks == 0
    assert min(chunk or 256, n_tokens) <= tokens <= 1.5 * min(chunk or 256, n_tokens)


DRAWN = dict(
    tokens=st.integers(1, 50),
    groups=st.sampled_from([None, 1, 3]),
    layout=st.sampled_from(LAYOUTS),
    decay=st.sampled_from(cases.DECAYS),
    sizes=st.sampled_from([(1, 1), (7, 1), (64, 1), (8, 2), (12, 4)]),
    skip=st.booleans(),
    final=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=4)
@given(**DRAWN)
def test_equals_the_recurrence_on_drawn_shapes(**drawn):
    check_drawn(**drawn)


@pytest.mark.slow
@settings(max_examples=80, derandomize=False)
@given(**DRAWN)
def test_equals_the_recurrence_on_many_drawn_shapes(**drawn):
    check_drawn(**drawn)


def check_drawn(tokens, groups, layout, decay, sizes, skip, final, seed):
    case = cases.Case("drawn", 2, tokens, 3, 4, groups, layout, decay, skip, final, final, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_sizes", lambda chunk, n_tokens: sizes)
        check_against_oracle("selective_scan", cases.make_inputs(case), implementation="xla", return_final_state=final)


@pytest.mark.parametrize("name", ["mixed", "scattered"])
def test_bfloat16(name):
    inputs = cases.make_inputs(cases.CASES[name], "bfloat16")
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


@pytest.mark.parametrize("chunk", [1, 1000])
def test_chunk_is_invisible(chunk):
    inputs = make(layout="packed")
    expected = run("selective_scan", inputs, chunk=16, **SETTINGS)
    for name, value in run("selective_scan", inputs, chunk=chunk, **SETTINGS).items():
        check_close(value, expected[name], dtype="float32", what=name)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_packed_equals_separate(implementation):
    """Three documents in a row: each alone gives its piece of y, dx, ddt, dB, dC and its share of dA, dD."""
    inputs = make(batch=1, tokens=24, decay="typical")
    inputs["segment_ids"] = np.repeat([5, 2, 5], [9, 1, 14])[None].astype(np.int32)
    weights = make_weights([(1, 24, 6), (1, 6, 4)])
    settings = {"implementation": implementation, "return_final_state": True, "chunk": 8}
    packed = run("selective_scan", inputs, weights=weights, **settings)
    shared = {"dA": 0.0, "dD": 0.0}
    for number, (start, end) in enumerate([(0, 9), (9, 10), (10, 24)]):
        alone = {k: v[:, start:end] if k in BY_TOKEN else v for k, v in inputs.items()} | {"segment_ids": None}
        alone["initial_state"] = inputs["initial_state"] * (number == 0)
        kept = [weights[0][:, start:end], weights[1] * (number == 2)]
        one = run("selective_scan", alone, weights=kept, **settings)
        for name in ("out0", "dx", "ddt", "dB", "dC"):
            check_close(packed[name][:, start:end], one[name], dtype="float32", what=f"{name} of document {number}")
        shared = {name: total + one[name] for name, total in shared.items()}
        if number == 0:
            check_close(packed["dinitial_state"], one["dinitial_state"], dtype="float32", what="dinitial_state")
    check_close(packed["out1"], one["out1"], dtype="float32", what="final state")
    for name, total in shared.items():
        check_close(packed[name], total, dtype="float32", what=name)


@pytest.mark.parametrize("layout", ["scattered", "empty"])
def test_padding_is_as_if_it_were_not_there(layout, blocked):
    """Zero outputs and gradients at padding, whatever garbage stands there; the rest as with the padding cut out."""
    inputs = make(layout=layout, tokens=24)
    real = inputs["segment_ids"] != 0
    weights = make_weights([(2, 24, 6), (2, 6, 4)])
    clean = run("selective_scan", inputs, weights=weights, **SETTINGS)
    dirty = {k: np.where(real.reshape(2, 24, *(1,) * (v.ndim - 2)), v, np.nan) if k in BY_TOKEN else v
             for k, v in inputs.items()}  # fmt: skip
    for name, value in run("selective_scan", dirty, weights=weights, **SETTINGS).items():
        np.testing.assert_array_equal(value, clean[name], err_msg=name)
    for name in ("out0", "dx", "ddt", "dB", "dC"):
        assert not clean[name][~real].any(), name
    for row in range(2):
        keep = real[row]
        if not keep.any():
            np.testing.assert_array_equal(clean["out1"][row], inputs["initial_state"][row])
            np.testing.assert_array_equal(clean["dinitial_state"][row], weights[1][row])
            continue
        cut = {k: v[row : row + 1, keep] if k in (*BY_TOKEN, "segment_ids") else v for k, v in inputs.items()}
        cut["initial_state"] = inputs["initial_state"][row : row + 1]
        kept = [weights[0][row : row + 1, keep], weights[1][row : row + 1]]
        alone = run("selective_scan", cut, weights=kept, **SETTINGS)
        for name in ("out0", "dx", "ddt", "dB", "dC"):
            check_close(clean[name][row, keep], alone[name][0], dtype="float32", what=name)
        for name in ("out1", "dinitial_state"):
            check_close(clean[name][row], alone[name][0], dtype="float32", what=name)


def test_two_calls_continue_each_other():
    """Cut anywhere and handed over through the state, in gradients too."""
    inputs = make(decay="typical")
    weights = make_weights([(2, 40, 6), (2, 6, 4)])
    arrays = {name: jnp.asarray(a) for name, a in inputs.items() if a is not None}

    def loss(arrays, cut):
        state, ys = arrays["initial_state"], []
        for part in (slice(0, cut), slice(cut, None))[0 if cut else 1 :]:
            x, dt, B, C = (arrays[name][:, part] for name in BY_TOKEN)
            y, state = selective_scan(
                x, dt, arrays["A"], B, C, D=arrays["D"], initial_state=state, return_final_state=True
            )
            ys.append(y)
        return jnp.sum(jnp.concatenate(ys, axis=1) * weights[0]) + jnp.sum(state * weights[1])

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = dict(jax.tree.leaves_with_path(grad(arrays, 0)))
    for name, value in jax.tree.leaves_with_path(grad(arrays, 23)):
        check_close(value, expected[name], dtype="float32", what=str(name))


def test_causal():
    inputs = {k: jnp.asarray(v) for k, v in make(decay="weak", tokens=20).items() if v is not None}

    def at(t, x, dt, B, C):
        return jnp.sum(selective_scan(x, dt, inputs["A"], B, C, chunk=8)[:, t] ** 2)

    grads = jax.jit(jax.grad(at, argnums=(1, 2, 3, 4)))(10, *(inputs[n] for n in BY_TOKEN))
    for grad in grads:
        assert not np.any(grad[:, 11:])
    assert np.all(np.any(grads[0], axis=(0, 2))[:11])


def test_second_derivative_and_remat():
    inputs = {k: jnp.asarray(v) for k, v in make(tokens=12, decay="typical").items() if v is not None}
    A_ = inputs["A"]

    def loss(A):
        y = selective_scan(inputs["x"], inputs["dt"], A, inputs["B"], inputs["C"], D=inputs["D"], chunk=8)
        return jnp.sum(y**2)

    plain, remat = (jax.jit(jax.grad(g))(A_) for g in (loss, jax.checkpoint(loss)))
    np.testing.assert_allclose(plain, remat, rtol=1e-4)
    curvature = jax.jit(jax.grad(lambda A: jnp.sum(jax.grad(loss)(A))))(A_)
    steps = [jnp.sum(jax.jit(jax.grad(loss))(A_ + e)) for e in (1e-2, -1e-2)]
    np.testing.assert_allclose(curvature.sum(), (steps[0] - steps[1]) / 2e-2, rtol=1e-2)


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
        check_against_oracle("selective_scan", make(decay="weak"), **SETTINGS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((2, 40), np.float32)}, ValueError, r"x_BTD has shape \[2, 40\]"),
        ({"x": np.zeros((2, 40, 6), np.int32)}, TypeError, "x_BTD has dtype int32"),
        ({"dt": np.zeros((2, 40, 1), np.float32)}, ValueError, r"dt_BTD has shape \[2, 40, 1\], expected \[2, 40, 6\]"),
        ({"dt": jnp.zeros((2, 40, 6), jnp.bfloat16)}, TypeError, "dt_BTD has dtype bfloat16, expected float32"),
        ({"A": np.zeros((3, 4), np.float32)}, ValueError, "A_DN has shape"),
        ({"B": np.zeros((2, 40, 5), np.float32)}, ValueError, r"B_BTN has shape \[2, 40, 5\], expected \[2, 40, 4\]"),
        ({"B": np.zeros((2, 40, 3, 4), np.float32)}, ValueError, "C_BTN has shape"),
        ({"B": np.zeros((2, 40, 4, 4), np.float32), "C": np.zeros((2, 40, 4, 4), np.float32)}, ValueError,
         r"channels of x_BTD \(6\) not divisible by groups of B_BTGN \(4\)"),
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
