# SPDX-License-Identifier: Apache-2.0
"""`selective_scan` as a blocked scan with a hand-written backward pass: any backend, memory linear in T.

The row goes through in chunks of tokens, one after the other, and only the state that enters each is kept: the backward
pass computes the states within a chunk again, so that no array [B, T, D, N] exists, only [B, chunk, D, N].

A chunk is cut into blocks of Q tokens. All blocks take a step at once, so that the chunk is Q steps long and not Q
times the number of blocks: first each from an empty state, which gives what it adds; then the states that enter the
blocks follow from each other, and the steps are taken again from these. One block a chunk saves that first pass and is
the choice for a CPU, where a step is cheap to launch and the arithmetic counts.

Decays are only ever multiplied, step by step, or are exponentials of sums: nothing is divided, and a decay that
underflows is 0. Channels are the last axis and the state the one before: that is how vector units like it.

Axis letters beyond hybridlm's: K blocks of a chunk, Q position in a block, S chunks, G groups of channels, R channels
of a group. D counts channels, as the inner width does in Mamba-1.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp

from pallas_kernels import platform, segments


class _Tokens(typing.NamedTuple):
    """The arguments with a token axis; gradients come in the same form."""

    x_BTD: jax.Array
    dt_BTD: jax.Array
    B_BTGN: jax.Array
    C_BTGN: jax.Array


class _Weights(typing.NamedTuple):
    """The arguments without one; gradients come in the same form."""

    A_DN: jax.Array
    D: jax.Array | None


class _Marks(typing.NamedTuple):
    """What the segment ids say."""

    real_BT: jax.Array
    starts_BT: jax.Array  # first tokens of documents that are not the first of their row


class _Steps(typing.NamedTuple):
    """One chunk with the position in a block in front: what the loop over positions reads."""

    x_QBKGR: jax.Array
    dt_QBKGR: jax.Array
    B_QBKGN: jax.Array
    C_QBKGN: jax.Array
    starts_QBK: jax.Array


def selective_scan_xla(
    x_BTD,
    dt_BTD,
    A_DN,
    B_BTGN,
    C_BTGN,
    *,
    D=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.selective_scan`."""
    dtype = jnp.result_type(x_BTD, dt_BTD, jnp.float32)
    if initial_state is None:
        # Of x, so that it is sharded like x.
        initial_state = jnp.repeat(jnp.zeros_like(x_BTD[:, 0, :, None], dtype), A_DN.shape[1], axis=-1)
    marks = None
    if segment_ids is not None:
        document_BT = segments.document_numbers(segment_ids)
        before_BT = jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0)))
        marks = _Marks(segment_ids != 0, document_BT != before_BT)
    sizes = _sizes(chunk, x_BTD.shape[1])
    tokens = _Tokens(x_BTD, dt_BTD.astype(jnp.promote_types(dt_BTD.dtype, jnp.float32)), B_BTGN, C_BTGN)
    y_BTD, final_BDN = _selective_scan(tokens, _Weights(A_DN, D), marks, initial_state.astype(dtype), sizes)
    return (y_BTD, final_BDN) if return_final_state else y_BTD


