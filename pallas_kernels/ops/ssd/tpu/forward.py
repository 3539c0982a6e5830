# SPDX-License-Identifier: Apache-2.0
"""Forward TPU kernel of the Mamba-2 scan: grid (batch, head block, chunks), the state carried in VMEM.

x and y keep the model's layout [B, T, H P] and are transposed in VMEM, so that P is the streamed dimension of the
matrix unit and the CHUNK x CHUNK weights the stationary one:
y^T[P, i] = x^T[P, j] (S^T * L^T)[j, i] + state[P, N] C^T[N, i].
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, LANES, NT, dot
from pallas_kernels.ops.ssd.tpu import common
from pallas_kernels.ops.ssd.tpu import copies as tpu_copies
from pallas_kernels.ops.ssd.tpu.common import CHUNK, Blocks
from pallas_kernels.ops.ssd.tpu.copies import Copies

# Rows of the per-chunk scratch, each [heads, CHUNK].
INTRA, TAIL, START, SKIP = range(4)
N_ROWS = 4


def prepare_chunk(chunk, refs, blocks: Blocks):
    """Decays of one chunk into scratch: rows, totals, pair weights, and for the backward the tail decays (factors)."""
    tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    dt = refs["dt"][0, 0, :, tokens]
    log_decays = refs["decay"][0, 0, :, tokens] if "decay" in refs else dt * refs["A"][0]
    a = jnp.maximum(log_decays, common.LOG_DECAY_FLOOR)
    sums = common.decay_sums(a, blocks)
    documents = refs["documents"][0, :, tokens] if blocks.documents else None
    start, tail, total = jnp.exp(sums.from_start), jnp.exp(sums.to_end), jnp.exp(sums.total)
    if blocks.documents:
        start = start * documents[common.ENTERS : common.ENTERS + 1]
        tail = tail * documents[common.LEAVES : common.LEAVES + 1]
        total = total * documents[common.CARRIES : common.CARRIES + 1, CHUNK - 1 :]
    rows = refs["rows"]
    pair = jnp.ones_like(dt) if blocks.exact else jnp.exp(sums.to_reference)
    if "factors" in refs:
        refs["factors"][chunk] = tail
    rows[chunk, INTRA] = dt * pair
    rows[chunk, TAIL] = dt * tail
    rows[chunk, START] = start
    if blocks.skip:
        skip = refs["D"][0] if blocks.skip == "head" else jnp.ones((blocks.heads, 1), F32)
        rows[chunk, SKIP] = jnp.broadcast_to(skip, (blocks.heads, CHUNK))
    refs["totals"][chunk] = jnp.broadcast_to(total, refs["totals"].shape[1:])
    common.write_pair_sums(sums, chunk, refs, blocks)


def shared_products(chunk, refs, blocks: Blocks):
    """Masked S^T = B C^T of every group into scratch, tokens j by i."""
    tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    mask = common.pair_mask(refs["documents"][0, :, tokens] if blocks.documents else None, blocks.alone)
    for group in range(blocks.groups):
        lanes = group_lanes(group, blocks)
        B, C = refs["B"][0, tokens, lanes], refs["C"][0, tokens, lanes]
        refs["shared"][chunk * blocks.groups + group] = jnp.where(mask, dot(B, C, NT), 0.0)


def tile_heads(blocks: Blocks) -> int:
    """Heads whose channels fill the 128 lanes that are transposed together."""
    heads = max(1, LANES // blocks.width)
    return heads if blocks.heads % heads == 0 else blocks.heads


def transposed_heads(name, chunk, refs, blocks: Blocks) -> list:
    """[P, CHUNK] of every head out of the block [1, tokens, heads P] of that name, zero at padding."""
    heads, width = tile_heads(blocks), blocks.width
    tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    documents = refs["documents"][0, :, tokens] if blocks.documents else None
    found = []
    for first in range(0, blocks.heads, heads):
        tile = refs[name][0, tokens, first * width : (first + heads) * width].T
        tile = common.without_padding(tile, documents)
        found += [tile[k * width : (k + 1) * width] for k in range(heads)]
    return found


def store_heads(ref, chunk, first, values, blocks: Blocks):
    """Writes [P, CHUNK] of the heads from `first` on, a multiple of `tile_heads`, tokens-first."""
    heads, width = tile_heads(blocks), blocks.width
    for k in range(0, len(values), heads):
        lanes = slice((first + k) * width, (first + k + heads) * width)
        ref[0, chunk * CHUNK : (chunk + 1) * CHUNK, lanes] = jnp.concatenate(values[k : k + heads], 0).T


def stages(blocks: Blocks, most: int) -> list:
    """(group, heads) lists of at most `most` heads of one group each, whole tiles of heads where groups allow it."""
    size = min(most, blocks.group_heads)
    while blocks.group_heads % size:
        size -= 1
    return [
        (group, range(group * blocks.group_heads + first, group * blocks.group_heads + first + size))
        for group in range(blocks.groups)
        for first in range(0, blocks.group_heads, size)
    ]


def scale(x, chunk, heads, rows, row):
    """[len(heads) P, CHUNK]: channels of the heads times their row of the scratch, in the dtype of x."""
    parts = [x[head].astype(F32) * rows[chunk, row, head : head + 1] for head in heads]
    return jnp.concatenate(parts, 0).astype(x[0].dtype)


def group_lanes(group, blocks: Blocks) -> slice:
    return slice(group * blocks.state, (group + 1) * blocks.state)


def advance_state(x, chunk, group, heads, state, target, refs, blocks: Blocks):
    """Writes the heads' states after the chunk to `target`; both are refs [channels, N]."""
    width = blocks.width
    B = refs["B"][0, chunk * CHUNK : (chunk + 1) * CHUNK, group_lanes(group, blocks)]
    update = dot(scale(x, chunk, heads, refs["rows"], TAIL), B)
    for k, head in enumerate(heads):
        own = slice(head * width, (head + 1) * width)
        total = refs["totals"][chunk, head : head + 1]
        target[own] = state[own] * total + update[k * width : (k + 1) * width]


