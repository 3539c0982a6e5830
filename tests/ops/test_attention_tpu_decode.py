# SPDX-License-Identifier: Apache-2.0
"""The TPU decoding kernel of attention, interpreted, against the float64 matrix form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import attention
from pallas_kernels.compat import enable_x64
from pallas_kernels.ops.attention import cases
from pallas_kernels.ops.attention.mask import Mask
from pallas_kernels.ops.attention.tpu import decode as tpu_decode
from pallas_kernels.ops.attention.tpu.api import attention_tpu
from pallas_kernels.oracle import bound, relative_rms
from tests.ops.support import QUICK, served_by

BASE = cases.Case("base", 2, 1, 600, 8, 2, 128, q_offset=599)


def case_of(**changes) -> cases.Case:
    return dataclasses.replace(BASE, **changes)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 tokens, and the choices of tpu_decode as a test wants them."""
    monkeypatch.setattr(tpu_decode, "MOST_BYTES", 1)
    return lambda **choices: [monkeypatch.setattr(tpu_decode, name, value) for name, value in choices.items()]


def decoded(inputs: dict, options: dict):
    """attention of few queries by the interpreted kernel."""
    arrays = {name: array for name, array in inputs.items() if array is not None}
    with served_by(functools.partial(attention_tpu, interpret=True), takes=("stacked",)):
        run = jax.jit(lambda a: attention(a.pop("q"), a.pop("k"), a.pop("v"), **a, **options), compiler_options=QUICK)
        return np.asarray(run(dict(arrays)), np.float64)


def expected(inputs: dict, options: dict):
    """The same by the float64 reference."""
    with enable_x64():
        wide = {
            name: array if name in ("segment_ids", "positions", "q_offset") else np.asarray(array).astype(np.float64)
            for name, array in inputs.items()
            if array is not None
        }
        return np.asarray(_reference(tuple(sorted(options.items())))(wide))


@functools.cache
def _reference(options: tuple):
    run = lambda q, k, v, **more: attention(q, k, v, **more, **dict(options), implementation="reference")
    return jax.jit(lambda arrays: run(**arrays), compiler_options=QUICK)


def check(case: cases.Case, dtype="float32", *, ids: bool = False, places: bool = False, q_offset=None):
    """ids, places: drawn, of both sides. q_offset: an array in place of the case's."""
    rng = np.random.default_rng(case.seed)
    inputs, options = cases.make_inputs(case, dtype), cases.make_settings(case)

    def draw(n, top):
        return rng.integers(0, top, (case.batch, n)).astype(np.int32)

    if ids:
        inputs["segment_ids"] = draw(case.queries, 3), np.sort(draw(case.keys, 3), axis=1)
    if places:
        inputs["positions"] = draw(case.queries, case.keys), draw(case.keys, case.keys)
        del options["q_offset"]
    elif q_offset is not None:
        inputs["q_offset"] = np.asarray(q_offset, np.int32)
        del options["q_offset"]
    assert tpu_decode.serves(inputs["q"].shape, inputs["k"].shape, inputs["v"].shape[3], inputs["q"].dtype.itemsize)
    actual, wanted = decoded(inputs, options), expected(inputs, options)
    if not np.any(wanted):
        assert not np.any(actual)
        return
    error = relative_rms(actual, wanted)
    assert error <= bound(dtype, "attention.out0"), f"relative RMS {error:.2e}"


CASES = (
    (case_of(name="one_product", sinks=True, softcap=3.0), {"q_offset": [599, 130]}),
    (case_of(name="one_product_window_ids", queries=2, window=150, gate="head"), {"ids": True, "q_offset": 400}),
    (case_of(name="keys_before_heads", kv_heads=3, heads=6, queries=3, window=200), {"q_offset": [590, 100]}),
    (case_of(name="tokens_in_lanes", width=64, v_width=96, queries=3, sinks=True), {"ids": True}),
)
MORE_CASES = (
    (case_of(name="one_key_head", kv_heads=1, queries=5, gate=None), {"q_offset": [-3, 400]}),
    (case_of(name="many_key_heads", kv_heads=8, keys=400, q_offset=250), {}),
    (case_of(name="all_visible", causal=False, keys=512, queries=2, q_offset=0), {}),
    (case_of(name="positions", queries=2, window=90), {"places": True, "ids": True}),
    (case_of(name="lanes_head_gate", width=192, kv_heads=4, gate="head", keys=300, q_offset=298), {}),
    (case_of(name="wide", width=256, kv_heads=8, keys=300, queries=2, q_offset=298), {}),
    (case_of(name="one_key", keys=1, q_offset=0), {}),
    (case_of(name="nothing_visible", window=20, sinks=True), {"q_offset": [1000, -5]}),
)


RARELY = ("many_key_heads", "all_visible", "one_key")