def _sizes(chunk: int | None, n_tokens: int) -> tuple[int, int]:
    """(tokens of a chunk, blocks that it is cut into); a divisor near the root makes the fewest steps."""
    on_cpu = platform.platform() == "cpu"
    chunk = min(n_tokens, chunk or (64 if on_cpu else 256))
    if on_cpu:
        return chunk, 1
    n_blocks = 2 ** round(math.log2(chunk) / 2)
    return -(-chunk // n_blocks) * n_blocks, n_blocks


# Whole rows, in chunks.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _selective_scan(tokens: _Tokens, weights: _Weights, marks: _Marks | None, initial_BDN, sizes: tuple[int, int]):
    return _scan_forward(tokens, weights, marks, initial_BDN, sizes)[0]


def _scan_forward(tokens: _Tokens, weights: _Weights, marks: _Marks | None, initial_BDN, sizes: tuple[int, int]):
    n_tokens = tokens.x_BTD.shape[1]
    chunks = _chunks((tokens, marks), sizes[0])

    def step(state_BDN, chunk):
        y_BTD, left_BDN = _forward(*chunk, weights, state_BDN, sizes[1])
        return left_BDN, (y_BTD, state_BDN)

    final_BDN, (y_SBTD, entering_SBDN) = jax.lax.scan(step, initial_BDN, chunks)
    return (_join(y_SBTD, n_tokens), final_BDN), (tokens, weights, marks, entering_SBDN)


def _scan_backward(sizes: tuple[int, int], residuals, cotangents):
    tokens, weights, marks, entering_SBDN = residuals
    dy_BTD, dfinal_BDN = cotangents
    n_tokens = tokens.x_BTD.shape[1]
    chunks = _chunks((tokens, marks, dy_BTD), sizes[0])

    def step(carry, chunk_and_state):
        dstate_BDN, dweights = carry
        (tokens, marks, dy_BTD), state_BDN = chunk_and_state
        dtokens, added, dstate_BDN = _backward(tokens, marks, weights, state_BDN, dy_BTD, dstate_BDN, sizes[1])
        return (dstate_BDN, jax.tree.map(jnp.add, dweights, added)), dtokens

    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, entering_SBDN.dtype), weights)
    (dinitial_BDN, dweights), dtokens = jax.lax.scan(step, (dfinal_BDN, zeros), (chunks, entering_SBDN), reverse=True)
    dtokens = jax.tree.map(lambda grad, like: _join(grad, n_tokens).astype(like.dtype), dtokens, tokens)
    dweights = jax.tree.map(lambda grad, like: grad.astype(like.dtype), dweights, weights)
    return dtokens, dweights, None, dinitial_BDN


_selective_scan.defvjp(_scan_forward, _scan_backward)