def _scan_heads(chunk, x, group, heads, refs, blocks: Blocks):
    """Outputs [P, CHUNK] of some heads of one group, and their carried state."""
    rows, width, dtype = refs["rows"], blocks.width, x[0].dtype
    C = refs["C"][0, chunk * CHUNK : (chunk + 1) * CHUNK, group_lanes(group, blocks)]
    shared = refs["shared"].at[chunk * blocks.groups + group]
    channels = slice(heads[0] * width, (heads[-1] + 1) * width)
    carried = dot(refs["state"][channels].astype(dtype), C, NT)
    outputs = []
    for k, head in enumerate(heads):
        weights = common.weigh_pairs(shared, chunk, head, refs, blocks)
        y = dot(scale(x, chunk, [head], rows, INTRA), weights.astype(dtype))
        y = y + carried[k * width : (k + 1) * width] * rows[chunk, START, head : head + 1]
        if blocks.skip:
            skip = rows[chunk, SKIP, head : head + 1]
            skip = skip * refs["D"][0, head * width : (head + 1) * width] if blocks.skip == "channel" else skip
            y = y + x[head].astype(F32) * skip
        outputs.append(y.astype(dtype))
    advance_state(x, chunk, group, heads, refs["state"], refs["state"], refs, blocks)
    return outputs


def _kernel(*args, names: tuple, blocks: Blocks):
    refs = dict(zip(names, args))
    step = pl.program_id(2)
    copies = Copies(refs, blocks)

    @pl.when(step == 0)
    def _():
        loads = copies.first_loads()
        state = refs["state"]
        state[...] = refs["initial"][0] if blocks.initial else jnp.zeros_like(state)
        copies.wait_for_first(loads)

    refs = copies.arrive()
    if "states" in refs:
        refs["states"][0, 0] = refs["state"][...].astype(refs["states"].dtype)
    if blocks.exact:
        _scan(refs, blocks, copies)
    else:
        strong = refs["strong"][0, 0, step] != 0
        pl.when(strong)(lambda: _scan(refs, dataclasses.replace(blocks, exact=True), copies))
        pl.when(jnp.logical_not(strong))(lambda: _scan(refs, blocks, copies))
    copies.finish()

    if blocks.final:

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            refs["last"][0] = refs["state"][...]


def _scan(refs, blocks: Blocks, copies: Copies):
    """Outputs of the chunks of a grid step, and the state behind them."""
    copies.load_ahead()
    refs = common.mask_maps(refs, blocks)
    for chunk in range(blocks.chunks):
        shared_products(chunk, refs, blocks)
    for chunk in range(blocks.chunks):
        prepare_chunk(chunk, refs, blocks)
    for chunk in range(blocks.chunks):
        x = transposed_heads("x", chunk, refs, blocks)
        waiting, first = [], 0
        for group, heads in stages(blocks, blocks.stage):
            waiting += _scan_heads(chunk, x, group, heads, refs, blocks)
            if len(waiting) % tile_heads(blocks) == 0:
                store_heads(refs["y"], chunk, first, waiting, blocks)
                waiting, first = [], heads[-1] + 1
        copies.store(chunk)


