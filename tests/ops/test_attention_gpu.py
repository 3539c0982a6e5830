# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels of attention: masks and ranges anywhere, the kernels interpreted, or run on a Hopper GPU."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import assume_platform, attention, oracle
from pallas_kernels.layouts import LAYOUTS, make_segment_ids
from pallas_kernels.op import select
from pallas_kernels.ops import OPS
from pallas_kernels.ops.attention import cases
from pallas_kernels.ops.attention.gpu import masks as gpu_masks
from pallas_kernels.ops.attention.mask import make_mask
from tests.ops.interpreter import interpreted, needs_gpu_interpreter

SMALL = {"batch": 1, "heads": 2, "kv_heads": 1}
PACKED_WIDE = cases.Case("packed_wide", queries=400, keys=400, width=128, layout="packed", sinks=True, **SMALL)
MORE_CASES = (
    cases.Case("window_wide", queries=300, keys=300, width=128, window=90, gate="head", **SMALL),
    cases.Case("heads_of_256", queries=150, keys=150, width=200, layout="packed", softcap=20.0, **SMALL),
    *(
        dataclasses.replace(cases.CASES[name], batch=1)
        for name in ("softcap_sinks", "packed_window", "one_token", "cache")
    ),
)
DECODE = cases.Case("decode", 2, 1, 768, 8, 2, 64, q_offset=500)
DECODE_ROWS = cases.Case("decode_rows", 2, 2, 700, 8, 2, 128)
DECODE_WINDOW = cases.Case(
    "decode_window", 2, 3, 768, 8, 2, 128, window=300, sinks=True, softcap=10.0, gate="head", q_offset=700
)


def visible(n_queries, n_keys, causal, window, ids, positions, q_offset):
    """[B, T, S] bool, straight from the contract."""
    if positions is None:
        positions = (np.arange(n_queries) + np.reshape(q_offset, (-1, 1)), np.arange(n_keys)[None])
    behind = positions[0][:, :, None] - positions[1][:, None, :]
    seen = np.ones(behind.shape, bool)
    if causal:
        seen &= behind >= 0
    if window is not None:
        seen &= behind < window
    if ids is not None:
        seen = seen & (ids[0][:, :, None] == ids[1][:, None, :]) & (ids[0] != 0)[:, :, None]
    return seen


def as_told(bounds, n_queries, n_keys):
    """[M, n_queries, n_keys] bool: what the kernels make of their vectors (queries and keys to whole blocks)."""
    start, end, *q_ids = np.moveaxis(np.asarray(gpu_masks.query_rows(bounds, n_queries)), 1, 0)
    keys = gpu_masks.key_rows(bounds, n_keys)
    keys = [] if keys is None else list(np.moveaxis(np.asarray(keys), 1, 0))
    k_ids = keys.pop(0) if q_ids else None
    position = keys.pop(0) if keys else np.arange(n_keys)[None]
    seen = (position[:, None] >= start[:, :, None]) & (position[:, None] < end[:, :, None])
    return seen & (k_ids[:, None] == q_ids[0][:, :, None]) if q_ids else seen


SIZES = st.sampled_from([1, 7, 16, 40, 61, 90])  # few, as each is another program