@pytest.mark.quick
@pytest.mark.parametrize("case, given, parts", [
    pytest.param(*case, parts, id=f"{case[0].name}-{parts}", marks=[pytest.mark.slow] * (parts == 2 and number % 2))
    for number, case in enumerate(CASES) for parts in (1, 2)
])  # fmt: skip
def test_equals_the_matrix_form(case, given, parts, small_blocks):
    small_blocks(cores=lambda: parts)
    check(case, **given)


@pytest.mark.parametrize("case, given", [
    pytest.param(case, given, id=case.name, marks=[pytest.mark.slow] * (case.name in RARELY))
    for case, given in MORE_CASES
])  # fmt: skip
def test_equals_the_matrix_form_in_more_cases(case, given, small_blocks):
    small_blocks(cores=lambda: 1 + len(case.name) % 2)
    check(case, **given)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_key_head_gathered(dtype, small_blocks):
    small_blocks(JOINT_ROWS=0)
    check(case_of(kv_heads=4, queries=3, window=300, sinks=True, keys=610), dtype, ids=True, q_offset=[200, 600])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 16),
    keys=st.integers(1, 700),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (8, 8), (8, 4)]),
    widths=st.sampled_from([(64, 64), (96, 64), (128, 128), (192, 192), (256, 128)]),
    window=st.sampled_from([None, 40, 300]),
    causal=st.booleans(),
    gate=st.sampled_from([None, "head", "elementwise"]),
    sinks=st.booleans(),
    ids=st.booleans(),
    places=st.booleans(),
    joint=st.booleans(),
    parts=st.integers(1, 2),
    data=st.data(),
)
def test_equals_the_matrix_form_on_drawn_shapes(
    queries, keys, heads, widths, window, causal, gate, sinks, ids, places, joint, parts, data
):
    sizes = {"queries": queries, "keys": keys, "heads": heads[0], "kv_heads": heads[1]}
    case = case_of(
        width=widths[0], v_width=widths[1], window=window, causal=causal, gate=gate, sinks=sinks,
        seed=data.draw(st.integers(0, 99)), **sizes,
    )  # fmt: skip
    offsets = data.draw(st.lists(st.integers(-20, keys + 20), min_size=2, max_size=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_decode, "MOST_BYTES", 1)
        patch.setattr(tpu_decode, "JOINT_ROWS", 64 if joint else 0)
        patch.setattr(tpu_decode, "cores", lambda: parts)
        if tpu_decode.choose_layout(heads[1], *widths) is not None:
            check(case, ids=ids, places=places, q_offset=offsets)


@pytest.mark.parametrize("width", [64, 128])
def test_one_layer_of_stacked_caches(width, small_blocks):
    case = case_of(width=width, keys=300, q_offset=270)
    inputs, options = cases.make_inputs(case), cases.make_settings(case)
    stacks = {name: np.stack([inputs[name] + 1, inputs[name], inputs[name] * 2]) for name in "kv"}
    wanted = expected(inputs, options)
    for layer in (1, jnp.int32(1)):
        actual = decoded({**inputs, **stacks}, {**options, "layer": layer})
        assert relative_rms(actual, wanted) <= bound("float32", "attention.out0")
    q, k, v = (jnp.asarray(a) for a in (inputs["q"], stacks["k"], stacks["v"]))
    own = lambda k: attention(q, k, v, layer=1, implementation="xla", **options).sum()
    grad = jax.jit(jax.grad(own), compiler_options=QUICK)(k)
    assert np.any(grad[1]) and not np.any(grad[0]) and not np.any(grad[2])
    with pytest.raises(ValueError, match=r"layer \(3\) outside of the layers of k_BSKP \(3\)"):
        attention(q, k, v, layer=3)
    with pytest.raises(ValueError, match="layers, as layer is given"):
        attention(q, k[0], v[0], layer=0)


def settings_of(n_queries: int, n_keys: int, **changes) -> tpu_decode.Decode:
    options = {
        "layout": "rows", "joint": True, "queries": n_queries, "keys": n_keys, "heads": 1, "kv_heads": 1, "width": 128,
        "v_width": 128, "scale": 1.0, "softcap": None, "causal": True, "window": None, "ids": False,
        "positions": "counted", "gate": "", "sinks": False, "tokens": 8, "parts": 1,
    }  # fmt: skip
    return tpu_decode.Decode(**{**options, **changes})


def listed(visits: tpu_decode.Visits, s: tpu_decode.Decode):
    """[(row, block, flags)] by part."""
    words = np.asarray(visits.words).reshape(s.parts, -1)[:, : int(visits.count)]
    of = lambda word: (
        word >> tpu_decode.ROW_SHIFT,
        (word >> tpu_decode.BLOCK_SHIFT) % tpu_decode.MOST_BLOCKS,
        word % 8,
    )
    return [[of(word) for word in part] for part in words]


def test_cost_follows_the_visible_cache():
    counted = lambda offset: Mask(q_position_BT=np.asarray(offset, np.int32)[:, None])
    count = lambda offset, **changes: (
        tpu_decode.list_visits(counted(offset), len(offset), settings_of(1, 1024, **changes)).count
    )
    assert count([1023]) == 128
    assert count([7, 8, 1023]) == 1 + 2 + 128
    assert count([1023, 500], window=16) == 2 + 3
    assert count([1023, 511], parts=2) == 64 + 32
    assert count([-1]) == 1  # to write the zeros


@settings(max_examples=60, deadline=None)
@given(
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 5, 30]),
    ids=st.booleans(),
    given_positions=st.booleans(),
    parts=st.sampled_from([1, 2]),
    known=st.booleans(),
    seed=st.integers(0, 999),
)
def test_listed_blocks_hold_all_that_is_visible(causal, window, ids, given_positions, parts, known, seed):
    n_batch, n_queries, n_keys = 3, 2, 61
    rng = np.random.default_rng(seed)
    positions = ("given" if given_positions else "counted") if causal or window else ""
    s = settings_of(
        n_queries, n_keys, causal=causal, window=window, ids=ids, positions=positions, parts=parts
    )  # fmt: skip
    draw = lambda n, top: rng.integers(0, top, (n_batch, n)).astype(np.int32)
    q_ids, k_ids = draw(n_queries, 3), np.repeat(draw(16, 3), 4, axis=1)[:, :n_keys]
    q_position, k_position = draw(n_queries, n_keys), draw(n_keys, n_keys)
    q_position = q_position if given_positions else q_position[:, :1] + np.arange(n_queries, dtype=np.int32)
    k_position = k_position if given_positions else np.arange(n_keys)[None]
    seen = np.ones((n_batch, n_queries, n_keys), bool)
    behind = q_position[:, :, None] - k_position[:, None]
    seen &= (behind >= 0) if causal else True
    seen &= (behind < window) if window else True
    seen &= ((q_ids[:, :, None] == k_ids[:, None]) & (q_ids != 0)[:, :, None]) if ids else True
    mask = Mask(
        q_ids_BT=q_ids if ids else None,
        k_ids_BS=k_ids if ids else None,
        q_position_BT=q_position if positions else None,
        k_position_BS=k_position if positions == "given" else None,
    )
    visits = tpu_decode.list_visits(mask if known else jax.tree.map(jnp.asarray, mask), n_batch, s)
    whole = np.broadcast_to(np.asarray(visits.whole).reshape(-1, s.blocks), (n_batch, s.blocks)).astype(bool)
    cut = np.pad(seen, ((0, 0), (0, 0), (0, -n_keys % s.tokens))).reshape(n_batch, n_queries, s.blocks, s.tokens)
    assert not (whole & ~cut.all((1, 3))).any()
    left = cut.any((1, 3))
    for part in listed(visits, s):
        for flag in (tpu_decode.FIRST, tpu_decode.LAST):
            assert sorted(row for row, _, flags in part if flags & flag) == list(range(n_batch))
        visible = [(row, block) for row, block, flags in part if flags & tpu_decode.VISIBLE]
        assert len(set(visible)) == len(visible)
        for row, block in visible:
            left[row, block] = False
    assert not left.any()


