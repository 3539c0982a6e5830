# SPDX-License-Identifier: Apache-2.0
"""Tokens split over 2, 4 and 8 devices: the ops equal the float64 reference on whole rows, gradients included."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import assume_platform, attention, causal_conv1d, context, ops, oracle, ssd
from pallas_kernels.compat import enable_x64
from pallas_kernels.ops import OPS
from pallas_kernels.ops.attention import cases as attention_cases
from pallas_kernels.ops.attention.context import _Stripes
from pallas_kernels.ops.causal_conv1d import cases as conv_cases
from pallas_kernels.ops.selective_scan import cases as scan_cases
from pallas_kernels.ops.ssd import cases as ssd_cases
from pallas_kernels.ops.ssd.tpu.api import ssd_tpu
from tests.ops.split import EDGES, RECURRENCES, TOKENS, check, mesh_of, split_over
from tests.ops.support import QUICK, run_by_one_program, served_by

ALIKE = ("gated_delta_product", "linear_scan", "rwkv4", "rwkv7", "titans")  # exchange as others that run each time do


def some(names: str, calls, by_default) -> pytest.MarkDecorator:
    """Parametrized by calls, of which those that are not run by default are slow."""
    marked = [pytest.param(*call, marks=[pytest.mark.slow] * (call not in by_default)) for call in calls]
    return pytest.mark.parametrize(names, marked)


@some("layout, n", itertools.product(("dense", "documents"), (2, 4, 8)),
      [("dense", 8), ("documents", 2), ("documents", 4), ("documents", 8)])  # fmt: skip
def test_ssd(layout, n):
    case = ssd_cases.Case("split", 4, 64, 4, 4, 2, 6, "dense", "mixed", "HP", True, True)
    inputs = ssd_cases.make_inputs(case) | ({} if layout == "dense" else {"segment_ids": EDGES})
    with assume_platform("gpu" if n == 4 else "cpu"):  # where each device tells all others at once
        check("ssd", inputs, n, implementation="xla", return_final_state=True, chunk=8)


def test_ssd_with_decays_of_their_own():
    case = ssd_cases.Case("split", 4, 64, 4, 4, 2, 6, "dense", "mixed", "H", True, True, apart=True)
    inputs = ssd_cases.make_inputs(case) | {"segment_ids": EDGES}
    check("ssd", inputs, 4, implementation="xla", return_final_state=True, chunk=8)


@some("layout, n", itertools.product(("dense", "documents"), (2, 8)),
      [("documents", 8)])  # fmt: skip
def test_selective_scan(layout, n):
    case = scan_cases.Case("split", 4, 64, 4, 3, 2, "dense", "mixed", True, True, True)
    inputs = scan_cases.make_inputs(case) | ({} if layout == "dense" else {"segment_ids": EDGES})
    check("selective_scan", inputs, n, implementation="xla", return_final_state=True, chunk=8)


@some("layout, taps, n", ((*how, n) for how in (("dense", 4), ("documents", 2), ("documents", 8)) for n in (2, 4, 8)),
      [("dense", 4, 4), ("documents", 2, 2), ("documents", 8, 8)])  # fmt: skip
def test_causal_conv1d(layout, taps, n):
    """Eight taps reach over shards of 8 tokens of which some are padding."""
    case = conv_cases.Case("split", 4, 64, 3, taps, "dense", "silu", True, True, True)
    inputs = conv_cases.make_inputs(case) | ({} if layout == "dense" else {"segment_ids": EDGES})
    check("causal_conv1d", inputs, n, implementation="xla", activation="silu", return_final_state=True)


def test_halo_gradients_in_place_on_gpus():
    case = conv_cases.Case("split", 4, 64, 3, 4, "dense", "silu", True, True, True)
    inputs = conv_cases.make_inputs(case) | {"segment_ids": EDGES}
    with assume_platform("gpu"):
        check("causal_conv1d", inputs, 4, implementation="xla", activation="silu", return_final_state=True)


@pytest.mark.parametrize("tokens", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_halo_of_shards_shorter_than_it(tokens):
    case = conv_cases.Case("short", 2, 8 * tokens, 3, 6, "scattered", None, True, True, True)
    inputs = conv_cases.make_inputs(case)
    for some in (inputs, inputs | {"segment_ids": None}):
        check("causal_conv1d", some, 8, implementation="reference", return_final_state=True)


@some("layout, n", itertools.product(("dense", "documents", "window", "given"), (2, 4, 8)),
      [("dense", 4), ("documents", 2), ("documents", 8), ("window", 8), ("given", 2)])  # fmt: skip
def test_attention(layout, n):
    """Queries spread over the devices (dense, documents), served where they stand (window), with positions given."""
    window, gate = 7 if layout == "window" else None, "head" if layout == "documents" else "elementwise"
    case = attention_cases.Case("split", 4, 64, 64, 4, 2, 8, window=window, gate=gate, sinks=True)
    inputs = attention_cases.make_inputs(case)
    if layout != "dense":
        inputs["segment_ids"] = EDGES
    if layout == "given":
        inputs["positions"] = np.broadcast_to(3 * np.arange(64)[::-1], (4, 64)).astype(np.int32)
    check("attention", inputs, n, implementation="xla", window=window)


def small_case(op: str, **changes) -> tuple[dict, dict]:
    """(inputs, settings) of the op's contract on other shapes."""
    module = OPS[op].cases_module()
    case = dataclasses.replace(module.CONTRACT["xla"], **changes)
    return {n: a for n, a in module.make_inputs(case).items() if a is not None}, module.make_settings(case)