def _strong(inputs: dict, blocks: Blocks):
    """int32 [B x blocks, 1, grid steps]: 1 where a log decay is too strong for the factored form."""
    log_decays = inputs["decay"] if "decay" in inputs else inputs["dt"] * inputs["A"][None]
    by_step = log_decays.reshape(*log_decays.shape[:3], -1, blocks.tokens)
    strong = by_step.min(axis=(2, 4)) < common.PAIR_FLOOR
    return strong.astype(jnp.int32).reshape(-1, 1, strong.shape[-1])


def scratch_shapes(blocks: Blocks, dtype) -> dict:
    """Scratch that forward and backward share, by name; dtype: of B and C."""
    maps = pltpu.VMEM((1, blocks.tokens, blocks.groups * blocks.state), dtype)
    masked = {"masked B": maps, "masked C": maps} if blocks.documents else {}
    return masked | {
        "columns": pltpu.VMEM((blocks.chunks, 2, CHUNK, -(-blocks.heads // CHUNK) * CHUNK), F32),
        "pairs": pltpu.VMEM((blocks.chunks, 2, blocks.heads, CHUNK), F32),
        "rows": pltpu.VMEM((blocks.chunks, N_ROWS, blocks.heads, CHUNK), F32),
        "totals": pltpu.VMEM((blocks.chunks, blocks.heads, blocks.state), F32),
        "shared": pltpu.VMEM((blocks.chunks * blocks.groups, CHUNK, CHUNK), F32),
    }


def input_specs(blocks: Blocks, n_groups: int, n_heads: int, step_of=lambda c: c) -> dict:
    """Block specs of the inputs that forward and backward share, by name; `step_of` maps grid step to chunk block."""
    tokens, lanes = blocks.tokens, blocks.groups * blocks.state
    heads_a_group = n_heads // n_groups
    group = lambda h: h * blocks.heads // (heads_a_group * blocks.groups)
    by_tokens = lambda width: pl.BlockSpec((1, tokens, width), lambda b, h, c: (b, step_of(c), h))
    by_group = pl.BlockSpec((1, tokens, lanes), lambda b, h, c: (b, step_of(c), group(h)))
    states = pl.BlockSpec((1, blocks.channels, blocks.state), lambda b, h, c: (b, h, 0))
    skips = blocks.channels if blocks.skip == "channel" else blocks.heads
    steps = pl.BlockSpec((1, 1, blocks.heads, tokens), lambda b, h, c: (b, h, 0, step_of(c)))
    return {
        "x": by_tokens(blocks.channels),
        "dt": steps,
        "decay": steps,
        "A": pl.BlockSpec((1, blocks.heads, 1), lambda b, h, c: (h, 0, 0)),
        "B": by_group,
        "C": by_group,
        "D": pl.BlockSpec((1, skips, 1), lambda b, h, c: (h, 0, 0)),
        "documents": pl.BlockSpec((1, 8, tokens), lambda b, h, c: (b, 0, step_of(c))),
        "initial": states,
        "last": states,
        "states": pl.BlockSpec((1, 1, blocks.channels, blocks.state), lambda b, h, c: (b, step_of(c), h, 0)),
    }


def forward(inputs: dict, blocks: Blocks, *, n_groups: int, states_dtype=None, interpret=False) -> dict:
    """Runs the kernel on prepared arrays (see tpu.py); returns y [B, T, H P], and by request last and states.

    last: float32 [B, H P, N] after the last token. states: [B, grid steps, H P, N] before each grid step.
    """
    n_batch, n_tokens, width = inputs["x"].shape
    n_blocks = width // blocks.channels
    steps = n_tokens // blocks.tokens
    specs = input_specs(blocks, n_groups, n_blocks * blocks.heads)
    specs |= {name: pl.BlockSpec(memory_space=pl.ANY) for name in (*tpu_copies.STREAMED, *tpu_copies.RESIDENT)}
    outputs = {"y": (specs["x"], jax.ShapeDtypeStruct(inputs["x"].shape, inputs["x"].dtype))}
    if blocks.final:
        outputs["last"] = (specs["last"], jax.ShapeDtypeStruct((n_batch, width, blocks.state), F32))
    if states_dtype is not None:
        outputs["states"] = (specs["states"], jax.ShapeDtypeStruct((n_batch, steps, width, blocks.state), states_dtype))
    scratch = scratch_shapes(blocks, inputs["B"].dtype) | {"state": pltpu.VMEM((blocks.channels, blocks.state), F32)}
    if not blocks.exact:
        inputs = {**inputs, "strong": _strong(inputs, blocks)}
        scratch["factored"] = pltpu.VMEM((blocks.chunks, blocks.heads, CHUNK // common.GROUP, CHUNK), F32)
    scratch |= tpu_copies.scratch_shapes(inputs, blocks)
    grid = (n_batch, n_blocks, steps)
    return common.call_kernel(_kernel, "ssd_forward", grid, inputs, specs, outputs, scratch, blocks, interpret)
