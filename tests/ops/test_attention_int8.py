# SPDX-License-Identifier: Apache-2.0
"""attention over int8 keys and values: that over the numbers they stand for, and no floating-point copy of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform, attention, cache_write
from pallas_kernels.ops.attention import int8
from tests.tolerances import check_close

L, B, S, K, H, P = 2, 2, 300, 2, 4, 8
"""Layers, rows, slots, key heads, heads, width."""


def stored(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(int8 [L, B, S, K, P], scales [L, B, K, S], the numbers that they stand for)."""
    values = rng.integers(-127, 128, (L, B, S, K, P)).astype(np.int8)
    scales = rng.uniform(0.002, 0.03, (L, B, K, S)).astype(np.float32)
    return values, scales, values * np.moveaxis(scales, 3, 2)[..., None]


def calls(rng) -> dict[str, tuple[int, dict]]:
    """Name -> (queries, options): of decoding, of rings, of several queries, of padding."""
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    lengths = np.array([7, 260], np.int32)
    known = (np.arange(S)[None] <= lengths[:, None]).astype(np.int32)
    ring = np.stack([rng.permutation(S) for _ in range(B)]).astype(np.int32)
    return {
        "decode": (1, {"q_offset": lengths, "segment_ids": (np.ones((B, 1), np.int32), known), "layer": 1}),
        "ring": (
            1,
            {"positions": (ring.max(1, keepdims=True) - 9, ring), "window": 60, "sinks": normal(H), "layer": 0},
        ),
        "several": (5, {"q_offset": np.array([100, 295], np.int32), "softcap": 3.0, "gate": normal(B, 5, H, P)}),
        "padding": (3, {"segment_ids": (np.array([[1, 0, 1], [0, 0, 2]], np.int32), 2 * known), "causal": False}),
    }


@pytest.mark.parametrize("block", [128, pytest.param(512, marks=pytest.mark.slow)])
def test_equals_attention_over_the_numbers_meant(block, monkeypatch):
    """Blocks that do not divide the keys, and one block; every call in one program."""
    monkeypatch.setattr(int8, "MOST", 1)
    monkeypatch.setattr(int8, "LEAST_KEYS", block)
    rng = np.random.default_rng(0)
    (k, k_scale, k_meant), (v, v_scale, v_meant) = stored(rng), stored(rng)
    given = {name: (rng.normal(size=(B, n, H, P)).astype(np.float32), o) for name, (n, o) in calls(rng).items()}

    def run():
        found = {}
        for name, (q, options) in given.items():
            cut = (lambda a: a) if "layer" in options else (lambda a: a[1])
            meant = attention(q, cut(k_meant), cut(v_meant), implementation="reference", **options)
            scales = {"k_scale": cut(k_scale), "v_scale": cut(v_scale)}
            for how in ("xla", "reference", "xla on a GPU"):
                with assume_platform("gpu" if "GPU" in how else "cpu"):
                    y = attention(q, cut(k), cut(v), implementation=how.split()[0], **scales, **options)
                found[name, how] = y, meant
        return found

    for (name, how), (actual, expected) in jax.jit(run)().items():
        check_close(actual, expected, dtype="float32", what=f"{name} by {how}")


def test_blocks_hold_so_many_numbers():
    assert int8.block_size(8 * 128, 262_144) == 32_768  # 64 MiB of bfloat16
    assert int8.block_size(64 * 8 * 128, 262_144) == 512
    assert int8.block_size(8 * 128, 300) == 300


def test_no_floating_point_copy_of_the_keys(monkeypatch):
    """Nor one in int8: a token reads them where they lie. Of the compiled program, fusions' insides included."""
    monkeypatch.setattr(int8, "MOST", 1)
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    slots = 8192
    cache, scale = shape(jnp.int8, L, B, slots, K, P), shape(jnp.float32, L, B, K, slots)

    def decode(q, k, v, k_scale, v_scale, length_B, layer):
        known = (jnp.arange(slots)[None] <= length_B[:, None]).astype(jnp.int32)
        ids = jnp.ones((B, 1), jnp.int32), known
        return attention(q, k, v, k_scale=k_scale, v_scale=v_scale, q_offset=length_B, segment_ids=ids, layer=layer)

    q, lengths, layer = shape(jnp.bfloat16, B, 1, H, P), shape(jnp.int32, B), shape(jnp.int32)
    text = jax.jit(decode).lower(q, cache, cache, scale, scale, lengths, layer).compile().as_text()
    sizes = {}
    for kind, dims in re.findall(r"= (\w+)\[([\d,]+)\]\S* (?!parameter|get-tuple)", text):
        sizes[kind] = max(sizes.get(kind, 0), int(np.prod([int(n) for n in dims.split(",")])))
    assert sizes["bf16"] > 0 and max(sizes[kind] for kind in ("bf16", "f32", "s8") if kind in sizes) < slots * K * P


def test_int8_is_written_as_it_is():
    rng = np.random.default_rng(1)
    array, value = (rng.integers(-127, 128, (L, B, n, K, P)).astype(np.int8) for n in (9, 3))
    slots = np.array([[0, 9, 4], [8, 7, 12]], np.int32)
    expected = array.copy()
    for row in range(B):
        for t, slot in enumerate(slots[row]):
            if slot < 9:
                expected[1, row, slot] = value[1, row, t]
    for how in ("xla", "reference"):
        np.testing.assert_array_equal(cache_write(array, slots, value[1], layer=1, implementation=how), expected)


Q, INT8, SCALE = np.zeros((B, 1, H, P), np.float32), np.zeros((B, S, K, P), np.int8), np.zeros((B, K, S), np.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"v_scale": None}, ValueError, "v_scale is None, the other scale is not"),
        (
            {"k_BSKP": INT8.astype(np.float32)},
            TypeError,
            "k_BSKP has dtype float32, expected int8, as k_scale is given",
        ),
        ({"v_scale": SCALE[:, :, :-1]}, ValueError, r"v_scale has shape \[2, 2, 299\]"),
        ({"k_scale": SCALE.astype(np.int32)}, TypeError, "k_scale has dtype int32"),
        ({"k_BSKP": INT8[0]}, ValueError, "k_BSKP has shape"),
        ({"context_axis": "context"}, ValueError, r"context_axis \('context'\) and k_scale cannot be given together"),
        ({"k_scale": None, "v_scale": None}, TypeError, "k_BSKP has dtype int8"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    arguments = {"k_BSKP": INT8, "v_BSKP": INT8, "k_scale": SCALE, "v_scale": SCALE, **changes}
    with pytest.raises(error, match=message):
        attention(Q, **arguments)


def test_kernels_leave_it_to_xla():
    scales = {"k_scale": SCALE, "v_scale": SCALE}
    for platform in ("gpu", "tpu"):
        with assume_platform(platform), pytest.raises(NotImplementedError, match="of attention cannot serve this call"):
            attention(Q.astype(jnp.bfloat16), INT8, INT8, implementation=platform, **scales)