def test_the_gradient_is_that_of_the_kernels_of_blocks(small_blocks):
    from tests.ops.test_attention_tpu import check as check_gradients

    check_gradients(case_of(queries=3, keys=300, q_offset=290, sinks=True, heads=4))


def step_of(write, attend):
    """One step of a generation loop over (cache of keys, of values, tokens so far)."""

    def step(carry, new):
        k, v, length_B = carry
        q, k_new, v_new = new
        rows = jnp.arange(k.shape[0])
        k, v = write(k, rows, length_B, k_new), write(v, rows, length_B, v_new)
        filled = jnp.arange(k.shape[1])[None] <= length_B[:, None]
        ids = jnp.ones_like(length_B)[:, None], filled.astype(jnp.int32)
        return (k, v, length_B + 1), attend(q, k, v, q_offset=length_B, segment_ids=ids)

    return step


def write_token(cache, rows, length_B, new):
    return cache.at[rows, length_B].set(new[:, 0])


def test_a_generation_loop(small_blocks):
    """A scan over single tokens gives what one causal call gives."""
    n_batch, n_tokens, n_keys = 2, 6, 300
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((n_batch, n_keys, h, 128)), jnp.float32) for h in (4, 2, 2))
    past = n_keys - n_tokens
    cut = lambda a: jnp.moveaxis(a[:, past:, None], 1, 0)
    carry = *(a.at[:, past:].set(0) for a in (k, v)), jnp.full(n_batch, past, jnp.int32)
    step = step_of(write_token, functools.partial(attention_tpu, interpret=True))
    loop = jax.jit(lambda *a: jax.lax.scan(step, *a), compiler_options=QUICK)
    _, out = loop(carry, (cut(q), cut(k), cut(v)))
    wanted = expected({"q": q[:, past:], "k": k, "v": v}, {"q_offset": past})
    assert relative_rms(jnp.moveaxis(out[:, :, 0], 0, 1), wanted) <= bound("float32", "attention.out0")
