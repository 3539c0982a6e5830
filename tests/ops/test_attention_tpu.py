# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of attention, interpreted, against the float64 matrix form; compiled where libtpu is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels import assume_platform
from pallas_kernels.layouts import LAYOUTS, make_segment_ids
from pallas_kernels.ops.attention import block_pairs, cases
from pallas_kernels.ops.attention.mask import make_mask
from pallas_kernels.ops.attention.tpu.api import attention_tpu, supports
from pallas_kernels.oracle import bound, relative_rms, rms
from tests.ops.support import oracle, run, served_by

BASE = cases.Case("base", 1, 600, 600, 4, 2, 64)


def case_of(**changes) -> cases.Case:
    changes = {"queries": 600, **changes}
    return dataclasses.replace(BASE, **{"keys": changes["queries"], **changes})


def check(case: cases.Case, dtype="float32", **sizes):
    """Every output and gradient of the interpreted kernels within the tolerance table."""
    inputs, options = cases.make_inputs(case, dtype), cases.make_settings(case)
    expected = oracle("attention", inputs, **options)
    kernel = functools.partial(attention_tpu, **{"interpret": True, **sizes})
    with served_by(kernel, takes=("stacked",)):
        actual = run("attention", inputs, **options)
    assert actual.keys() == expected.keys()
    largest = max(rms(value) for name, value in expected.items() if name.startswith("d"))
    for name in actual:
        error = relative_rms(actual[name], expected[name], floor=1e-2 * largest if name.startswith("d") else 0.0)
        assert error <= bound(dtype, f"attention.{name}"), f"{name}: relative RMS {error:.2e}"


SMALL = {"blocks": (256, 256)}
CASES = (
    case_of(name="window_softcap_sinks", window=130, softcap=2.0, sinks=True),
    case_of(name="scattered_full", layout="scattered", causal=False, gate="head", batch=2, queries=300),
    case_of(name="packed_positions", layout="packed", positions=True, window=70, queries=300, kv_heads=1, v_width=96),
)
MORE_CASES = (
    case_of(name="dense"),
    case_of(name="full", causal=False, gate="head", kv_heads=4, queries=300),
    case_of(name="no_gate_wide_v", kv_heads=1, v_width=96, gate=None, queries=300),
    case_of(name="packed", layout="packed", sinks=True),
    case_of(name="empty", layout="empty", batch=2, queries=300),
    case_of(name="cache", batch=2, queries=90, keys=600, q_offset=510, layout="dense"),
    case_of(name="outside_the_window", queries=200, keys=300, q_offset=250, window=80, sinks=True),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_matrix_form(case):
    check(case, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
def test_equals_the_matrix_form_in_more_cases(case):
    check(case, **SMALL)


@pytest.mark.parametrize("case", [
    case_of(name="few", batch=2, queries=3, keys=300, q_offset=290, sinks=True),
    pytest.param(
        case_of(name="few_head_gate", queries=5, keys=260, q_offset=100, window=50, gate="head", kv_heads=1),
        marks=pytest.mark.slow,
    ),
], ids=lambda case: case.name)  # fmt: skip
def test_few_queries_share_a_block(case):
    check(case)


def test_bfloat16():
    check(case_of(name="bfloat16", layout="packed", queries=400), "bfloat16", **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases.TEST_CASES if c.name not in ("one_token", "window_one")],
                         ids=lambda case: case.name)  # fmt: skip
def test_every_case(case):
    check(dataclasses.replace(case, width=64, v_width=case.v_width and 96))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(64, 700),  # where documents are of one token, dq and dk are nothing but rounding
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    width=st.sampled_from([64, 96, 128, 192, 256]),
    layout=st.sampled_from(LAYOUTS),
    window=st.sampled_from([None, 40, 300]),
    causal=st.booleans(),
    gate=st.sampled_from([None, "head", "elementwise"]),
    seed=st.integers(0, 99),
)
def test_equals_the_matrix_form_on_drawn_shapes(tokens, heads, width, layout, window, causal, gate, seed):
    heads = {"heads": heads[0], "kv_heads": heads[1]}
    drawn = {"layout": layout, "window": window, "causal": causal, "gate": gate, "seed": seed}
    check(case_of(name="drawn", queries=tokens, width=width, **heads, **drawn), **SMALL)


@pytest.mark.slow
def test_the_queries_in_parts(monkeypatch):
    from pallas_kernels.ops.attention.tpu import backward as tpu_backward

    monkeypatch.setattr(tpu_backward, "MOST_DQ_BYTES", 256 * 2 * 128 * 12)  # 256 queries of 2 heads in float32
    check(case_of(name="parts", layout="packed", queries=1000), **SMALL)


def visible(mask):
    """The mask of attention, written out."""
    behind = mask.q_position_BT[:, :, None] - mask.k_position_BS[:, None, :]
    seen = (mask.q_ids_BT[:, :, None] == mask.k_ids_BS[:, None, :]) & (mask.q_ids_BT != 0)[:, :, None]
    seen = seen & (behind >= 0) if mask.causal else seen
    return seen if mask.window is None else seen & (behind < mask.window)


