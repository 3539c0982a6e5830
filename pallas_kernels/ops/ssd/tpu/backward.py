# SPDX-License-Identifier: Apache-2.0
"""Backward TPU kernel of the Mamba-2 scan: one pass over the grid steps in reverse, dh carried in VMEM.

With L the pair weights, S = C B^T, xd = dt x, h the state that enters a chunk, dh the gradient of the one that leaves
it and c the inclusive sums of log decays (per head; T the chunk's last token):

    dxd_j = sum_i L_ij S_ij dy_i + e^(c_T - c_j) dh B_j          dx = dt dxd + D dy
    dS_ij = sum over heads L_ij dy_i . xd_j                       dC += dS B, dB += dS^T C
    dC_i += e^(c_i) h^T dy_i,  dB_j += e^(c_T - c_j) dh^T xd_j    dh <- e^(c_T) dh + sum_i e^(c_i) dy_i C_i^T
    d(dt)_j = x_j . dxd_j + A da_j,  dA = sum_t dt_t da_t         or da_t itself, where log decays are of their own

and da_t, the gradient of the log decay of token t, as the sum of everything that crosses t, and of nothing else:

    da_t = sum_{j < t <= i} W_ij + sum_{i >= t} g_i + sum_{j < t} q_j + e^(c_T) <dh, h>
    W_ij = L_ij S_ij dy_i . xd_j,  g_i = e^(c_i) dy_i . h C_i,  q_j = e^(c_T - c_j) xd_j . dh B_j

The usual shortcut (reverse cumulative sums of dy . y - xd . dxd) subtracts pairs that do not cross t, the large
diagonal ones first; with strong decays nothing but its rounding is left. The rectangle sums take one more matrix
product instead.

The states that enter each grid step come from the forward; those of later chunks in the step are recomputed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, NT, TN, dot
from pallas_kernels.ops.ssd.tpu import common
from pallas_kernels.ops.ssd.tpu import forward as tpu_forward
from pallas_kernels.ops.ssd.tpu.common import CHUNK, Blocks
from pallas_kernels.ops.ssd.tpu.forward import INTRA, SKIP, START, TAIL

# Rows of the reduction scratch, each [heads, CHUNK]: x . dy S L, x . dh B, dy . h C, rectangle sums of W, dy . x.
X_PAIR, X_CARRY, Y_CARRY, CROSS, Y_X = range(5)
N_SUMS = 5
HEADS_A_STAGE = 4  # heads treated stage by stage


def _row_sum(array):
    return jnp.sum(array, axis=0, keepdims=True)


def _split(array, dtype) -> list:
    """A float32 array as terms of `dtype`: itself, or its bfloat16 rounding and that of the remainder."""
    if dtype == F32:
        return [array]
    high = array.astype(dtype)
    return [high, (array - high.astype(F32)).astype(dtype)]


def _pair_products(xd32, dy):
    """xd_j . dy_i, [CHUNK, CHUNK] j by i; P = 64 fills the contraction of the matrix unit with both terms of x."""
    terms = _split(xd32, dy.dtype)
    return dot(jnp.concatenate(terms, 0), jnp.concatenate([dy] * len(terms), 0), TN)


def _sums_from(products, from_t):
    """Sum over i >= t of [j, i]: to float32 accuracy, for in the sum over j and t the signs cancel."""
    terms = _split(products, from_t.dtype)
    return functools.reduce(jnp.add, [dot(term, from_t) for term in terms])


def _heads_gradients(chunk, heads, group, arrays, refs, blocks: Blocks):
    """dx^T [P, CHUNK] of a few heads of one group, stage by stage so that they fill each other's latencies.

    Adds to dS^T of the group and fills the heads' reduction rows.
    """
    xs, dys, carried, incoming, from_t, before_t = arrays
    rows, sums, index = refs["rows"], refs["sums"], chunk * blocks.groups + group
    row = lambda k, head: rows[chunk, k, head : head + 1]
    dtype = xs[0].dtype
    pairs = [_pair_products(x.astype(F32) * row(INTRA, head), dy) for head, x, dy in zip(heads, xs, dys)]
    decays = [common.exact_weights(chunk, head, refs) for head in heads]
    weights = [refs["shared"][index] * decay for decay in decays]
    dx_pairs = [dot(dy, weight.astype(dtype), NT) for dy, weight in zip(dys, weights)]
    refs["dS"][...] += functools.reduce(jnp.add, [decay * pair for decay, pair in zip(decays, pairs)])
    crossing = [_sums_from(weight * pair, from_t) for weight, pair in zip(weights, pairs)]
    gradients = []
    for k, (head, x, dy) in enumerate(zip(heads, xs, dys)):
        own = slice(head * blocks.width, (head + 1) * blocks.width)
        local = slice(k * blocks.width, (k + 1) * blocks.width)
        x32, dy32 = x.astype(F32), dy.astype(F32)
        dx = dx_pairs[k] * row(INTRA, head) + incoming[local] * row(TAIL, head)
        sums[CROSS, head : head + 1] = _row_sum(jnp.where(before_t, crossing[k], 0.0))
        sums[X_PAIR, head : head + 1] = _row_sum(x32 * dx_pairs[k])
        sums[X_CARRY, head : head + 1] = _row_sum(x32 * incoming[local])
        sums[Y_CARRY, head : head + 1] = _row_sum(dy32 * carried[local])
        if blocks.skip == "head":
            dx = dx + dy32 * row(SKIP, head)
            sums[Y_X, head : head + 1] = _row_sum(dy32 * x32)
        elif blocks.skip == "channel":
            dx = dx + dy32 * (row(SKIP, head) * refs["D"][0, own])
            refs["dD"][0, own] += dy32 * x32 * row(SKIP, head)
        refs["overlap"][head : head + 1] = _row_sum(refs["dstate"][own] * refs["entering"][chunk, own])
        gradients.append(dx.astype(dtype))
    return gradients


def _chunk_gradients(chunk, x, refs, blocks: Blocks):
    """Gradients of one chunk into the output refs. x: [P, CHUNK] of every head."""
    tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    rows, width, dtype = refs["rows"], blocks.width, x[0].dtype
    dy = tpu_forward.transposed_heads("dy", chunk, refs, blocks)
    from_t = common.triangle(dtype, lambda i, t: i >= t)
    before_t = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0) < lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    mask = common.pair_mask(refs["documents"][0, :, tokens] if blocks.documents else None, blocks.alone)
    waiting, first = [], 0
    for group in range(blocks.groups):
        heads = range(group * blocks.group_heads, (group + 1) * blocks.group_heads)
        channels = slice(group * blocks.group_channels, (group + 1) * blocks.group_channels)
        lanes = tpu_forward.group_lanes(group, blocks)
        B, C = refs["B"][0, tokens, lanes], refs["C"][0, tokens, lanes]
        state = refs["entering"][chunk, channels].astype(dtype)
        dstate = refs["dstate"][channels].astype(dtype)
        carried, incoming = dot(state, C, NT), dot(dstate, B, NT)
        dy_start = tpu_forward.scale(dy, chunk, heads, rows, START)
        x_tail = tpu_forward.scale(x, chunk, heads, rows, TAIL)
        refs["dS"][...] = jnp.zeros_like(refs["dS"])
        for start in range(0, blocks.group_heads, HEADS_A_STAGE):
            some = heads[start : start + HEADS_A_STAGE]
            local = slice(start * width, (start + len(some)) * width)
            xs, dys = ([array[head] for head in some] for array in (x, dy))
            arrays = (xs, dys, carried[local], incoming[local], from_t, before_t)
            waiting += _heads_gradients(chunk, some, group, arrays, refs, blocks)
            if len(waiting) % tpu_forward.tile_heads(blocks) == 0:
                tpu_forward.store_heads(refs["dx"], chunk, first, waiting, blocks)
                waiting, first = [], some[-1] + 1
        dS = jnp.where(mask, refs["dS"][...], 0.0).astype(dtype)
        dB = dot(dS, C) + dot(x_tail, dstate, TN)
        dC = dot(dS, B, TN) + dot(dy_start, state, TN)
        refs["dB"][0, 0, tokens, lanes] = dB.astype(refs["dB"].dtype)
        refs["dC"][0, 0, tokens, lanes] = dC.astype(refs["dC"].dtype)
        update = dot(dy_start, C)
        for k, head in enumerate(heads):
            own = slice(head * width, (head + 1) * width)
            total = refs["totals"][chunk, head : head + 1]
            refs["dstate"][own] = refs["dstate"][own] * total + update[k * width : (k + 1) * width]
    _decay_gradients(chunk, refs, blocks)


def _decay_gradients(chunk, refs, blocks: Blocks):
    """d(dt), that of log decays or the chunk's share of dA, and of dD, from the reduction rows of all heads."""
    tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    rows, sums = refs["rows"], refs["sums"]
    entering = dot(sums[Y_CARRY] * rows[chunk, START], common.triangle(F32, lambda i, t: i >= t))
    leaving = dot(sums[X_CARRY] * rows[chunk, TAIL], common.triangle(F32, lambda j, t: j < t))
    through = jnp.sum(refs["overlap"][...] * refs["totals"][chunk], axis=1, keepdims=True)
    da = (sums[CROSS] + through) + (entering + leaving)
    ddt = sums[X_PAIR] + sums[X_CARRY] * refs["factors"][chunk]
    documents = refs["documents"][0, common.REAL : common.REAL + 1, tokens] if blocks.documents else None
    real = lambda rows: rows if documents is None else rows * documents
    if "ddecay" in refs:
        refs["ddecay"][0, 0, :, tokens] = real(da)
    else:
        ddt = ddt + refs["A"][0] * da
        refs["dA"][0, 0] += refs["dt"][0, 0, :, tokens] * da
    refs["ddt"][0, 0, :, tokens] = real(ddt)
    if blocks.skip == "head":
        refs["dD"][0, 0] += real(sums[Y_X])


