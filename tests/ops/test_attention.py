# SPDX-License-Identifier: Apache-2.0
"""attention: blockwise online softmax against the full matrix in float64, and the properties of the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import assume_platform, attention
from pallas_kernels.compat import enable_x64
from pallas_kernels.layouts import LAYOUTS
from pallas_kernels.ops.attention import cases, xla
from pallas_kernels.ops.attention.mask import Mask
from tests.ops import contract
from tests.ops.support import QUICK, check_by_one_program, run
from tests.tolerances import check_close


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(xla, "_BLOCK", 16)


def check(case, dtype="float32", **changes):
    """In blocks as `small_blocks` has them, or the op's own: calls of the same shapes share a program."""
    inputs = cases.make_inputs(case, dtype)
    if dtype == "float64" and inputs["sinks"] is not None:
        inputs["sinks"] = inputs["sinks"].astype(dtype)
    settings = {"implementation": "xla", **cases.make_settings(case), **changes}
    changed = xla._BLOCK, xla._scores, xla._apply_gate
    check_by_one_program("attention", inputs, dtype=dtype, change=changed, **settings)


RARELY = ("dense", "window_one", "scattered", "positions", "cache_one", "behind_the_window")
"""Cases whose like is among the others, or in the contract; they are slow."""


@pytest.mark.quick
@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in RARELY)) for case in cases.TEST_CASES
])  # fmt: skip
def test_equals_the_full_matrix(case, small_blocks):
    check(case)


@pytest.mark.parametrize("name", ["packed_window", "empty", "behind_the_window"])
def test_equals_the_full_matrix_in_one_block(name):
    check(cases.CASES[name])


def test_equals_the_full_matrix_in_blocks_of_full_size():
    check(cases.Case("long", 1, 700, 700, 2, 1, 4, layout="packed"))


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_bfloat16(name, small_blocks):
    check(cases.CASES[name], "bfloat16")


DRAWN = dict(
    queries=st.integers(1, 50),
    more_keys=st.none() | st.integers(0, 30),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    layout=st.sampled_from(LAYOUTS),
    gate=st.sampled_from([None, "elementwise", "head"]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    positions=st.booleans(),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=2)
@given(**DRAWN)
def test_equals_the_full_matrix_on_drawn_shapes(**drawn):
    check_drawn(**drawn)


@pytest.mark.slow
@settings(max_examples=80, derandomize=False)
@given(**DRAWN)
def test_equals_the_full_matrix_on_many_drawn_shapes_in_float64(**drawn):
    """Of a few tokens a gradient may be a sum that cancels, whose float32 error depends on the processor's order."""
    with enable_x64():
        check_drawn(**drawn, dtype="float64")


def check_drawn(
    queries, more_keys, heads, layout, gate, causal, window, softcap, sinks, positions, seed, dtype="float32"
):
    """Without more_keys queries and keys are the same tokens; with them a cache of more keys, without documents."""
    cache = more_keys is not None
    layout = "dense" if cache else layout
    more_keys = more_keys or 0
    case = cases.Case("drawn", 2, queries, queries + more_keys, *heads, 4, None, layout, gate, causal, window, softcap,
                      sinks, positions and not cache, more_keys, seed)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_BLOCK", 16)
        check(case, dtype)


def test_rows_without_visible_keys_are_zero_and_pass_no_gradient(small_blocks):
    """Padding, and queries whose window ends before the first key; sinks and garbage in padded queries included."""
    case = cases.Case("unseen", 2, 40, 40, 2, 1, 8, layout="left", sinks=True)
    inputs = cases.make_inputs(case)
    unseen = inputs["segment_ids"] == 0
    result = run("attention", inputs, implementation="xla", **cases.make_settings(case))
    for name in ("out0", "dq", "dgate", "dk", "dv"):
        assert not result[name][unseen].any(), name
    assert all(np.isfinite(value).all() for value in result.values())
    case = cases.Case("unseen", 1, 40, 30, 2, 1, 8, sinks=True, window=4, q_offset=33)
    result = run("attention", cases.make_inputs(case), implementation="xla", **cases.make_settings(case))
    for name, value in result.items():
        assert not value.any(), name


@pytest.mark.parametrize("check", [contract.check_packed, contract.check_padding], ids=lambda check: check.__name__)
def test_documents_in_several_blocks(check, small_blocks):
    with contract.compiling_anew():
        check(contract.Subject("attention", "xla"))


def test_a_pair_of_ids_means_equal_ids():
    """As two arrays ids are compared as they are (keys of a cache stand in any order); as one, documents are runs."""
    inputs = cases.make_inputs(cases.Case("ids", 1, 6, 6, 2, 1, 8, gate=None))
    args = [inputs[name] for name in ("q", "k", "v")]
    ids = np.array([[1, 1, 2, 2, 1, 1]], np.int32)

    @functools.partial(jax.jit, static_argnames="implementation", compiler_options=QUICK)
    def both(ids, implementation):
        return [attention(*args, segment_ids=some, implementation=implementation) for some in (ids, (ids, ids))]

    for implementation in ("xla", "reference"):
        runs, pair = both(ids, implementation)
        np.testing.assert_array_equal(runs[:, 4], inputs["v"][:, 4].repeat(2, axis=1))
        assert np.abs(pair - runs)[:, 4].min() > 1e-4
        check_close(pair[:, :4], runs[:, :4], dtype="float32", what="first documents")


def test_a_cache_gives_the_rows_of_the_whole(small_blocks):
    """One token and a few tokens against keys at hand: by int and traced offset, by positions, by ragged rows."""
    inputs = {
        k: jnp.asarray(v)
        for k, v in cases.make_inputs(cases.Case("whole", 2, 60, 60, 4, 2, 8)).items()
        if v is not None
    }
    filled = (np.ones((2, 1), np.int32), np.where(np.arange(60) < [[21], [51]], 1, 0).astype(np.int32))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, start, each):
        few, ends = q[:, 30:35], jnp.stack([q[0, 20:21], q[1, 50:51]])
        positions = (jnp.broadcast_to(jnp.arange(30, 35), (2, 5)), jnp.broadcast_to(jnp.arange(60), (2, 60)))
        cached = (
            (attention(few, k, v, window=25, q_offset=30), slice(30, 35)),
            (attention(few, k, v, window=25, q_offset=start), slice(30, 35)),
            (attention(q[:, 31:32], k, v, window=25, q_offset=each[0]), slice(31, 32)),
            (attention(few, k, v, window=25, positions=positions), slice(30, 35)),
        )
        whole = attention(q, k, v, window=25)
        ragged = attention(ends, k, v, window=25, q_offset=each[1])
        shut = attention(ends, k, v, causal=False, segment_ids=filled)
        return [(rows, whole[:, part]) for rows, part in cached], whole, ragged, shut, attention(q, k, v)

    each = np.array([[31, 31], [20, 50]], np.int32)
    cached, whole, ragged, shut, causal = run(inputs["q"], inputs["k"], inputs["v"], np.int32(30), each)
    for actual, rows in cached:
        check_close(actual, rows, dtype="float32", what="rows of a cached call")
    ends = lambda rows: np.stack([rows[0, 20:21], rows[1, 50:51]])
    check_close(ragged, ends(whole), dtype="float32", what="ragged rows")
    check_close(shut, ends(causal), dtype="float32", what="filled part")


