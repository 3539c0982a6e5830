# SPDX-License-Identifier: Apache-2.0
"""Backward TPU kernel of the Mamba-2 scan: one pass over the grid steps in reverse, the state's gradient carried in VMEM.

With L the pair weights, S = C B^T, xd = dt x, h the state that enters a chunk, dh the gradient of the one that leaves it
and c the inclusive sums of log decays (per head; T the chunk's last token):

    dxd_j = sum_i L_ij S_ij dy_i + e^(c_T - c_j) dh B_j          dx = dt dxd + D dy
    dS_ij = sum over heads L_ij dy_i . xd_j                       dC += dS B, dB += dS^T C
    dC_i += e^(c_i) h^T dy_i,  dB_j += e^(c_T - c_j) dh^T xd_j    dh <- e^(c_T) dh + sum_i e^(c_i) dy_i C_i^T
    d(dt)_j = x_j . dxd_j + A da_j,  dA = sum_t dt_t da_t

and da_t, the gradient of the log decay of token t, as the sum of everything that crosses t, and of nothing else:

    da_t = sum_{j < t <= i} W_ij + sum_{i >= t} g_i + sum_{j < t} q_j + e^(c_T) <dh, h>
    W_ij = L_ij S_ij dy_i . xd_j,  g_i = e^(c_i) dy_i . h C_i,  q_j = e^(c_T - c_j) xd_j . dh B_j

The usual shortcut (reverse cumulative sums of dy . y - xd . dxd) subtracts pairs that do not cross t, the large diagonal
ones first; with strong decays nothing but its rounding is left. The rectangle sums take one more matrix product instead.

The states that enter each grid step come from the forward; those of later chunks in the step are recomputed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd import tpu_common as common
from pallas_kernels.ssd import tpu_forward
from pallas_kernels.ssd.tpu_common import CHUNK, F32, NT, TN, Blocks, dot
from pallas_kernels.ssd.tpu_forward import INTRA, SKIP, START, TAIL, head_slice

# Rows of the reduction scratch, each [heads, CHUNK]: x . dy S L, x . dh B, dy . h C, rectangle sums of W, dy . x.
X_PAIR, X_CARRY, Y_CARRY, CROSS, Y_X = range(5)
N_SUMS = 5


def _scaled(array, chunk, heads, rows, row, blocks: Blocks):
    """[len(heads) P, CHUNK]: the heads' channels times their row of the scratch, in the array's dtype."""
    parts = [head_slice(array, chunk, head, blocks).astype(F32) * rows[chunk, row, head : head + 1] for head in heads]
    return jnp.concatenate(parts, 0).astype(array.dtype)


def _row_sum(array):
    return jnp.sum(array, axis=0, keepdims=True)


def _head_gradients(chunk, head, group, own, arrays, refs, blocks: Blocks):
    """dx^T of one head [P, CHUNK]; adds to dS^T of its group and fills the head's reduction rows."""
    x, dy, carried, incoming, from_t, before_t = arrays
    rows, sums, index = refs["rows"], refs["sums"], chunk * blocks.groups + group
    row = lambda k: rows[chunk, k, head : head + 1]
    dtype = x.dtype
    x32, dy32 = x.astype(F32), dy.astype(F32)
    weights = common.expand_weights(refs["weights"], (chunk, head), refs["shared"].at[index], blocks)
    pairs = dot((x32 * row(INTRA)).astype(dtype), dy, TN)
    refs["dS"][...] += common.expand_weights(refs["weights"], (chunk, head), pairs, blocks)
    crossing = dot((weights * pairs).astype(dtype), from_t)
    dx_pairs = dot(dy, weights.astype(dtype), NT)
    dx = dx_pairs * row(INTRA) + incoming * row(TAIL)
    sums[CROSS, head : head + 1] = _row_sum(jnp.where(before_t, crossing, 0.0))
    sums[X_PAIR, head : head + 1] = _row_sum(x32 * dx_pairs)
    sums[X_CARRY, head : head + 1] = _row_sum(x32 * incoming)
    sums[Y_CARRY, head : head + 1] = _row_sum(dy32 * carried)
    if blocks.skip == "head":
        dx = dx + dy32 * row(SKIP)
        sums[Y_X, head : head + 1] = _row_sum(dy32 * x32)
    elif blocks.skip == "channel":
        dx = dx + dy32 * (row(SKIP) * refs["D"][0, own])
        refs["dD"][0, own] += dy32 * x32 * row(SKIP)
    refs["overlap"][head : head + 1] = _row_sum(refs["dstate"][own] * refs["entering"][chunk, own])
    return dx.astype(dtype)