def _kernel(*args, names: tuple, blocks: Blocks):
    refs = dict(zip(names, args))
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        dstate = refs["dstate"]
        dstate[...] = refs["dlast"][0] if blocks.final else jnp.zeros_like(dstate)
        for name in ("dA", "dD"):
            if name in refs:
                refs[name][...] = jnp.zeros_like(refs[name])

    if "dstates" in refs:
        refs["dstates"][0, 0] = refs["dstate"][...].astype(refs["dstates"].dtype)
    refs = common.mask_maps(refs, blocks)
    entering = refs["entering"]
    entering[0] = refs["states"][0, 0].astype(F32)
    inputs = [tpu_forward.transposed_heads("x", chunk, refs, blocks) for chunk in range(blocks.chunks)]
    for chunk, x in enumerate(inputs):
        tpu_forward.prepare_chunk(chunk, refs, blocks)
        tpu_forward.shared_products(chunk, refs, blocks)
        if chunk + 1 < blocks.chunks:
            for group, heads in tpu_forward.stages(blocks, blocks.heads):
                source, target = entering.at[chunk], entering.at[chunk + 1]
                tpu_forward.advance_state(x, chunk, group, heads, source, target, refs, blocks)
    for chunk in reversed(range(blocks.chunks)):
        _chunk_gradients(chunk, inputs[chunk], refs, blocks)

    if blocks.initial:

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            refs["dinitial"][0] = refs["dstate"][...]