@settings(max_examples=30, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 3, 9]),
    parts=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
    known=st.booleans(),
)
def test_listed_blocks_hold_all_that_is_visible(layout, causal, window, parts, seed, known):
    n_batch, blocks, n_tokens = 2, (4, 8), 32
    ids = make_segment_ids(layout, n_batch, n_tokens, seed=seed)
    ids = np.ones((n_batch, n_tokens), np.int32) if ids is None else np.asarray(ids)
    counted = np.arange(n_tokens, dtype=np.int32)[None]
    mask = make_mask(causal, window, (ids, ids), (counted, counted), 0)
    given_mask = mask if known else jax.tree.map(jnp.asarray, mask)
    seen = visible(mask)
    for pairs, n_groups in (
        (block_pairs.by_query(given_mask, blocks), n_tokens // blocks[0]),
        (block_pairs.by_key(given_mask, blocks, parts), parts * n_tokens // blocks[1]),
    ):
        for row, words in enumerate(np.broadcast_to(pairs.words_BN, (n_batch, pairs.words_BN.shape[1]))):
            assert int(pairs.count) <= len(words)
            words = words[: int(pairs.count)]
            flags = words & (block_pairs.FIRST | block_pairs.LAST)
            assert (flags & block_pairs.FIRST).sum() == n_groups * block_pairs.FIRST
            assert (flags & block_pairs.LAST).sum() == n_groups * block_pairs.LAST
            left = seen[row].copy()
            for word in words:
                i, j = block_pairs.query_block(word), block_pairs.key_block(word)
                block = left[i * blocks[0] : (i + 1) * blocks[0], j * blocks[1] : (j + 1) * blocks[1]]
                if word & block_pairs.WHOLE:
                    assert block.all()
                    block[:] = False
                for r in range(2):
                    for c in range(2):
                        if word & block_pairs.tile_bit(r, c):
                            block[r * 2 : r * 2 + 2, c * 4 : c * 4 + 4] = False
            assert not left.any()


def test_blocks_follow_what_is_visible():
    n_tokens, block = 1024, (64, 64)
    counted = np.arange(n_tokens, dtype=np.int32)[None]
    one, many = np.ones((1, n_tokens), np.int32), np.repeat(np.arange(1, 17, dtype=np.int32), 64)[None]
    count = lambda ids, window: (
        block_pairs.by_query(make_mask(True, window, (ids, ids), (counted, counted), 0), block).count
    )
    assert count(one, None) == 16 * 17 // 2
    assert count(many, None) == 16
    assert count(one, 128) == 16 + 15 + 14
    assert count(one, 129) == 16 + 15 + 14


def test_what_it_cannot_serve_it_names():
    q = jax.ShapeDtypeStruct((1, 64, 2, 80), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"head width of q_BTHP \(80\)"):
        jax.eval_shape(attention_tpu, q, q, q)
    half = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.float16)
    assert "float16" in supports(half, half, half)


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compile_for(generation: str, *, queries, keys=None, heads=8, kv_heads=2, width=128, dtype=jnp.bfloat16, **options):
    """Compiles forward and backward with the TPU compiler; needs libtpu, no TPU."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    keys = keys or queries
    q, k = array(2, queries, heads, width), array(2, keys, kv_heads, width)
    ids = array(2, queries, dtype=jnp.int32), array(2, keys, dtype=jnp.int32)

    def loss(q, k, v, gate, ids):
        return jnp.sum(attention_tpu(q, k, v, gate=gate, segment_ids=ids, **options).astype(jnp.float32))

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, range(4))).lower(q, k, k, q, ids).compile()


@pytest.mark.libtpu
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_compiles(generation):
    compile_for(generation, queries=1500)


@pytest.mark.libtpu
@pytest.mark.parametrize("queries", [1, 300])
def test_compiles_in_a_shard_map_that_checks_what_varies(queries):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v5e"]).devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"))
    rows, heads = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec("data", None, "tensor")

    def array(*shape, spec=heads, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    def gradients(q, k, v, offset):
        loss = lambda *qkv: jnp.sum(pallas_kernels.attention(*qkv, gate=q, q_offset=offset).astype(jnp.float32))
        return pallas_kernels.attention(q, k, v, gate=q, q_offset=offset), *jax.grad(loss, range(3))(q, k, v)

    q, k, offset = array(2, queries, 8, 128), array(2, 512, 4, 128), array(2, spec=rows, dtype=jnp.int32)
    split = jax.shard_map(gradients, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=(heads,) * 4)
    with jax.set_mesh(mesh), assume_platform("tpu"):
        text = jax.jit(split).lower(q, k, k, offset).compile().as_text()
    assert "attention_backward" in text
    assert ("attention_decode" in text) == (queries == 1)
    assert "all-reduce" not in text


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("options", [
    {"queries": 1024, "width": 64, "softcap": 30.0},
    {"queries": 1024, "width": 96},
    {"queries": 1024, "width": 192, "window": 300},
    {"queries": 1024, "width": 256, "kv_heads": 8},
    {"queries": 512, "dtype": jnp.float32},
    {"queries": 1, "keys": 4096, "q_offset": 4000},
    {"queries": 16_384, "keys": 65_536, "width": 64},
    {"queries": 12_288},
    {"queries": 6144, "width": 256},
], ids=str)  # fmt: skip
def test_compiles_at_every_width(generation, options):
    compile_for(generation, **options)


def test_named_implementation_needs_its_platform():
    q = jnp.zeros((1, 8, 2, 64))
    with pytest.raises(NotImplementedError, match="tpu"):
        pallas_kernels.attention(q, q, q, implementation="tpu")