def test_causal(small_blocks):
    inputs = {
        k: jnp.asarray(v)
        for k, v in cases.make_inputs(cases.Case("causal", 1, 40, 40, 4, 2, 8)).items()
        if v is not None
    }
    at = lambda k, v: jnp.sum(attention(inputs["q"], k, v, window=12)[:, 20] ** 2)
    for grad in jax.jit(jax.grad(at, argnums=(0, 1)))(inputs["k"], inputs["v"]):
        assert not np.any(grad[:, 21:])
        assert not np.any(grad[:, :9])
        assert np.all(np.any(grad[:, 9:21], axis=(0, 2, 3)))


def test_hidden_blocks_are_not_visited():
    def count(queries, **changes):
        return len(xla._pairs(queries // 512, 8, Mask(**changes), xla._Settings(1.0, None, 4096, (512, 512))))

    assert count(4096) == 36
    assert count(4096, causal=False) == 64
    assert count(4096, window=512) == 15
    assert count(512, q_offset=1024) == 3
    assert count(512, q_offset=-600) == 0


def test_memory_is_linear():
    def temporary(tokens):
        shape = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
        f = jax.jit(jax.grad(lambda *a: jnp.sum(attention(*a, implementation="xla")), argnums=(0, 1, 2)))
        return f.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1 << 15) < 2.2 * temporary(1 << 14)


@pytest.mark.quick
def test_sharded_over_batch_and_heads_without_gathers(small_blocks):
    inputs = {
        k: jnp.asarray(v)
        for k, v in cases.make_inputs(cases.Case("sharded", 2, 40, 40, 8, 4, 8)).items()
        if v is not None
    }
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
    ids = jnp.asarray(np.repeat([[1, 2], [1, 0]], 20, axis=1), jnp.int32)

    def loss(arrays):
        return jnp.sum(attention(arrays["q"], arrays["k"], arrays["v"], gate=arrays["gate"], segment_ids=ids) ** 2)

    placed = {k: jax.device_put(v, sharding) for k, v in inputs.items()}
    compiled = jax.jit(jax.grad(loss), out_shardings=sharding).lower(placed).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text()
    actual, expected = compiled(placed), jax.jit(jax.grad(loss))(inputs)
    for name in actual:
        check_close(actual[name], expected[name], dtype="float32", what=name)


def test_which_calls_go_to_cudnn(monkeypatch):
    """cuDNN takes plain half-precision calls on a GPU, and nothing else; the gate is applied to its result."""
    q, k = jnp.ones((1, 16, 4, 64), jnp.bfloat16), jnp.ones((1, 16, 2, 64), jnp.bfloat16)
    calls = []
    trace = lambda *args, **options: jax.eval_shape(lambda: attention(*args, **options))

    def fake(q, k, v, **options):
        calls.append(options)
        return jnp.zeros_like(q)

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    with assume_platform("gpu"):
        trace(q, k, k, window=5, gate=q)
        assert calls == [{"scale": 0.125, "is_causal": True, "local_window_size": (4, 0), "implementation": "cudnn"}]
        ids = jnp.ones((1, 16), jnp.int32)
        for changes in (
            {"softcap": 2.0},
            {"segment_ids": ids},
            {"positions": ids},
            {"sinks": jnp.ones(4)},
            {"q_offset": 1},
        ):
            trace(q, k, k, **changes)
        trace(*(a.astype(jnp.float32) for a in (q, k, k)))
        trace(q, k, k, causal=False, window=3)
    trace(q, k, k)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["_scores", pytest.param("_apply_gate_backward", marks=pytest.mark.slow)])
