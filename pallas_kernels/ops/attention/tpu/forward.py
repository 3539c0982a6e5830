# SPDX-License-Identifier: Apache-2.0
"""Forward TPU kernel of attention: online softmax over the visible blocks, the output gate in the epilogue.

Grid (batch, heads, pairs of blocks). Scores are kept in units of log 2 (Dao 2023, FlashAttention-2, arXiv:2307.08691).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, LANES, LOG2E, NN, NT, column, dot, widen
from pallas_kernels.ops.attention import block_pairs
from pallas_kernels.ops.attention.mask import LOWEST, visible_pairs
from pallas_kernels.ops.attention.tpu.common import (
    HIDDEN,
    Settings,
    array_shape,
    block_spec,
    call_kernel,
    head_ref,
    log2_scores,
    mask_specs,
    word_at,
)

STRIP = 512  # queries whose scores are alive together


def _start(refs, s: Settings):
    rows = s.blocks[0]
    if s.sinks:
        refs["top"][...] = column(jnp.maximum(refs["sinks"][0, 0] * LOG2E, LOWEST))
        refs["total"][...] = jnp.ones((rows, LANES), F32)
    else:
        refs["top"][...] = jnp.full((rows, LANES), LOWEST, F32)
        refs["total"][...] = jnp.zeros((rows, LANES), F32)
    refs["sum"][...] = jnp.zeros_like(refs["sum"])
    if s.ids:
        refs["q_id_columns"][...] = column(refs["q_ids"][0])
    if s.positions:
        refs["q_position_columns"][...] = column(refs["q_positions"][0])


def _visit(refs, rows: slice, keys: slice, masked: bool, s: Settings):
    """Takes a tile of keys into the running softmax of some queries."""
    q, k, v = (
        head_ref(refs["q"], 0, s.width, s),
        head_ref(refs["k"], 0, s.width, s),
        head_ref(refs["v"], 0, s.v_width, s),
    )
    n_keys = keys.stop - keys.start
    scores, _ = log2_scores(dot(q[rows], k[keys], NT), s)
    if masked:
        q_id = widen(refs["q_id_columns"][rows], n_keys) if s.ids else None
        q_position = widen(refs["q_position_columns"][rows], n_keys) if s.positions else None
        k_id = refs["k_ids"][0, :, keys] if s.ids else None
        k_position = refs["k_positions"][0, :, keys] if s.positions else None
        scores = jnp.where(visible_pairs(q_id, k_id, q_position, k_position, s.causal, s.window), scores, HIDDEN)
    before = refs["top"][rows]
    top = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - widen(top, n_keys))
    shrink = jnp.exp2(before - top)
    refs["top"][rows] = top
    refs["total"][rows] = refs["total"][rows] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    added = dot(weights.astype(v.dtype), v[keys], NN)
    refs["sum"][rows] = refs["sum"][rows] * widen(shrink, s.v_width) + added


def _finish(refs, s: Settings):
    total = refs["total"][...]
    seen = total > 0.0
    total = jnp.where(seen, total, 1.0)
    out = refs["sum"][...] / widen(total, s.v_width)
    if "ungated" in refs:
        head_ref(refs["ungated"], 0, s.v_width, s)[...] = out.astype(refs["ungated"].dtype)
    if s.gate == "channel":
        out *= jax.nn.sigmoid(head_ref(refs["gate"], 0, s.v_width, s)[...].astype(F32))
    elif s.gate == "head":
        out *= widen(column(jax.nn.sigmoid(refs["gate"][0, 0])), s.v_width)
    head_ref(refs["out"], 0, s.v_width, s)[...] = out.astype(refs["out"].dtype)
    if "log_sum" in refs:
        log_sum = jnp.where(seen, refs["top"][...] + jnp.log2(total), 0.0)
        refs["log_sum"][0, 0] = log_sum.T[:1]


def _kernel(words, *args, names: tuple, s: Settings):
    refs = dict(zip(names, args))
    word = word_at(words, pl.program_id(0), pl.program_id(2))
    strip = min(STRIP, s.blocks[0])

    @pl.when(word & block_pairs.FIRST != 0)
    def _():
        _start(refs, s)

    @pl.when(word & block_pairs.WHOLE != 0)
    def _():
        for first in range(0, s.blocks[0], strip):
            for key in range(0, s.blocks[1], s.tile[1]):
                _visit(refs, slice(first, first + strip), slice(key, key + s.tile[1]), False, s)

    for i in range(block_pairs.TILES):
        for j in range(block_pairs.TILES):

            @pl.when(word & block_pairs.tile_bit(i, j) != 0)
            def _(i=i, j=j):
                height, width = s.tile
                for first in range(i * height, (i + 1) * height, min(strip, height)):
                    rows = slice(first, first + min(strip, height))
                    _visit(refs, rows, slice(j * width, (j + 1) * width), True, s)

    @pl.when(word & block_pairs.LAST != 0)
    def _():
        _finish(refs, s)


def forward(arrays: dict, pairs: block_pairs.Pairs, s: Settings, *, residuals: bool) -> dict:
    """Runs the kernel on padded arrays (see tpu.py): {"out", and for the backward "log_sum", "ungated"}.

    log_sum: float32 [B, H, 1, T], log 2 of the softmax's denominator, 0 where no key is visible. ungated: like out.
    """
    words, count = pairs
    n_batch = arrays["q"].shape[0]
    n_queries = arrays["q"].shape[1 if s.natural else 2]
    q_block, k_block = s.blocks

    def at_queries(b, h, n, words):
        return b, h, block_pairs.query_block(word_at(words, b, n))

    def at_keys(b, h, n, words):
        return b, h // s.group, block_pairs.key_block(word_at(words, b, n))

    def head_row(size):
        return pl.BlockSpec((1, 1, 1, size), lambda b, h, n, w: (b, h, 0, block_pairs.query_block(word_at(w, b, n))))

    specs = {
        "q": block_spec(q_block, s.width, at_queries, s),
        "k": block_spec(k_block, s.width, at_keys, s),
        "v": block_spec(k_block, s.v_width, at_keys, s),
        "gate": block_spec(q_block, s.v_width, at_queries, s) if s.gate == "channel" else head_row(q_block),
        "sinks": pl.BlockSpec(
            (1, 1, 1, q_block), lambda b, h, n, w: (0, h, 0, block_pairs.query_block(word_at(w, b, n)))
        ),
    }
    specs |= mask_specs(arrays, s)
    inputs = {name: (array, specs[name]) for name, array in arrays.items()}
    dtype = arrays["q"].dtype
    out = array_shape(n_batch, n_queries, s.heads, s.v_width, dtype, s), block_spec(q_block, s.v_width, at_queries, s)
    outputs = {"out": out}
    if residuals:
        outputs["log_sum"] = jax.ShapeDtypeStruct((n_batch, s.heads, 1, n_queries), F32), head_row(q_block)
        if s.gate:
            outputs["ungated"] = out
    scratch = {
        "top": pltpu.VMEM((q_block, LANES), F32),
        "total": pltpu.VMEM((q_block, LANES), F32),
        "sum": pltpu.VMEM((q_block, s.v_width), F32),
    }
    if s.ids:
        scratch["q_id_columns"] = pltpu.VMEM((q_block, LANES), jnp.int32)
    if s.positions:
        scratch["q_position_columns"] = pltpu.VMEM((q_block, LANES), jnp.int32)
    return call_kernel(_kernel, "attention_forward", (n_batch, s.heads, count), words, inputs, outputs, scratch, s)