@settings(max_examples=40)
@given(
    queries=SIZES,
    keys=st.none() | SIZES,
    layout=st.sampled_from(LAYOUTS),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 60),
    offset=st.integers(-10, 40) | st.just("each"),
    positions=st.booleans(),
    blocks=st.sampled_from([(16, 8), (8, 16), (24, 8)]),
    traced=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_masks_and_block_ranges(queries, keys, layout, causal, window, offset, positions, blocks, traced, seed):
    """Vectors say what the contract says; visited blocks hold all that is visible, those without masks only that."""
    rng = np.random.default_rng(seed)
    keys = keys or queries
    ids = None
    if layout != "dense":
        ids = tuple(make_segment_ids(layout, 2, n, seed=seed) for n in (queries, keys))
    where = None
    if positions:
        where, offset = tuple(rng.integers(0, 50, (2, n)).astype(np.int32) for n in (queries, keys)), 0
    elif offset == "each":
        offset = rng.integers(-10, 40, 2).astype(np.int32)
    seen = visible(queries, keys, causal, window, ids, where, offset)
    if traced:
        ids, where = (None if pair is None else tuple(map(jnp.asarray, pair)) for pair in (ids, where))
    bounds = gpu_masks.make_bounds(make_mask(causal, window, ids, where, offset), queries, keys)

    q_block, k_block = blocks
    n_q, n_k = -(-queries // q_block), -(-keys // k_block)
    told = as_told(bounds, n_q * q_block, n_k * k_block)
    assert (told[:, :queries, :keys] == seen).all()
    assert not told[:, queries:].any()
    assert not told[:, :, keys:].any()
    real = np.arange(n_q * q_block) < queries
    for row, rows, columns in zip(
        told,
        np.asarray(gpu_masks.key_ranges(bounds, keys, *blocks)),
        np.asarray(gpu_masks.query_ranges(bounds, keys, *blocks)),
        strict=True,
    ):
        tiles = row.reshape(n_q, q_block, n_k, k_block)
        full = (tiles | ~real.reshape(n_q, q_block, 1, 1)).all((1, 3))
        for i, (lo, a, b, hi) in enumerate(rows):
            assert 0 <= lo < hi <= n_k
            assert lo <= a <= b <= hi
            assert not np.delete(tiles[i].any((0, 2)), range(lo, hi)).any()
            assert full[i, a:b].all()
        for j, (lo, a, b, hi) in enumerate(columns):
            assert 0 <= lo <= a <= b <= hi <= n_q
            assert not np.delete(tiles[:, :, j].any((1, 2)), range(lo, hi)).any()
            assert full[a:b, j].all()


@settings(max_examples=100)
@given(
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 60),
    offset=st.integers(-60, 100),
    blocks=st.sampled_from([(16, 8), (8, 16), (24, 8), (8, 8)]),
)
def test_block_ranges_by_bounds_alone(sizes, causal, window, offset, blocks):
    """Without ids and positions the ranges come from the bounds: as those from pairs of blocks."""
    bounds = gpu_masks.make_bounds(make_mask(causal, window, None, None, offset), *sizes)
    index = np.zeros((1, sizes[1]), np.int32) + np.arange(sizes[1], dtype=np.int32)
    expected = gpu_masks.key_ranges(bounds._replace(k_position_MS=index), sizes[1], *blocks)
    np.testing.assert_array_equal(gpu_masks.key_ranges(bounds, sizes[1], *blocks), expected)


def test_blocks_that_documents_and_windows_hide_are_skipped():
    def visited(window=None, ids=None):
        bounds = gpu_masks.make_bounds(make_mask(True, window, ids and (ids[0], ids[0]), None, 0), 4096, 4096)
        lo, a, b, hi = np.moveaxis(gpu_masks.key_ranges(bounds, 4096, 128, 128), 2, 0)
        return int((hi - lo).sum()), int((b - a).sum())

    assert visited() == (32 * 33 // 2, 32 * 31 // 2)
    assert visited(window=512) == (32 * 5 - 10, 32 * 3 - 6)
    documents = np.repeat(np.arange(1, 9, dtype=np.int32), 512)[None]
    assert visited(ids=[documents]) == (8 * 10, 8 * 6)


def test_calls_that_are_not_served_are_named():
    gpu = importlib.import_module("pallas_kernels.ops.attention.gpu.api")
    narrow, wide = jnp.zeros((1, 8, 2, 64), jnp.bfloat16), jnp.zeros((1, 8, 2, 320), jnp.bfloat16)
    if jax.__version_info__ < (0, 11):
        with assume_platform("gpu"), pytest.raises(NotImplementedError, match=r"JAX \(.*\) older than 0.11"):
            attention(narrow, narrow, narrow, implementation="gpu")
    assert gpu.supports(narrow, narrow, narrow) is None
    assert gpu.supports(narrow, narrow, wide) == "head width of v_BSKP (320) above 256"
    assert gpu.supports(narrow.astype(jnp.float32), narrow, narrow) == "dtype of q_BTHP (float32) is not bfloat16"


@needs_gpu_interpreter
def test_auto_leaves_to_cudnn_where_that_is_faster():
    """Dense causal calls of as many key heads as heads, without a gate, by measured gradients."""
    many, few, narrow = (jnp.zeros((1, 64, n, p), jnp.bfloat16) for n, p in ((4, 128), (2, 128), (4, 64)))
    ids = jnp.ones((1, 64), jnp.int32)

    def served(q, k, implementation="auto", **kwargs):
        with assume_platform("gpu"):
            return select(OPS["attention"], implementation, (q, k, k), kwargs).load().__name__

    assert served(many, many) == "attention_xla"
    assert served(many, many, "gpu") == "attention_gpu"
    assert served(many, few) == "attention_gpu"
    assert served(narrow, narrow) == "attention_gpu"
    settings = ({"gate": many}, {"window": 9}, {"segment_ids": (ids, ids)}, {"softcap": 2.0}, {"sinks": jnp.zeros(4)})
    for kwargs in (*settings, {"causal": False}, {"q_offset": jnp.zeros(1, jnp.int32)}):
        assert served(many, many, **kwargs) == "attention_gpu", kwargs


def check_interpreted(case, function=None, gradients=True, **changes):
    """Results of `function(arrays, call)`, or of the call itself, within the table of the float64 reference."""
    inputs = cases.make_inputs(case, "bfloat16")
    settings = {**cases.make_settings(case), **changes}
    arrays, fixed = oracle.split("attention", inputs)

    def call(arrays, **more):
        return oracle.call("attention", {**arrays, **fixed}, implementation="gpu", **settings, **more)[0]

    def run(arrays):
        return call(arrays) if function is None else function(arrays, call)

    expected = oracle.oracle("attention", inputs, **settings)
    with interpreted("attention", "gpu"):
        if gradients:
            out, pull = jax.vjp(run, arrays)
            [weights] = oracle.make_weights([out.shape])
            [grads] = pull(jnp.asarray(weights, out.dtype))
            actual = {"out0": out} | {f"d{name}": grad for name, grad in grads.items()}
        else:
            actual, expected = {"out0": run(arrays)}, {"out0": expected["out0"]}
    largest = max((oracle.rms(value) for key, value in expected.items() if key != "out0"), default=0.0)
    for key, value in expected.items():
        floor = 0.0 if key == "out0" else oracle.SMALL_GRADIENT * largest
        error, limit = oracle.relative_rms(actual[key], value, floor), oracle.bound("bfloat16", f"attention.{key}")
        assert error <= limit, f"{case.name}.{key}: relative RMS {error:.1e} above {limit:.0e}"


@needs_gpu_interpreter
@pytest.mark.quick
def test_kernels_interpreted():
    check_interpreted(PACKED_WIDE)


@needs_gpu_interpreter
def test_gradient_of_queries_in_float32():
    """All of it goes to what is given for it, none to the queries."""
    wide = lambda arrays, call: call(arrays, q_wide=arrays["q"].astype(jnp.float32))
    check_interpreted(cases.Case("wide", 1, 150, 150, 2, 1, 48, layout="packed"), wide)


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "width", [64, pytest.param(128, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow), 48]
)
def test_values_beside_something_else(width):
    """They are read there, and the gradients of both come together; heads that are padded are taken apart."""

    @jax.custom_vjp
    def together(k, v):
        """Something of no value before the values, whose gradient is the keys'."""
        return jnp.concatenate([jnp.full_like(k, jnp.nan), v], axis=2)

    together.defvjp(lambda k, v: (together(k, v), None), lambda _, d: tuple(jnp.split(d, 2, axis=2)))
    run = lambda arrays, call: call(arrays, kv=together(arrays["k"], arrays["v"]))
    check_interpreted(cases.Case("beside", 1, 150, 150, 4, 2, width, layout="packed"), run)