def test_a_one_percent_error_is_seen(name, monkeypatch, small_blocks):
    original = getattr(xla, name)
    if name == "_scores":
        monkeypatch.setattr(xla, name, lambda *args: (original(*args)[0] * 1.01, None))
    else:
        gate = jax.custom_vjp(lambda out, gate: xla._apply_gate_forward(out, gate)[0])
        gate.defvjp(xla._apply_gate_forward, lambda *args: tuple(1.01 * g for g in original(*args)))
        monkeypatch.setattr(xla, "_apply_gate", gate)
    with pytest.raises(AssertionError, match="relative RMS"):
        check(cases.CASES["dense"])


ARGUMENTS = {
    "q": np.zeros((2, 9, 4, 8), np.float32),
    "k": np.zeros((2, 9, 2, 8), np.float32),
    "v": np.zeros((2, 9, 2, 8), np.float32),
}
IDS = np.zeros((2, 9), np.int32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": np.zeros((2, 9, 2, 7), np.float32)}, ValueError, r"k_BSKP has shape \[2, 9, 2, 7\]"),
        ({"v": np.zeros((2, 8, 2, 8), np.float32)}, ValueError, "v_BSKP has shape"),
        ({"q": np.zeros((2, 9, 5, 8), np.float32)}, ValueError, r"q_BTHP \(5\) not divisible by heads of k_BSKP \(2\)"),
        ({"q": np.zeros((2, 9, 4, 8), np.int8)}, TypeError, "q_BTHP has dtype int8"),
        ({"gate": np.zeros((2, 9, 4, 7), np.float32)}, ValueError, "gate has shape"),
        ({"window": 0}, ValueError, r"window \(0\) below its minimum \(1\)"),
        ({"window": 2.5}, TypeError, r"window \(2.5\)"),
        ({"sinks": np.zeros(2, np.float32)}, ValueError, "sinks has shape"),
        ({"softcap": -1.0}, ValueError, r"softcap \(-1.0\) not positive"),
        ({"scale": float("nan")}, ValueError, r"scale \(nan\) not finite"),
        ({"segment_ids": IDS[:, :8]}, ValueError, "segment_ids has shape"),
        ({"segment_ids": (IDS,)}, ValueError, "segment_ids has 1 arrays, expected a pair"),
        ({"segment_ids": (IDS, IDS[:, :7])}, ValueError, r"segment_ids\[1\] has shape"),
        ({"positions": IDS.astype(np.float32)}, TypeError, "positions has dtype float32"),
        ({"positions": IDS, "q_offset": 3}, ValueError, r"q_offset \(3\) given beside positions"),
        ({"q_offset": 1.5}, TypeError, r"q_offset \(1.5\)"),
        ({"implementation": "flash"}, ValueError, r"implementation \('flash'\)"),
    ],
)  # fmt: skip
def test_errors_name_argument_value_and_limit(change, error, message):
    arguments = {**ARGUMENTS, **change}
    with pytest.raises(error, match=message):
        attention(*[arguments.pop(name) for name in ("q", "k", "v")], **arguments)