def _chunk_gradients(chunk, xT, dyT, refs, blocks: Blocks):
    """Gradients of one chunk into the output refs; returns dx^T per head."""
    tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    rows, dtype = refs["rows"], xT.dtype
    from_t = common.triangle(dtype, lambda i, t: i >= t)
    before_t = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0) < lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    mask = common.pair_mask(refs["documents"][0, :, tokens] if blocks.documents else None)
    gradients = []
    for group in range(blocks.groups):
        heads = range(group * blocks.group_heads, (group + 1) * blocks.group_heads)
        channels = slice(group * blocks.group_channels, (group + 1) * blocks.group_channels)
        lanes = slice(group * blocks.state, (group + 1) * blocks.state)
        B, C = refs["B"][0, tokens, lanes], refs["C"][0, tokens, lanes]
        state = refs["entering"][chunk, channels].astype(dtype)
        dstate = refs["dstate"][channels].astype(dtype)
        carried, incoming = dot(state, C, NT), dot(dstate, B, NT)
        dy_start = _scaled(dyT, chunk, heads, rows, START, blocks)
        x_tail = _scaled(xT, chunk, heads, rows, TAIL, blocks)
        refs["dS"][...] = jnp.zeros_like(refs["dS"])
        for k, head in enumerate(heads):
            own = slice(head * blocks.width, (head + 1) * blocks.width)
            local = slice(k * blocks.width, (k + 1) * blocks.width)
            x, dy = head_slice(xT, chunk, head, blocks), head_slice(dyT, chunk, head, blocks)
            arrays = (x, dy, carried[local], incoming[local], from_t, before_t)
            gradients.append(_head_gradients(chunk, head, group, own, arrays, refs, blocks))
        dS = jnp.where(mask, refs["dS"][...], 0.0).astype(dtype)
        dB = dot(dS, C) + dot(x_tail, dstate, TN)
        dC = dot(dS, B, TN) + dot(dy_start, state, TN)
        refs["dB"][0, 0, tokens, lanes] = dB.astype(refs["dB"].dtype)
        refs["dC"][0, 0, tokens, lanes] = dC.astype(refs["dC"].dtype)
        update = dot(dy_start, C)
        for k, head in enumerate(heads):
            own = slice(head * blocks.width, (head + 1) * blocks.width)
            total = refs["totals"][chunk, head : head + 1]
            refs["dstate"][own] = refs["dstate"][own] * total + update[k * blocks.width : (k + 1) * blocks.width]
    _decay_gradients(chunk, refs, blocks)
    return gradients