def backward(inputs: dict, blocks: Blocks, *, n_groups: int, keep_states=False, interpret=False) -> dict:
    """Runs the kernel. Inputs are the forward's without initial, and dy, states and (blocks.final) dlast.

    blocks.exact must be set. Returns dx [B, T, H P]; ddt [B, blocks, heads, T]; ddecay like it, or dA [B, blocks,
    heads, CHUNK], to be summed over batch and lanes; dB, dC [B, parts, T, G N], to be summed over parts; dD like dA
    (or [B, H P, CHUNK]); dinitial [B, H P, N] by request, as are dstates, of the states that leave the grid steps.
    """
    n_batch, n_tokens, width = inputs["x"].shape
    n_blocks = width // blocks.channels
    steps = n_tokens // blocks.tokens
    n_heads = n_blocks * blocks.heads
    parts = max(1, n_heads // n_groups // blocks.heads)
    back = lambda c: steps - 1 - c
    specs = tpu_forward.input_specs(blocks, n_groups, n_heads, back)
    specs |= {"dy": specs["x"], "dlast": specs["last"]}
    like = lambda name: jax.ShapeDtypeStruct(inputs[name].shape, inputs[name].dtype)
    lanes = blocks.groups * blocks.state
    dB_spec = pl.BlockSpec((1, 1, blocks.tokens, lanes), lambda b, h, c: (b, h % parts, back(c), h // parts))
    dB_dtype = inputs["x"].dtype if parts == 1 and not blocks.wide else F32
    dB_shape = jax.ShapeDtypeStruct((n_batch, parts, n_tokens, n_groups * blocks.state), dB_dtype)
    head_spec = pl.BlockSpec((1, 1, blocks.heads, CHUNK), lambda b, h, c: (b, h, 0, 0))
    head_shape = jax.ShapeDtypeStruct((n_batch, n_blocks, blocks.heads, CHUNK), F32)
    outputs = {
        "dx": (specs["x"], like("x")),
        "ddt": (specs["dt"], like("dt")),
        **({"ddecay": (specs["dt"], like("dt"))} if "decay" in inputs else {"dA": (head_spec, head_shape)}),
        "dB": (dB_spec, dB_shape),
        "dC": (dB_spec, dB_shape),
    }
    if blocks.skip == "head":
        outputs["dD"] = (head_spec, head_shape)
    elif blocks.skip == "channel":
        channel_spec = pl.BlockSpec((1, blocks.channels, CHUNK), lambda b, h, c: (b, h, 0))
        outputs["dD"] = (channel_spec, jax.ShapeDtypeStruct((n_batch, width, CHUNK), F32))
    if keep_states:
        outputs["dstates"] = (specs["states"], like("states"))
    if blocks.initial:
        outputs["dinitial"] = (specs["last"], jax.ShapeDtypeStruct((n_batch, width, blocks.state), F32))
    scratch = tpu_forward.scratch_shapes(blocks, inputs["B"].dtype) | {
        "factors": pltpu.VMEM((blocks.chunks, blocks.heads, CHUNK), F32),
        "sums": pltpu.VMEM((N_SUMS, blocks.heads, CHUNK), F32),
        "overlap": pltpu.VMEM((blocks.heads, blocks.state), F32),
        "dS": pltpu.VMEM((CHUNK, CHUNK), F32),
        "entering": pltpu.VMEM((blocks.chunks, blocks.channels, blocks.state), F32),
        "dstate": pltpu.VMEM((blocks.channels, blocks.state), F32),
    }
    grid = (n_batch, n_blocks, steps)
    return common.call_kernel(_kernel, "ssd_backward", grid, inputs, specs, outputs, scratch, blocks, interpret)