@pytest.mark.parametrize(
    ("op", "layout", "n"),
    [
        pytest.param(op, layout, n, marks=[pytest.mark.slow] * ((layout, n) != ("documents", 4) or op in ALIKE))
        for op in RECURRENCES
        for layout, n in (("dense", 4), ("documents", 2), ("documents", 4), ("documents", 8))
    ],
)
def test_recurrences(op, layout, n):
    """One document a row is among those drawn below, too."""
    inputs, settings = small_case(op, batch=4, tokens=64)
    inputs |= {} if layout == "dense" else {"segment_ids": EDGES}
    check(op, inputs, n, implementation="xla", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("op", RECURRENCES)
def test_recurrences_from_nothing(op):
    """Without initial states, outputs alone."""
    inputs, settings = small_case(op, batch=4, tokens=64, initial=False)
    settings |= {"return_final_state": False} if OPS[op].states else {}
    check(op, inputs | {"segment_ids": EDGES}, 4, implementation="xla", **settings)


@pytest.mark.parametrize("implementation", [pytest.param("reference", marks=pytest.mark.slow), "xla"])
def test_float64(implementation):
    """No step of the exchange is less exact than the op."""
    case = ssd_cases.Case("wide", 4, 64, 2, 3, 1, 5, "dense", "mixed", "H", True, True)
    inputs = ssd_cases.make_inputs(case) | {"segment_ids": EDGES}
    with enable_x64():
        wide = {k: v if k == "segment_ids" or v is None else v.astype(np.float64) for k, v in inputs.items()}
        check("ssd", wide, 4, implementation=implementation, return_final_state=True)


@pytest.mark.parametrize("op", ["ssd", pytest.param("causal_conv1d", marks=pytest.mark.slow)])
def test_bfloat16(op):
    cases = {"ssd": ssd_cases, "causal_conv1d": conv_cases}[op]
    inputs = cases.make_inputs(cases.CASES["packed"], "bfloat16")
    check(op, inputs, 4, implementation="xla", return_final_state=True)


def test_padding_may_hold_anything():
    inputs = ssd_cases.make_inputs(ssd_cases.Case("nan", 4, 64, 2, 4, 1, 4, "dense", "typical", "H", True, True))
    inputs["segment_ids"] = EDGES
    dirty = dict(inputs)
    for name in ("x", "dt", "B", "C"):
        real = (EDGES != 0).reshape(4, 64, *(1,) * (inputs[name].ndim - 2))
        dirty[name] = np.where(real, inputs[name], np.nan)
    options = {"function": split_over("ssd", 8), "return_final_state": True}
    clean, same = (run_by_one_program("ssd", given, **options) for given in (inputs, dirty))
    for name in clean:
        np.testing.assert_array_equal(same[name], clean[name], err_msg=name)


SMALL = {
    "ssd": (ssd_cases.make_inputs(ssd_cases.Case("drawn", 4, 24, 2, 2, 1, 3, "one", "mixed", "H", True)), {}),
    "selective_scan": (
        scan_cases.make_inputs(scan_cases.Case("drawn", 4, 24, 2, 3, 1, "one", "mixed", True, True)),
        {},
    ),
    "causal_conv1d": (conv_cases.make_inputs(conv_cases.Case("drawn", 4, 24, 2, 5, "one", initial=True)), {}),
    "attention": (attention_cases.make_inputs(attention_cases.Case("drawn", 4, 24, 24, 2, 1, 4, layout="one")), {}),
} | {op: small_case(op, batch=4, tokens=24, layout="one") for op in RECURRENCES}


@functools.cache
def compiled(op: str, n: int):
    """Outputs and gradients, split over n devices or (n = 0) the reference, of arrays and ids given at run time."""
    options = SMALL[op][1] or ({"return_final_state": True} if OPS[op].states else {})
    run = split_over(op, n) if n else ops.function(op)

    def loss(arrays, ids):
        named = {**arrays, "segment_ids": ids}
        args = [named.pop(name, None) for name in OPS[op].positional]
        out = run(*args, **named, **options, implementation="xla" if n else "reference")
        out = out if isinstance(out, tuple) else (out,)
        weights = oracle.make_weights([o.shape for o in out])
        return sum(jnp.vdot(o, w.astype(o.dtype)) for o, w in zip(out, weights)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)


runs = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=8)