def _decay_gradients(chunk, refs, blocks: Blocks):
    """d(dt), and the chunk's share of dA and dD, from the reduction rows of all heads."""
    tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    rows, sums = refs["rows"], refs["sums"]
    dt, A = refs["dt"][0, 0, :, tokens], refs["A"][0]
    crossing = sums[CROSS]
    if not blocks.exact:
        crossing = jnp.where(dt * A >= common.PAIR_FLOOR, crossing, 0.0)
    entering = dot(sums[Y_CARRY] * rows[chunk, START], common.triangle(F32, lambda i, t: i >= t))
    leaving = dot(sums[X_CARRY] * rows[chunk, TAIL], common.triangle(F32, lambda j, t: j < t))
    through = jnp.sum(refs["overlap"][...] * refs["totals"][chunk], axis=1, keepdims=True)
    da = (crossing + through) + (entering + leaving)
    ddt = sums[X_PAIR] * refs["factors"][chunk, 0] + sums[X_CARRY] * refs["factors"][chunk, 1] + A * da
    if blocks.documents:
        ddt = ddt * refs["documents"][0, common.REAL : common.REAL + 1, tokens]
    refs["ddt"][0, 0, :, tokens] = ddt
    refs["dA"][0, 0] += dt * da
    if blocks.skip == "head":
        real = refs["documents"][0, common.REAL : common.REAL + 1, tokens] if blocks.documents else 1.0
        refs["dD"][0, 0] += sums[Y_X] * real


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

    xT, dyT = refs["x"][0].T, refs["dy"][0].T
    entering = refs["entering"]
    entering[0] = refs["states"][0, 0].astype(F32)
    for chunk in range(blocks.chunks):
        tpu_forward.prepare_chunk(chunk, refs, blocks)
        tpu_forward.shared_products(chunk, refs, blocks)
        if chunk + 1 < blocks.chunks:
            update = jnp.concatenate(tpu_forward.state_updates(chunk, xT, refs, blocks), 0)
            for head in range(blocks.heads):
                own = slice(head * blocks.width, (head + 1) * blocks.width)
                entering[chunk + 1, own] = entering[chunk, own] * refs["totals"][chunk, head : head + 1] + update[own]
    gradients = [_chunk_gradients(chunk, xT, dyT, refs, blocks) for chunk in reversed(range(blocks.chunks))][::-1]
    by_head = [jnp.concatenate([chunk[head] for chunk in gradients], 1) for head in range(blocks.heads)]
    refs["dx"][0] = jnp.concatenate(by_head, 0).T

    if blocks.initial:

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            refs["dinitial"][0] = refs["dstate"][...]


def backward(inputs: dict, blocks: Blocks, *, n_groups: int, interpret=False) -> dict:
    """Runs the kernel. Inputs are the forward's without initial, and dy, states and (blocks.final) dlast.

    Returns dx [B, T, H P]; ddt [B, blocks, heads, T]; dA [B, blocks, heads, CHUNK], to be summed over batch and lanes; dB,
    dC [B, parts, T, G N], to be summed over parts; dD like dA (or [B, H P, CHUNK]); dinitial [B, H P, N] by request.
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
    dB_dtype = inputs["x"].dtype if parts == 1 else F32
    dB_shape = jax.ShapeDtypeStruct((n_batch, parts, n_tokens, n_groups * blocks.state), dB_dtype)
    head_spec = pl.BlockSpec((1, 1, blocks.heads, CHUNK), lambda b, h, c: (b, h, 0, 0))
    head_shape = jax.ShapeDtypeStruct((n_batch, n_blocks, blocks.heads, CHUNK), F32)
    outputs = {
        "dx": (specs["x"], like("x")),
        "ddt": (specs["dt"], like("dt")),
        "dA": (head_spec, head_shape),
        "dB": (dB_spec, dB_shape),
        "dC": (dB_spec, dB_shape),
    }
    if blocks.skip == "head":
        outputs["dD"] = (head_spec, head_shape)
    elif blocks.skip == "channel":
        channel_spec = pl.BlockSpec((1, blocks.channels, CHUNK), lambda b, h, c: (b, h, 0))
        outputs["dD"] = (channel_spec, jax.ShapeDtypeStruct((n_batch, width, CHUNK), F32))
    if blocks.initial:
        outputs["dinitial"] = (specs["last"], jax.ShapeDtypeStruct((n_batch, width, blocks.state), F32))
    scratch = tpu_forward.scratch_shapes(blocks) | {
        "factors": pltpu.VMEM((blocks.chunks, 2, blocks.heads, CHUNK), F32),
        "sums": pltpu.VMEM((N_SUMS, blocks.heads, CHUNK), F32),
        "overlap": pltpu.VMEM((blocks.heads, blocks.state), F32),
        "dS": pltpu.VMEM((CHUNK, CHUNK), F32),
        "entering": pltpu.VMEM((blocks.chunks, blocks.channels, blocks.state), F32),
        "dstate": pltpu.VMEM((blocks.channels, blocks.state), F32),
    }
    results = pl.pallas_call(
        functools.partial(_kernel, names=(*inputs, *outputs, *scratch), blocks=blocks),
        grid=(n_batch, n_blocks, steps),
        in_specs=[specs[name] for name in inputs],
        out_specs=[spec for spec, _ in outputs.values()],
        out_shape=[shape for _, shape in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=64 * 2**20
        ),
        interpret=interpret,
        name="ssd_backward",
    )(*inputs.values())
    return dict(zip(outputs, results))
