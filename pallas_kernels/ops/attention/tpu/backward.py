# SPDX-License-Identifier: Apache-2.0
"""Backward TPU kernel of attention: dq, dk and dv in one pass over the visible blocks, key block by key block.

Grid (batch, key heads, pairs of blocks, query heads of a key head). Scores are recomputed transposed, [keys, queries],
so that the sums over queries need no transposition; dk and dv are summed in VMEM over queries and heads, dq over keys
for a whole part of the queries (Dao 2023, FlashAttention-2, arXiv:2307.08691, algorithm 2).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, LANES, NN, NT, TN, column, dot, round_up, widen
from pallas_kernels.ops.attention import block_pairs
from pallas_kernels.ops.attention.mask import visible_pairs
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

MOST_DQ_BYTES = 48 * 2**20  # in VMEM, of which v5p and TPU7x have 64 MiB; all else takes up to 12


def choose_parts(n_queries: int, itemsize: int, s: Settings) -> int:
    """Parts of the queries so that one part's dq of a group of heads fits VMEM; divides the number of query blocks.

    A part is there as a float32 sum and, in q's type of this size, twice: one is written while the next is filled.
    """
    n_blocks, of_query = n_queries // s.blocks[0], s.group * round_up(s.width, LANES) * (4 + 2 * itemsize)
    parts = 1
    while (n_queries // parts) * of_query > MOST_DQ_BYTES and parts < n_blocks:
        parts = next(count for count in range(parts + 1, n_blocks + 1) if n_blocks % count == 0)
    return parts


def _visit(refs, head, word, queries: slice, keys: slice, masked: bool, s: Settings, part_blocks: int):
    q, do = head_ref(refs["q"], 0, s.width, s)[queries], head_ref(refs["do"], 0, s.v_width, s)[queries]
    k, v = head_ref(refs["k"], 0, s.width, s)[keys], head_ref(refs["v"], 0, s.v_width, s)[keys]
    n_queries = queries.stop - queries.start
    scores, slope = log2_scores(dot(k, q, NT), s)
    if masked:
        q_id = refs["q_ids"][0, :, queries] if s.ids else None
        q_position = refs["q_positions"][0, :, queries] if s.positions else None
        k_id = widen(refs["k_id_columns"][keys], n_queries) if s.ids else None
        k_position = widen(refs["k_position_columns"][keys], n_queries) if s.positions else None
        scores = jnp.where(visible_pairs(q_id, k_id, q_position, k_position, s.causal, s.window), scores, HIDDEN)
    weights = jnp.exp2(scores - refs["log_sum"][0, 0, :, queries])
    refs["dv_sum"][keys] += dot(weights.astype(do.dtype), do, NN)
    dscores = weights * (dot(v, do, NT) - refs["delta"][0, 0, :, queries])
    dscores = (dscores if slope is None else dscores * slope).astype(q.dtype)
    refs["dk_sum"][keys] += dot(dscores, q, NN)
    block = jax.lax.rem(block_pairs.query_block(word), part_blocks)
    first = pl.multiple_of(block * s.blocks[0] + queries.start, s.tile[0])
    refs["dq_sum"][head, pl.ds(first, n_queries)] += dot(dscores, k, TN)


def _kernel(words, *args, names: tuple, s: Settings, last_key: int):
    refs = dict(zip(names, args))
    word, head = word_at(words, pl.program_id(0), pl.program_id(2)), pl.program_id(3)
    part_blocks = refs["dq_sum"].shape[1] // s.blocks[0]
    begins = (word & block_pairs.FIRST != 0) & (head == 0)
    ends = (word & block_pairs.LAST != 0) & (head == s.group - 1)

    @pl.when(begins)
    def _():
        refs["dk_sum"][...] = jnp.zeros_like(refs["dk_sum"])
        refs["dv_sum"][...] = jnp.zeros_like(refs["dv_sum"])
        if s.ids:
            refs["k_id_columns"][...] = column(refs["k_ids"][0])
        if s.positions:
            refs["k_position_columns"][...] = column(refs["k_positions"][0])

    @pl.when(begins & (block_pairs.key_block(word) == 0))
    def _():
        refs["dq_sum"][...] = jnp.zeros_like(refs["dq_sum"])

    for i in range(block_pairs.TILES):
        for j in range(block_pairs.TILES):
            tile = slice(i * s.tile[0], (i + 1) * s.tile[0]), slice(j * s.tile[1], (j + 1) * s.tile[1])

            @pl.when(word & block_pairs.tile_bit(i, j) != 0)
            def _(tile=tile):
                _visit(refs, head, word, *tile, True, s, part_blocks)

    @pl.when(word & block_pairs.WHOLE != 0)
    def _():
        for j in range(block_pairs.TILES):
            for i in range(block_pairs.TILES):
                tile = slice(i * s.tile[0], (i + 1) * s.tile[0]), slice(j * s.tile[1], (j + 1) * s.tile[1])
                _visit(refs, head, word, *tile, False, s, part_blocks)

    @pl.when(ends)
    def _():
        head_ref(refs["dk"], 0, s.width, s)[...] = (refs["dk_sum"][...] * s.scale).astype(refs["dk"].dtype)
        head_ref(refs["dv"], 0, s.v_width, s)[...] = refs["dv_sum"][...].astype(refs["dv"].dtype)

    @pl.when(ends & (block_pairs.key_block(word) == last_key))
    def _():
        for k in range(s.group):
            dq = head_ref(refs["dq"], k, s.width, s)
            dq[...] = (refs["dq_sum"][k] * s.scale).astype(dq.dtype)


def backward(arrays: dict, pairs: block_pairs.Pairs, parts: int, s: Settings) -> dict:
    """Runs the kernel on padded arrays (see tpu.py): {"dq", "dk", "dv"} laid out like q, k, v.

    dk and dv are float32 with a leading axis of `parts` if there are several, to be summed.
    """
    words, count = pairs
    n_batch = arrays["q"].shape[0]
    tokens_axis = 1 if s.natural else 2
    n_queries, n_keys = arrays["q"].shape[tokens_axis], arrays["k"].shape[tokens_axis]
    q_block, k_block = s.blocks
    part_queries = n_queries // parts

    def part(w):
        return block_pairs.query_block(w) // (part_queries // q_block)

    def at_queries(b, k, n, r, words):
        return b, k * s.group + r, block_pairs.query_block(word_at(words, b, n))

    def at_keys(b, k, n, r, words):
        return b, k, block_pairs.key_block(word_at(words, b, n))

    def at_parts(b, k, n, r, words):
        return b, k, part(word_at(words, b, n))

    def at_part_keys(b, k, n, r, words):
        w = word_at(words, b, n)
        return part(w) * n_batch + b, k, block_pairs.key_block(w)

    def head_row(b, k, n, r, words):
        return b, k * s.group + r, 0, block_pairs.query_block(word_at(words, b, n))

    specs = {
        "q": block_spec(q_block, s.width, at_queries, s),
        "do": block_spec(q_block, s.v_width, at_queries, s),
        "k": block_spec(k_block, s.width, at_keys, s),
        "v": block_spec(k_block, s.v_width, at_keys, s),
        "log_sum": pl.BlockSpec((1, 1, 1, q_block), head_row),
        "delta": pl.BlockSpec((1, 1, 1, q_block), head_row),
    }
    specs |= mask_specs(arrays, s)
    inputs = {name: (array, specs[name]) for name, array in arrays.items()}
    dtype = arrays["q"].dtype if parts == 1 else F32
    key_sums = functools.partial(array_shape, parts * n_batch, n_keys, s.kv_heads, dtype=dtype, s=s)
    outputs = {
        "dq": (
            array_shape(n_batch, n_queries, s.heads, s.width, arrays["q"].dtype, s),
            block_spec(part_queries, s.width, at_parts, s, s.group),
        ),
        "dk": (key_sums(s.width), block_spec(k_block, s.width, at_part_keys, s)),
        "dv": (key_sums(s.v_width), block_spec(k_block, s.v_width, at_part_keys, s)),
    }
    scratch = {
        "dq_sum": pltpu.VMEM((s.group, part_queries, s.width), F32),
        "dk_sum": pltpu.VMEM((k_block, s.width), F32),
        "dv_sum": pltpu.VMEM((k_block, s.v_width), F32),
    }
    if s.ids:
        scratch["k_id_columns"] = pltpu.VMEM((k_block, LANES), jnp.int32)
    if s.positions:
        scratch["k_position_columns"] = pltpu.VMEM((k_block, LANES), jnp.int32)
    grid = (n_batch, s.kv_heads, count, s.group)
    kernel = functools.partial(_kernel, last_key=n_keys // k_block - 1)
    found = call_kernel(kernel, "attention_backward", grid, words, inputs, outputs, scratch, s)
    if parts > 1:
        found |= {name: found[name].reshape(parts, n_batch, *found[name].shape[1:]) for name in ("dk", "dv")}
    return found