@settings(max_examples=25)
@given(rows=st.lists(runs, min_size=4, max_size=4))
@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize(
    "op",
    [pytest.param(op, marks=[pytest.mark.slow] * (op not in ("ssd", "causal_conv1d", "attention"))) for op in TOKENS],
)
def test_drawn_documents(op, n, rows):
    ids = np.array([(np.repeat(*zip(*row)).tolist() * 24)[:24] for row in rows], np.int32)
    arrays = {k: v for k, v in SMALL[op][0].items() if v is not None and k != "segment_ids"}
    (_, out), grads = compiled(op, n)(arrays, ids)
    with enable_x64():
        wide = {k: np.asarray(v, np.float64) for k, v in arrays.items()}
        (_, wide_out), wide_grads = compiled(op, 0)(wide, ids)
    largest = max(oracle.rms(g) for g in wide_grads.values())
    for i, (actual, expected) in enumerate(zip(out, wide_out)):
        assert oracle.relative_rms(actual, expected, floor=1e-2) <= oracle.bound("float32"), f"out{i}"
    for name, expected in wide_grads.items():
        error = oracle.relative_rms(grads[name], expected, floor=oracle.SMALL_GRADIENT * largest)
        assert error <= oracle.bound("float32"), f"d{name}: {error:.1e}"


@pytest.mark.parametrize("n", [2, 4])
def test_attention_in_many_stripes(n, monkeypatch):
    """Two tokens a stripe, dealt out in turns to and fro."""
    monkeypatch.setattr("pallas_kernels.ops.attention.context.STRIPE", 2)
    assert _Stripes.of(64 // n, n, "context").turns > 1
    inputs = attention_cases.make_inputs(attention_cases.Case("split", 4, 64, 64, 4, 2, 8, gate="head"))
    check("attention", inputs | {"segment_ids": EDGES}, n, implementation="xla")


def test_shard_maps_that_check_replication():
    """check_vma, which tracks what is equal on all devices, accepts the ops too."""
    inputs = ssd_cases.make_inputs(ssd_cases.Case("checked", 2, 32, 2, 4, 1, 4, initial=True))
    specs = {"x": P(None, "context"), "dt": P(None, "context"), "B": P(None, "context"), "C": P(None, "context")}
    arrays = {k: v for k, v in inputs.items() if v is not None}

    def local(a):
        return ssd(a["x"], a["dt"], a["A"], a["B"], a["C"], D=a["D"], initial_state=a["initial_state"],
                   return_final_state=True, context_axis="context", implementation="xla")  # fmt: skip

    def loss(arrays, check_vma):
        run = jax.shard_map(
            local, mesh=mesh_of(4), in_specs=({k: specs.get(k, P()) for k in arrays},),
            out_specs=(P(None, "context"), P()), check_vma=check_vma,
        )  # fmt: skip
        return sum(jnp.sum(jnp.sin(out)) for out in run(arrays))

    expected, actual = (jax.jit(jax.grad(lambda a, c=c: loss(a, c)))(arrays) for c in (False, True))
    for name in expected:
        assert oracle.relative_rms(actual[name], expected[name]) <= oracle.bound("float32"), name


@pytest.mark.parametrize(("module", "name", "fault"), [
    (context, "is_cut", lambda earlier, later: jnp.zeros((), bool)),
    (context, "before", lambda joined, start, own, axis, **_: start),
    (context, "leaving_gradient", lambda decay, gradient, axis: jnp.zeros_like(gradient)),
    (context, "join", lambda earlier, later: later),
    (context, "_join_maps", lambda earlier, later: later),
])  # fmt: skip
def test_a_fault_is_seen(module, name, fault, monkeypatch):
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError, match="relative RMS"):
        test_ssd("documents", 8)


def test_errors_name_argument_and_limit():
    x = jnp.ones((1, 4, 2))
    with pytest.raises(ValueError, match=r"context_axis \('context'\) is no axis of a shard_map around this call"):
        causal_conv1d(x, jnp.ones((2, 3)), context_axis="context")
    q = jnp.ones((1, 4, 2, 8))

    def run(q, **options):
        run = jax.shard_map(lambda q: attention(q, q, q, context_axis="context", **options), mesh=mesh_of(2),
                            in_specs=P(None, "context"), out_specs=P(None, "context"))  # fmt: skip
        return run(q)

    with pytest.raises(ValueError, match=r"context_axis \('context'\) and q_offset \(3\) cannot be given together"):
        run(q, q_offset=3)


@pytest.mark.slow
def test_on_top_of_a_kernel():
    """The same exchange around the interpreted TPU kernel."""
    inputs = ssd_cases.make_inputs(ssd_cases.Case("kernel", 4, 64, 2, 32, 1, 16, "dense", "mixed", "H", True, True))
    inputs["segment_ids"] = EDGES
    with served_by(functools.partial(ssd_tpu, interpret=True)):
        check("ssd", inputs, 2, return_final_state=True)