def _chunks(tree, chunk: int):
    """Arrays [B, T, ...] as [S, B, chunk, ...]; behind T stand zeros, which leave the state alone."""

    def cut(array):
        n_batch, n_tokens = array.shape[:2]
        count = -(-n_tokens // chunk)
        padding = ((0, 0), (0, count * chunk - n_tokens), *((0, 0) for _ in array.shape[2:]))
        return jnp.pad(array, padding).reshape(n_batch, count, chunk, *array.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, tree)


def _join(array_SBT, n_tokens: int):
    """The inverse of `_chunks`."""
    array_BST = array_SBT.swapaxes(0, 1)
    return array_BST.reshape(array_BST.shape[0], -1, *array_BST.shape[3:])[:, :n_tokens]


# One chunk.


def _forward(tokens: _Tokens, marks: _Marks | None, weights: _Weights, state_BDN, n_blocks: int):
    """(y, leaving state)."""
    dtype = state_BDN.dtype
    steps, A_GNR = _cut(tokens, marks, weights, n_blocks, dtype)
    entering_BKGNR = _entering(steps, A_GNR, _states(state_BDN, A_GNR))

    def step(h_BKGNR, now: _Steps):
        h_BKGNR = _advance(_reset(h_BKGNR, now), now, A_GNR)
        return h_BKGNR, jnp.sum(h_BKGNR * now.C_QBKGN.astype(dtype)[..., None], axis=-2)

    left_BKGNR, y_QBKGR = jax.lax.scan(step, entering_BKGNR, steps)
    y_BTD = _uncut(y_QBKGR).reshape(tokens.x_BTD.shape)
    if weights.D is not None:
        y_BTD += weights.D.astype(dtype)[None, None] * _where_real(marks, tokens.x_BTD)
    y_BTD = _where_real(marks, y_BTD).astype(tokens.x_BTD.dtype)
    return y_BTD, _unstates(left_BKGNR[:, -1], state_BDN)


def _backward(tokens: _Tokens, marks: _Marks | None, weights: _Weights, state_BDN, dy_BTD, dleft_BDN, n_blocks: int):
    """(gradients of tokens, of weights, of the entering state)."""
    dtype = state_BDN.dtype
    steps, A_GNR = _cut(tokens, marks, weights, n_blocks, dtype)
    dy_BTD = _where_real(marks, dy_BTD)
    dy_QBKGR = _cut_tokens(dy_BTD.reshape(*dy_BTD.shape[:2], *steps.x_QBKGR.shape[-2:]), n_blocks)

    def keep(h_BKGNR, now: _Steps):
        h_BKGNR = _reset(h_BKGNR, now)
        return _advance(h_BKGNR, now, A_GNR), h_BKGNR

    entering_BKGNR = _entering(steps, A_GNR, _states(state_BDN, A_GNR))
    _, before_QBKGNR = jax.lax.scan(keep, entering_BKGNR, steps)

    def step(carry, step_inputs):
        dh_BKGNR, dA_BKGNR = carry
        now, dy_BKGR, before_BKGNR = step_inputs
        x, dt, B, C = (array.astype(dtype) for array in now[:4])
        dy = dy_BKGR.astype(dtype)
        kept_BKGNR = _decay(dt, A_GNR) * before_BKGNR
        dC_BKGN = jnp.sum((kept_BKGNR + B[..., None] * (dt * x)[..., None, :]) * dy[..., None, :], axis=-1)
        dh_BKGNR += C[..., None] * dy[..., None, :]
        dxdt_BKGR = jnp.sum(dh_BKGNR * B[..., None], axis=-2)
        dB_BKGN = jnp.sum(dh_BKGNR * (dt * x)[..., None, :], axis=-1)
        dlog_BKGNR = dh_BKGNR * kept_BKGNR
        ddt_BKGR = dxdt_BKGR * x + jnp.sum(dlog_BKGNR * A_GNR[None, None], axis=-2)
        dA_BKGNR += dlog_BKGNR * dt[..., None, :]
        dh_BKGNR = _reset(_decay(dt, A_GNR) * dh_BKGNR, now)
        return (dh_BKGNR, dA_BKGNR), (dxdt_BKGR * dt, ddt_BKGR, dB_BKGN, dC_BKGN)

    dleaving_BKGNR = _leaving(steps, A_GNR, dy_QBKGR, _states(dleft_BDN, A_GNR))
    start = (dleaving_BKGNR, jnp.zeros_like(dleaving_BKGNR))
    (dentering_BKGNR, dA_BKGNR), grads = jax.lax.scan(step, start, (steps, dy_QBKGR, before_QBKGNR), reverse=True)
    grads = (_uncut(grad).reshape(like.shape) for grad, like in zip(grads, tokens, strict=True))
    dx_BTD, ddt_BTD, dB_BTGN, dC_BTGN = (_where_real(marks, grad) for grad in grads)
    dD = None
    if weights.D is not None:
        dx_BTD += weights.D.astype(dtype)[None, None] * dy_BTD
        dD = jnp.sum(_where_real(marks, tokens.x_BTD).astype(dtype) * dy_BTD, axis=(0, 1))
    dA_DN = jnp.swapaxes(dA_BKGNR.sum(axis=(0, 1)), -1, -2).reshape(weights.A_DN.shape)
    # Cast here, so that a chunk's gradients are as small as their arrays; padding is zero in all of them.
    dtokens = _Tokens(dx_BTD.astype(tokens.x_BTD.dtype), ddt_BTD, dB_BTGN.astype(tokens.B_BTGN.dtype),
                      dC_BTGN.astype(tokens.C_BTGN.dtype))  # fmt: skip
    return dtokens, _Weights(dA_DN, dD), _unstates(dentering_BKGNR[:, 0], state_BDN)


def _cut(tokens: _Tokens, marks: _Marks | None, weights: _Weights, n_blocks: int, dtype) -> tuple[_Steps, jax.Array]:
    """The chunk's steps, padding zeroed, and A as [G, N, R]."""
    n_groups, d_state = tokens.B_BTGN.shape[2:]
    by_group = lambda array_BTD: array_BTD.reshape(*array_BTD.shape[:2], n_groups, -1)
    x, dt, B, C = (_where_real(marks, array) for array in tokens)
    starts_BT = jnp.zeros(x.shape[:2], bool) if marks is None else marks.starts_BT
    arrays = (by_group(x), by_group(dt), B, C, starts_BT)
    A_GNR = jnp.swapaxes(weights.A_DN.astype(dtype).reshape(n_groups, -1, d_state), -1, -2)
    return _Steps(*(_cut_tokens(array, n_blocks) for array in arrays)), A_GNR


def _cut_tokens(array_BT, n_blocks: int):
    """[B, T, ...] as [Q, B, K, ...]."""
    n_batch, n_tokens = array_BT.shape[:2]
    return jnp.moveaxis(array_BT.reshape(n_batch, n_blocks, n_tokens // n_blocks, *array_BT.shape[2:]), 2, 0)


def _uncut(array_QBK):
    """The inverse of `_cut_tokens`."""
    array_BKQ = jnp.moveaxis(array_QBK, 0, 2)
    return array_BKQ.reshape(array_BKQ.shape[0], -1, *array_BKQ.shape[3:])


def _where_real(marks: _Marks | None, array):
    """Zeros the padding of array [B, T, ...]."""
    if marks is None:
        return array
    return jnp.where(marks.real_BT.reshape(*marks.real_BT.shape, *(1,) * (array.ndim - 2)), array, 0)


def _states(state_BDN, A_GNR):
    """[B, D, N] as [B, G, N, R]."""
    n_groups, d_state, _ = A_GNR.shape
    return jnp.swapaxes(state_BDN.reshape(state_BDN.shape[0], n_groups, -1, d_state), -1, -2)


def _unstates(state_BGNR, like_BDN):
    """The inverse of `_states`."""
    return jnp.swapaxes(state_BGNR, -1, -2).reshape(like_BDN.shape)


# One step of all blocks.


def _decay(dt_BKGR, A_GNR):
    return jnp.exp(dt_BKGR[..., None, :] * A_GNR[None, None])


def _reset(h_BKGNR, now: _Steps):
    """Zeros states where a document starts; of their gradients the same."""
    return jnp.where(now.starts_QBK[..., None, None, None], 0, h_BKGNR)


def _advance(h_BKGNR, now: _Steps, A_GNR):
    x, dt, B = (array.astype(h_BKGNR.dtype) for array in (now.x_QBKGR, now.dt_QBKGR, now.B_QBKGN))
    return _decay(dt, A_GNR) * h_BKGNR + B[..., None] * (dt * x)[..., None, :]


# From block to block.


def _entering(steps: _Steps, A_GNR, state_BGNR):
    """The state that enters each block."""
    n_blocks = steps.x_QBKGR.shape[2]
    if n_blocks == 1:
        return state_BGNR[:, None]

    def step(h_BKGNR, now: _Steps):
        return _advance(_reset(h_BKGNR, now), now, A_GNR), None

    empty_BKGNR = jnp.repeat(jnp.zeros_like(state_BGNR)[:, None], n_blocks, axis=1)
    added_BKGNR = jax.lax.scan(step, empty_BKGNR, steps)[0]
    return _carry(added_BKGNR, _through(steps, A_GNR), state_BGNR)


def _leaving(steps: _Steps, A_GNR, dy_QBKGR, dstate_BGNR):
    """The gradient of the state that leaves each block."""
    n_blocks = steps.x_QBKGR.shape[2]
    if n_blocks == 1:
        return dstate_BGNR[:, None]
    dtype = dstate_BGNR.dtype

    def step(dh_BKGNR, now_and_dy):
        now, dy_BKGR = now_and_dy
        dh_BKGNR += now.C_QBKGN.astype(dtype)[..., None] * dy_BKGR.astype(dtype)[..., None, :]
        return _reset(_decay(now.dt_QBKGR.astype(dtype), A_GNR) * dh_BKGNR, now), None

    empty_BKGNR = jnp.repeat(jnp.zeros_like(dstate_BGNR)[:, None], n_blocks, axis=1)
    added_BKGNR = jax.lax.scan(step, empty_BKGNR, (steps, dy_QBKGR), reverse=True)[0]
    return _carry(added_BKGNR, _through(steps, A_GNR), dstate_BGNR, reverse=True)


def _through(steps: _Steps, A_GNR):
    """What is left of a state behind each block: 0 where a document starts in it."""
    total_BKGR = steps.dt_QBKGR.astype(A_GNR.dtype).sum(axis=0)
    cut_BK = steps.starts_QBK.any(axis=0)
    return jnp.where(cut_BK[..., None, None, None], 0, _decay(total_BKGR, A_GNR))


def _carry(added_BKGNR, through_BKGNR, state_BGNR, reverse: bool = False):
    """What enters each block (reverse: what comes back to it), from what the blocks before it (after it) add."""

    def step(state_BGNR, block):
        added_BGNR, through_BGNR = block
        return through_BGNR * state_BGNR + added_BGNR, state_BGNR

    blocks = (jnp.moveaxis(added_BKGNR, 1, 0), jnp.moveaxis(through_BKGNR, 1, 0))
    return jnp.moveaxis(jax.lax.scan(step, state_BGNR, blocks, reverse=reverse)[1], 0, 1)
