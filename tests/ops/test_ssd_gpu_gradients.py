# SPDX-License-Identifier: Apache-2.0
"""What XLA does around the gradient kernel of ssd on Hopper: sums of decay gradients, a start state, scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import LAYOUTS, make_segment_ids

gpu = pytest.importorskip("pallas_kernels.ops.ssd.gpu.api", reason="this JAX has no Pallas Mosaic GPU")
from pallas_kernels.ops.ssd.gpu import grads as gpu_grads  # noqa: E402

TOKENS, CHUNKS, SPAN = 200, 4, 2 * gpu.TILE


def marks(layout):
    """Segment ids padded to whole spans."""
    ids = make_segment_ids(layout, 2, TOKENS, seed=5)
    ids = np.ones((2, TOKENS), np.int32) if ids is None else ids
    return np.pad(ids, ((0, 0), (0, CHUNKS * gpu.TILE - TOKENS)))


def documents(ids):
    """Per token: index of its document, padding counted to the document before it; the row's first one is 0."""
    out, document, last = [], 0, 0
    for value in ids:
        document += bool(value and last and value != last)
        last = value or last
        out.append(document)
    return np.array(out)


def seen_pairs(ids):
    """[i, j]: whether token i sees token j <= i."""
    index, document, real = np.arange(len(ids)), documents(ids), ids != 0
    return (index <= index[:, None]) & (document == document[:, None]) & real & real[:, None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decay_gradients_sum_what_crosses_each_token(layout):
    rng = np.random.default_rng(0)
    ids = marks(layout)
    tokens, heads = ids.shape[1], 3
    pairs = rng.standard_normal((2, heads, tokens, tokens)) * np.stack([seen_pairs(row) for row in ids])[:, None]
    net = pairs.sum(3) - pairs.sum(2)
    ends = range(SPAN, tokens + 1, SPAN)
    end = np.stack([pairs[:, :, e:, :e].sum((2, 3)) for e in ends], axis=1)
    by_tile = net.reshape(2, heads, CHUNKS // 2, 2, gpu.TILE).transpose(0, 2, 3, 1, 4)
    found = gpu._decay_grads(jnp.asarray(by_tile, jnp.float32), jnp.asarray(end, jnp.float32))
    found = np.asarray(found).reshape(2, tokens, heads)
    for t in range(tokens):
        expected = pairs[:, :, t:, :t].sum((2, 3))
        np.testing.assert_allclose(found[:, t], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", ["dense", "packed", "left"])
def test_rounding_of_the_start_state_is_given_back(layout):
    rng = np.random.default_rng(1)
    ids = marks(layout)
    heads, groups, state = 2, 1, 64
    dt = rng.random((2, TOKENS, heads), np.float32) * 0.01 * (ids[:, :TOKENS, None] != 0)
    own = jnp.asarray(ids[:, :TOKENS])
    ab = gpu.decay_vectors(jnp.asarray(dt), -jnp.ones(heads), CHUNKS, gpu.document_vectors(own, CHUNKS)[1])
    init = rng.standard_normal((2, heads, gpu.TILE, state)).astype(np.float32)
    dy, c_mat = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((2, TOKENS, heads, gpu.TILE), (2, TOKENS, groups, state))
    )
    r_states = jnp.asarray(rng.standard_normal((2, CHUNKS // 2, heads, gpu.TILE, state)), jnp.bfloat16)
    rows, through = gpu._rounded_start(jnp.asarray(init), dy, c_mat, ab, own, r_states)
    rest = init - np.asarray(jnp.asarray(init, jnp.bfloat16), np.float64)
    wide = [np.asarray(v, np.float64) for v in (dy, c_mat, r_states)]
    for row in range(2):
        document = documents(ids[row])[:SPAN]
        seen = (document == 0) & (ids[row, :SPAN] != 0)
        decay = np.exp2(-np.cumsum(dt[row, :SPAN].astype(np.float64), 0))
        expected = np.einsum("ihp,hpn,in->ih", wide[0][row, :SPAN], rest[row], wide[1][row, :SPAN, 0]) * decay
        actual = np.asarray(rows[row]).swapaxes(1, 2).reshape(SPAN, heads)
        np.testing.assert_allclose(actual, expected * seen[:, None], rtol=0.02, atol=2e-3)
        expected = (wide[2][row, 0] * rest[row]).sum((1, 2)) * decay[-1] * (document[-1] == 0)
        np.testing.assert_allclose(np.asarray(through[row]), expected, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("layout", ["dense", "scattered"])
def test_scores_of_wide_states_are_causal_and_zero_on_padding(layout):
    rng = np.random.default_rng(2)
    ids = marks(layout)
    real = gpu.document_vectors(jnp.asarray(ids), CHUNKS)[0]
    b_mat, c_mat = (jnp.asarray(rng.standard_normal((2, TOKENS, 2, 8)), jnp.bfloat16) for _ in range(2))
    cfg = gpu_grads.Grads(2, 2, 2, 256, CHUNKS, multiprocessors=132)
    found = np.asarray(gpu_grads._score_tiles(cfg, *(gpu_grads._by_tile(v, real, CHUNKS) for v in (b_mat, c_mat))))
    found = found.astype(np.float64)
    full = [np.pad(np.asarray(v, np.float64), ((0, 0), (0, CHUNKS * gpu.TILE - TOKENS), (0, 0), (0, 0)))
            for v in (b_mat, c_mat)]  # fmt: skip
    scores = np.einsum("bjgn,bign->bgji", *full)
    index = np.arange(CHUNKS * gpu.TILE)
    for row in range(2):
        seen = (index[:, None] <= index) & (ids[row] != 0)[:, None] & (ids[row] != 0)
        expected = np.where(seen, scores[row], 0.0)
        for chunk in range(CHUNKS):
            for pair in range(2 - chunk % 2):  # a first tile with itself and the second one, a second with itself
                j, i = (slice(c * gpu.TILE, (c + 1) * gpu.TILE) for c in (chunk, chunk + pair))
                np.testing.assert_allclose(found[row, chunk, :, pair], expected[:, j, i], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("multiprocessors", [132, 114, 78, 15])  # H100 SXM, H100 PCIe, H20; an odd number
def test_every_tile_has_one_thread_block(multiprocessors):
    cfg = gpu_grads.Grads(3, 4, 2, 64, 50, multiprocessors)
    blocks = 3 * 2 * 50
    half, span = jax.vmap(lambda block: gpu_grads._schedule(cfg, block))(jnp.arange(blocks))
    assert sorted(zip(span.tolist(), half.tolist(), strict=True)) == [(i // 2, i % 2) for i in range(blocks)]