@needs_gpu_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
def test_more_kernels_interpreted(case):
    check_interpreted(case)


@needs_gpu_interpreter
@pytest.mark.slow
def test_kernels_mapped_over_the_batch():
    def mapped(arrays, call):
        return jax.vmap(lambda row: call({key: array[None] for key, array in row.items()})[0])(arrays)

    check_interpreted(cases.Case("mapped", 2, 200, 200, 2, 1, 64), mapped)


@needs_gpu_interpreter
@pytest.mark.quick
def test_few_queries_of_rows_filled_differently():
    """One row fills the cache, the other leaves most parts of it without a key."""
    check_interpreted(DECODE_ROWS, gradients=False, q_offset=jnp.array([698, 3]))


@needs_gpu_interpreter
@pytest.mark.quick
def test_few_queries_read_a_layer_of_stacked_caches():
    def layer(arrays, call):
        return call({**arrays, **{name: jnp.stack([3 * arrays[name], arrays[name]]) for name in ("k", "v")}}, layer=1)

    check_interpreted(DECODE, layer, gradients=False)


@needs_gpu_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", [DECODE, DECODE_WINDOW], ids=lambda case: case.name)
def test_few_queries(case):
    check_interpreted(case, gradients=False)


@needs_gpu_interpreter
def test_gradients_trace_in_a_shard_map_that_checks_what_varies():
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    x = jnp.zeros((2, 100, 2, 64), jnp.bfloat16)

    @jax.shard_map(mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P("data"), check_vma=True)
    def attend(x, ids, sinks):
        with assume_platform("gpu"):
            return attention(x, x, x, gate=x, segment_ids=ids, sinks=sinks, implementation="gpu")

    def loss(x, sinks):
        return attend(x, jnp.ones((2, 100), jnp.int32), sinks).astype(jnp.float32).sum()

    dx, dsinks = jax.eval_shape(jax.grad(loss, (0, 1)), x, jnp.zeros(2))
    assert (dx.shape, dsinks.shape) == (x.shape, (2,))


@pytest.mark.hopper
@pytest.mark.parametrize("case", [*cases.TEST_CASES, *cases.WIDTH_CASES], ids=lambda case: case.name)
def test_equals_the_full_matrix(case):
    inputs = cases.make_inputs(case, "bfloat16")
    with assume_platform("gpu"):
        found = oracle.compare("attention", inputs, dtype="bfloat16", implementation="gpu", **cases.make_settings(case))
    for name, (error, limit) in found.items():
        assert error <= limit, f"{name}: relative RMS {error:.2e} above {limit:.0e}"
