# SPDX-License-Identifier: Apache-2.0
"""`ssd` in chunked einsums with a hand-written backward pass: any backend, memory linear in T.

Within a chunk of Q tokens the outputs are one masked [Q, Q] product, between chunks a [P, N] state is carried (Dao
and Gu 2024, section 6). Nothing of size [Q, Q] is kept for the backward pass, which recomputes it. Long sequences go
through in slabs of `_SLAB` tokens, so that the [Q, Q] arrays in flight do not grow with T.

Decays are exp(difference of cumulative sums) and never quotients. A chunk's sum may reach -1e4 while single steps are
as small as -1e-6, where a plain float32 cumulative sum would lose the small steps: see `_cumulative_sums`. The
gradient of the decays is summed without cancellation for the same reason: see `_straddling_sums`.

Axis letters beyond hybridlm's: C chunks, Q (einsum q, s) position in a chunk, R heads of a group.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import platform, segments

_HIGHEST = jax.lax.Precision.HIGHEST
_SLAB = 8192  # tokens a slab
_FORGOTTEN = 128.0  # exp(-128) is 0 in float32
_BLOCK = 16  # chunks longer than this are multiples of it


class _Tokens(typing.NamedTuple):
    """The arguments with a token axis; gradients come in the same form."""

    x_BTHP: jax.Array
    dt_BTH: jax.Array
    B_BTGN: jax.Array
    C_BTGN: jax.Array
    decay_BTH: jax.Array | None  # in place of dt A


class _Weights(typing.NamedTuple):
    """The arguments without one; gradients come in the same form."""

    A_H: jax.Array | None
    D: jax.Array | None


class _Marks(typing.NamedTuple):
    """What the segment ids say."""

    real_BT: jax.Array
    document_BT: jax.Array
    entering_BT: jax.Array  # document of the token before, 0 before the first


def ssd_xla(
    x_BTHP,
    dt_BTH,
    A_H,
    B_BTGN,
    C_BTGN,
    *,
    D=None,
    decay=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
    states=None,
):
    """See `pallas_kernels.ssd`; the states of chunks are always recomputed."""
    del states
    n_tokens, d_head, d_state = x_BTHP.shape[1], x_BTHP.shape[3], B_BTGN.shape[3]
    dtype = _accumulation_dtype(x_BTHP, dt_BTH)
    if initial_state is None:
        # Of x, so that it is sharded like x.
        initial_state = jnp.repeat(jnp.zeros_like(x_BTHP[:, 0, :, :, None], dtype), d_state, axis=-1)
    marks = None
    if segment_ids is not None:
        document_BT = segments.document_numbers(segment_ids)
        marks = _Marks(segment_ids != 0, document_BT, jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0))))
    tokens = _Tokens(x_BTHP, dt_BTH, B_BTGN, C_BTGN, decay)
    chunks = _chunk_sizes(chunk, n_tokens, d_head, d_state, x_BTHP.dtype)
    y_BTHP, final_state_BHPN = _ssd(tokens, _Weights(A_H, D), marks, initial_state.astype(dtype), chunks)
    return (y_BTHP, final_state_BHPN) if return_final_state else y_BTHP


def _accumulation_dtype(x, dt):
    return jnp.result_type(x, dt, jnp.float32)


def _chunk_sizes(chunk: int | None, n_tokens: int, d_head: int, d_state: int, dtype) -> tuple[int, int]:
    """(without gradients, with them): on GPUs, in 16 bits, the forward alone is faster in longer chunks, both passes
    are not."""
    size = _chunk_size(chunk, n_tokens, d_head, d_state)
    if chunk is not None or platform.platform() != "gpu" or jnp.finfo(dtype).bits > 16:
        return size, size
    return _chunk_size(min(2 * size, 256), n_tokens, d_head, d_state), size


def _chunk_size(chunk: int | None, n_tokens: int, d_head: int, d_state: int) -> int:
    """The [Q, Q] products cost Q a token, the states P N / Q: the default balances them, on a CPU by arithmetic and
    elsewhere by memory traffic, of which a state causes three times as much as a weight."""
    if chunk is None:
        balance = math.sqrt((1 if platform.platform() == "cpu" else 3) * d_head * d_state)
        chunk = min(256, max(32, 2 ** round(math.log2(balance))))
    chunk = min(chunk, n_tokens)
    return chunk if chunk <= _BLOCK else -(-chunk // _BLOCK) * _BLOCK


# Whole rows, in slabs.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ssd(tokens: _Tokens, weights: _Weights, marks: _Marks | None, initial_BHPN, chunks: tuple[int, int]):
    return _rows(tokens, weights, marks, initial_BHPN, chunks[0])[0]


def _ssd_forward(tokens: _Tokens, weights: _Weights, marks: _Marks | None, initial_BHPN, chunks: tuple[int, int]):
    return _rows(tokens, weights, marks, initial_BHPN, chunks[1])


def _rows(tokens: _Tokens, weights: _Weights, marks: _Marks | None, initial_BHPN, chunk: int):
    """(outputs, residuals) of whole rows."""
    n_tokens = tokens.x_BTHP.shape[1]
    count, width = _slabs(n_tokens, chunk)
    padded, padded_marks = _pad(tokens, marks, count * width)

    def step(state_BHPN, index):
        slab, slab_marks = _slab((padded, padded_marks), index, width)
        y_BTHP, left_BHPN = _forward(slab, weights, slab_marks, state_BHPN, chunk)
        return left_BHPN, (y_BTHP, state_BHPN)

    final_BHPN, (y_BTHP, entering_SBHPN) = _scan(step, initial_BHPN, jnp.arange(count))
    y_BTHP = _join(y_BTHP)[:, :n_tokens]
    return (y_BTHP, final_BHPN), (tokens, weights, marks, checkpoint_name(entering_SBHPN, "ssd_states"))


def _ssd_backward(chunks: tuple[int, int], residuals, cotangents):
    chunk = chunks[1]
    tokens, weights, marks, entering_SBHPN = residuals
    dy_BTHP, dfinal_BHPN = cotangents
    n_tokens = tokens.x_BTHP.shape[1]
    count, width = _slabs(n_tokens, chunk)
    padded, padded_marks = _pad(tokens, marks, count * width)
    dy_BTHP = _pad_tokens(dy_BTHP, count * width)

    def step(dstate_BHPN, index_and_state):
        index, state_BHPN = index_and_state
        slab, slab_marks, slab_dy_BTHP = _slab((padded, padded_marks, dy_BTHP), index, width)
        dtokens, dweights, dstate_BHPN = _backward(
            slab, weights, slab_marks, state_BHPN, slab_dy_BTHP, dstate_BHPN, chunk
        )
        return dstate_BHPN, (dtokens, dweights)

    steps = (jnp.arange(count), entering_SBHPN)
    dinitial_BHPN, (dtokens, dweights) = _scan(step, dfinal_BHPN, steps, reverse=True)
    dtokens = jax.tree.map(lambda grad, like: _join(grad)[:, :n_tokens].astype(like.dtype), dtokens, tokens)
    dweights = jax.tree.map(lambda grad, like: grad.sum(axis=0).astype(like.dtype), dweights, weights)
    return dtokens, dweights, None, dinitial_BHPN


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _slabs(n_tokens: int, chunk: int) -> tuple[int, int]:
    """(number of slabs, tokens of each)."""
    count = -(-n_tokens // max(_SLAB, chunk))
    return count, -(-n_tokens // (count * chunk)) * chunk


def _scan(step, carry, steps, reverse: bool = False):
    """lax.scan, without a loop where there is one step."""
    if len(steps if isinstance(steps, jax.Array) else steps[0]) > 1:
        return jax.lax.scan(step, carry, steps, reverse=reverse)
    carry, result = step(carry, jax.tree.map(lambda array: array[0], steps))
    return carry, jax.tree.map(lambda array: array[None], result)


def _pad_tokens(array, n_tokens: int, mode: str = "constant"):
    missing = n_tokens - array.shape[1]
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2), mode=mode) if missing else array


def _pad(tokens: _Tokens, marks: _Marks | None, n_tokens: int):
    """To n_tokens. x and dt are zero there, so that the state passes through unchanged."""
    tokens = jax.tree.map(lambda array: _pad_tokens(array, n_tokens), tokens)
    if marks is None or n_tokens == marks.document_BT.shape[1]:
        return tokens, marks
    entering_BT = jnp.concatenate([marks.entering_BT, marks.document_BT[:, -1:]], axis=1)
    return tokens, _Marks(
        _pad_tokens(marks.real_BT, n_tokens),
        _pad_tokens(marks.document_BT, n_tokens, "edge"),
        _pad_tokens(entering_BT, n_tokens, "edge"),
    )


def _slab(arrays, index, width: int):
    """The slab of that index of arrays [B, T, ...]."""

    def cut(array):
        return array if array.shape[1] == width else jax.lax.dynamic_slice_in_dim(array, index * width, width, axis=1)

    return jax.tree.map(cut, arrays)


def _join(array_SBT):
    array_BST = jnp.moveaxis(array_SBT, 0, 1)
    return array_BST.reshape(array_BST.shape[0], -1, *array_BST.shape[3:])


# One slab, in chunks.


class _Chunks(typing.NamedTuple):
    """A slab cut into chunks. Inputs in the matmul dtype, decays in the accumulation dtype.

    What heads have of their own stands with the tokens of a chunk last, as its products take it and as they leave it:
    with the heads behind the tokens each of them is a product of transposed copies.
    """

    x_BCGRPQ: jax.Array
    dt_BCGRQ: jax.Array
    B_BCGQN: jax.Array
    C_BCGQN: jax.Array
    xdt_BCGRPQ: jax.Array  # dt * x
    within_BCGRQQ: jax.Array  # decay from the column's token to the row's, 0 above the diagonal and across documents
    head_BCGRQ: jax.Array  # decay from the state that enters the chunk
    tail_BCGRQ: jax.Array  # decay to the state that leaves it
    through_BCGR: jax.Array  # decay from the entering to the leaving state
    scores_BCGQQ: jax.Array  # C B^T


def _cut(tokens: _Tokens, weights: _Weights, marks: _Marks | None, chunk: int) -> _Chunks:
    n_batch, n_tokens, n_heads, _ = tokens.x_BTHP.shape
    n_groups, n_chunks = tokens.B_BTGN.shape[2], n_tokens // chunk
    dtype = _accumulation_dtype(tokens.x_BTHP, tokens.dt_BTH)
    product_dtype = jnp.result_type(tokens.x_BTHP, tokens.B_BTGN, tokens.C_BTGN)

    def split(array, dtype, *axes):
        array = _where_real(marks, array).astype(dtype)
        return array.reshape(n_batch, n_chunks, chunk, n_groups, *axes, *array.shape[3:])

    x_BCGRPQ = jnp.moveaxis(split(tokens.x_BTHP, tokens.x_BTHP.dtype, n_heads // n_groups), 2, -1)
    dt_BCGRQ = jnp.moveaxis(split(tokens.dt_BTH, dtype, n_heads // n_groups), 2, -1)
    B_BCGQN = jnp.moveaxis(split(tokens.B_BTGN, product_dtype), 2, 3)
    C_BCGQN = jnp.moveaxis(split(tokens.C_BTGN, product_dtype), 2, 3)
    if weights.A_H is not None:
        steps_BCGRQ = dt_BCGRQ * weights.A_H.astype(dtype).reshape(1, 1, n_groups, -1, 1)
    else:
        steps_BCGRQ = jnp.moveaxis(split(tokens.decay_BTH, dtype, n_heads // n_groups), 2, -1)

    sums = _cumulative_sums(steps_BCGRQ)
    within = functools.reduce(jnp.add, (s[..., :, None] - s[..., None, :] for s in sums))
    head = functools.reduce(jnp.add, sums)
    tail = functools.reduce(jnp.add, (s[..., -1:] - s for s in sums))
    through = head[..., -1]
    visible = jnp.tril(jnp.ones((chunk, chunk), bool))
    if marks is not None:
        document_BCQ = marks.document_BT.reshape(n_batch, n_chunks, 1, 1, chunk)
        enters_BC = marks.entering_BT.reshape(n_batch, n_chunks, 1, 1, chunk)[..., :1]
        visible = jnp.expand_dims(visible, range(4)) & (document_BCQ[..., :, None] == document_BCQ[..., None, :])
        head = jnp.where(document_BCQ == enters_BC, head, -jnp.inf)
        tail = jnp.where(document_BCQ == document_BCQ[..., -1:], tail, -jnp.inf)
        through = jnp.where((document_BCQ[..., -1:] == enters_BC)[..., 0], through, -jnp.inf)
    return _Chunks(
        x_BCGRPQ,
        dt_BCGRQ,
        B_BCGQN,
        C_BCGQN,
        (x_BCGRPQ * dt_BCGRQ[..., None, :]).astype(product_dtype),
        jnp.exp(jnp.where(visible, within, -jnp.inf)),
        jnp.exp(head),
        jnp.exp(tail),
        jnp.exp(through),
        _einsum("bcgqn,bcgsn->bcgqs", C_BCGQN, B_BCGQN, dtype),
    )


def _rows_of(array_BCGRPQ, shape):
    """As [B, T, H, P], or without P, of that shape."""
    return jnp.moveaxis(array_BCGRPQ, -1, 2).reshape(shape)


def _where_real(marks: _Marks | None, array):
    """Zeros the padding of array [B, T, ...]."""
    if marks is None:
        return array
    return jnp.where(marks.real_BT.reshape(*marks.real_BT.shape, *(1,) * (array.ndim - 2)), array, 0)


def _einsum(equation: str, left, right, dtype):
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def _prefix_sums(array, *, reverse: bool = False, inclusive: bool = True):
    """Sums over the last axis up to (reverse: from) each place, as a product with a triangle of ones: faster than a
    scan."""
    size = array.shape[-1]
    triangle = jnp.triu(jnp.ones((size, size), array.dtype), 0 if inclusive else 1)
    return jnp.tensordot(array, triangle.T if reverse else triangle, axes=1, precision=_HIGHEST)


def _cumulative_sums(steps_BCGRQ):
    """Inclusive sums over Q of steps <= 0: a tuple of terms [B, C, G, R, Q], to be subtracted one by one.

    In float32 each step is split into a multiple of a power of two, coarse enough for all sums to be exact, and a small
    rest, so that a difference of two sums is as exact as the steps between them, whatever came before.
    """
    if steps_BCGRQ.dtype == jnp.float64:
        return (_prefix_sums(steps_BCGRQ),)
    grain = _FORGOTTEN * 2.0 ** math.ceil(math.log2(steps_BCGRQ.shape[-1])) / 2.0**24
    steps_BCGRQ = jnp.maximum(steps_BCGRQ, -_FORGOTTEN)
    coarse_BCGRQ = jnp.round(steps_BCGRQ / grain) * grain
    return _prefix_sums(coarse_BCGRQ), _prefix_sums(steps_BCGRQ - coarse_BCGRQ)


def _carry(states_BCGRPN, through_BCGR, start_BGRPN, reverse: bool = False):
    """States that enter each chunk, and the one after the last: s <- through * s + state, chunk by chunk.

    Chunks are read and written where they are: a scan over them has its axis first, and copies all states there and
    back. What leaves a chunk is written over what is added in it, from which it is made. What enters one is what left
    the one before; over what is added it could not be written without a copy of all states for each chunk.
    """
    n_chunks = states_BCGRPN.shape[1]

    def step(index, carry):
        state_BGRPN, states_BCGRPN = carry
        chunk = n_chunks - 1 - index if reverse else index
        added_BGRPN, through_BGR = (
            jax.lax.dynamic_index_in_dim(array, chunk, axis=1, keepdims=False)
            for array in (states_BCGRPN, through_BCGR)
        )
        left_BGRPN = through_BGR[..., None, None] * state_BGRPN + added_BGRPN
        states_BCGRPN = jax.lax.dynamic_update_index_in_dim(states_BCGRPN, left_BGRPN, chunk, axis=1)
        return left_BGRPN, states_BCGRPN

    last_BGRPN, left_BCGRPN = jax.lax.fori_loop(0, n_chunks, step, (start_BGRPN, states_BCGRPN))
    first_BCGRPN = start_BGRPN[:, None]
    parts = (left_BCGRPN[:, 1:], first_BCGRPN) if reverse else (first_BCGRPN, left_BCGRPN[:, :-1])
    return jnp.concatenate(parts, axis=1), last_BGRPN


def _grouped(state_BHPN, like: _Chunks):
    n_groups, n_shared = like.dt_BCGRQ.shape[2:4]
    return state_BHPN.reshape(state_BHPN.shape[0], n_groups, n_shared, *state_BHPN.shape[2:])


def _forward(tokens: _Tokens, weights: _Weights, marks: _Marks | None, state_BHPN, chunk: int):
    """(y, leaving state) of one slab."""
    dtype = state_BHPN.dtype
    c = _cut(tokens, weights, marks, chunk)
    product_dtype = c.xdt_BCGRPQ.dtype
    states_BCGRPN = _einsum("bcgrpq,bcgqn->bcgrpn", _scale(c.xdt_BCGRPQ, c.tail_BCGRQ), c.B_BCGQN, dtype)
    entering_BCGRPN, left_BGRPN = _carry(states_BCGRPN, c.through_BCGR, _grouped(state_BHPN, c))
    weights_BCGRQQ = (c.scores_BCGQQ[:, :, :, None] * c.within_BCGRQQ).astype(product_dtype)
    y_BCGRPQ = _einsum("bcgrps,bcgrqs->bcgrpq", c.xdt_BCGRPQ, weights_BCGRQQ, dtype)
    across_BCGRPQ = _einsum("bcgrpn,bcgqn->bcgrpq", entering_BCGRPN.astype(product_dtype), c.C_BCGQN, dtype)
    y_BCGRPQ += across_BCGRPQ * c.head_BCGRQ[..., None, :]
    if weights.D is not None:
        y_BCGRPQ += c.x_BCGRPQ * _skip(weights.D, c)
    y_BTHP = _where_real(marks, _rows_of(y_BCGRPQ.astype(tokens.x_BTHP.dtype), tokens.x_BTHP.shape))
    return y_BTHP, left_BGRPN.reshape(state_BHPN.shape)


def _scale(array_BCGRPQ, factor_BCGRQ):
    """Per-token factor in the accumulation dtype, result in the array's."""
    return (array_BCGRPQ * factor_BCGRQ[..., None, :]).astype(array_BCGRPQ.dtype)


def _skip(D, like: _Chunks):
    n_groups, n_shared = like.dt_BCGRQ.shape[2:4]
    return D.astype(like.dt_BCGRQ.dtype).reshape(1, 1, n_groups, n_shared, -1, 1)


def _backward(tokens: _Tokens, weights: _Weights, marks: _Marks | None, state_BHPN, dy_BTHP, dleft_BHPN, chunk: int):
    """(gradients of tokens, of weights, of the entering state) for one slab."""
    dtype = state_BHPN.dtype
    c = _cut(tokens, weights, marks, chunk)
    product_dtype = c.xdt_BCGRPQ.dtype
    n_batch, n_chunks, n_groups, n_shared, d_head, _ = c.x_BCGRPQ.shape
    dy_BCQGRP = _where_real(marks, dy_BTHP).reshape(n_batch, n_chunks, chunk, n_groups, n_shared, d_head)
    dy_BCGRPQ = jnp.moveaxis(dy_BCQGRP.astype(product_dtype), 2, -1)
    tailed_BCGRPQ = _scale(c.xdt_BCGRPQ, c.tail_BCGRQ)
    headed_BCGRPQ = _scale(dy_BCGRPQ, c.head_BCGRQ)

    # States again, and their gradients from the last chunk to the first.
    states_BCGRPN = _einsum("bcgrpq,bcgqn->bcgrpn", tailed_BCGRPQ, c.B_BCGQN, dtype)
    entering_BCGRPN, _ = _carry(states_BCGRPN, c.through_BCGR, _grouped(state_BHPN, c))
    dstates_BCGRPN = _einsum("bcgrpq,bcgqn->bcgrpn", headed_BCGRPQ, c.C_BCGQN, dtype)
    dleaving_BCGRPN, dstate_BGRPN = _carry(dstates_BCGRPN, c.through_BCGR, _grouped(dleft_BHPN, c), reverse=True)
    dthrough_BCGR = c.through_BCGR * jnp.sum(entering_BCGRPN * dleaving_BCGRPN, axis=(-2, -1))
    entering_BCGRPN = entering_BCGRPN.astype(product_dtype)
    dleaving_BCGRPN = dleaving_BCGRPN.astype(product_dtype)

    # Within chunks.
    dweights_BCGRQQ = _einsum("bcgrpq,bcgrps->bcgrqs", dy_BCGRPQ, c.xdt_BCGRPQ, product_dtype) * c.within_BCGRQQ
    dscores_BCGQQ = dweights_BCGRQQ.sum(axis=3).astype(product_dtype)
    dsteps_BCGRQ = _straddling_sums(dweights_BCGRQQ * c.scores_BCGQQ[:, :, :, None], product_dtype, dtype)
    weights_BCGRQQ = (c.scores_BCGQQ[:, :, :, None] * c.within_BCGRQQ).astype(product_dtype)
    dxdt_BCGRPQ = _einsum("bcgrpq,bcgrqs->bcgrps", dy_BCGRPQ, weights_BCGRQQ, dtype)

    # Through the states.
    dxdt_left_BCGRPQ = _einsum("bcgrpn,bcgqn->bcgrpq", dleaving_BCGRPN, c.B_BCGQN, dtype) * c.tail_BCGRQ[..., None, :]
    across_BCGRPQ = _einsum("bcgrpn,bcgqn->bcgrpq", entering_BCGRPN, c.C_BCGQN, dtype) * c.head_BCGRQ[..., None, :]
    dtail_BCGRQ = jnp.sum(c.xdt_BCGRPQ * dxdt_left_BCGRPQ, axis=-2)
    dhead_BCGRQ = jnp.sum(dy_BCGRPQ * across_BCGRPQ, axis=-2)
    dsteps_BCGRQ += _prefix_sums(dhead_BCGRQ, reverse=True)
    dsteps_BCGRQ += _prefix_sums(dtail_BCGRQ, inclusive=False) + dthrough_BCGR[..., None]
    dxdt_BCGRPQ += dxdt_left_BCGRPQ

    dB_BCGQN = _einsum("bcgqs,bcgqn->bcgsn", dscores_BCGQQ, c.C_BCGQN, dtype)
    dB_BCGQN += _over_heads(tailed_BCGRPQ, dleaving_BCGRPN, dtype)
    dC_BCGQN = _einsum("bcgqs,bcgsn->bcgqn", dscores_BCGQQ, c.B_BCGQN, dtype)
    dC_BCGQN += _over_heads(headed_BCGRPQ, entering_BCGRPN, dtype)

    dx_BCGRPQ = dxdt_BCGRPQ * c.dt_BCGRQ[..., None, :]
    dD = None
    if weights.D is not None:
        dx_BCGRPQ += _skip(weights.D, c) * dy_BCGRPQ
        dD = jnp.sum(c.x_BCGRPQ.astype(dtype) * dy_BCGRPQ, axis=(0, 1, -1))
        dD = (dD if weights.D.ndim == 2 else dD.sum(-1)).reshape(weights.D.shape)
    ddt_BCGRQ = jnp.sum(dxdt_BCGRPQ * c.x_BCGRPQ, axis=-2)
    dA = ddecay = None
    if weights.A_H is not None:
        ddt_BCGRQ += dsteps_BCGRQ * weights.A_H.astype(dtype).reshape(1, 1, n_groups, n_shared, 1)
        # Chunk by chunk and then their sums: terms far above what they add up to take their rounding along.
        dA_BCGR = jax.lax.optimization_barrier(jnp.sum(dsteps_BCGRQ * c.dt_BCGRQ, axis=-1))
        dA = jnp.sum(dA_BCGR, axis=(0, 1)).reshape(-1)
    elif tokens.decay_BTH is not None:
        ddecay = _where_real(marks, _rows_of(dsteps_BCGRQ, tokens.decay_BTH.shape))
    dtokens = _Tokens(
        _rows_of(dx_BCGRPQ.astype(tokens.x_BTHP.dtype), tokens.x_BTHP.shape),
        _where_real(marks, _rows_of(ddt_BCGRQ, tokens.dt_BTH.shape)),
        jnp.moveaxis(dB_BCGQN, 2, 3).reshape(tokens.B_BTGN.shape),
        jnp.moveaxis(dC_BCGQN, 2, 3).reshape(tokens.C_BTGN.shape),
        ddecay,
    )
    return dtokens, _Weights(dA, dD), dstate_BGRPN.reshape(state_BHPN.shape)


def _over_heads(left_BCGRPQ, right_BCGRPN, dtype):
    """The sum over R and P of their products as [B, C, G, Q, N]: over one axis, as XLA copies operands of two."""
    left, right = (array.reshape(*array.shape[:3], -1, array.shape[-1]) for array in (left_BCGRPQ, right_BCGRPN))
    return _einsum("bcgkq,bcgkn->bcgqn", left, right, dtype)


def _straddling_sums(products_BCGRQQ, product_dtype, dtype):
    """For each token t of a chunk the sum of products[i, j] over j < t <= i, as [B, C, G, R, Q].

    It is the gradient of step t, which lies between j and i. Summed as written and not as a difference of row and
    column sums: behind a step that forgets everything the true sum is 0, and rounding left there would swamp the
    gradients of A. Products in bfloat16 are summed by one product with ones, which passes over them once where blocks
    take several passes; elsewhere, and on CPUs, blocks of `_BLOCK` tokens keep it cheap.
    """
    chunk = products_BCGRQQ.shape[-1]
    if jnp.finfo(product_dtype).bits < 32 and platform.platform() != "cpu":
        i_QQQ, j_QQQ, t_QQQ = jnp.meshgrid(*[jnp.arange(chunk)] * 3, indexing="ij")
        between_QQQ = (j_QQQ < t_QQQ) & (t_QQQ <= i_QQQ)
        flat = products_BCGRQQ.astype(product_dtype).reshape(*products_BCGRQQ.shape[:-2], chunk**2)
        return _einsum("bcgrs,sq->bcgrq", flat, between_QQQ.reshape(-1, chunk).astype(product_dtype), dtype)
    width = min(chunk, _BLOCK)
    starts = range(0, chunk, width)
    own = jnp.stack([products_BCGRQQ[..., k : k + width, k : k + width] for k in starts], axis=-3)
    total = _straddle(own)  # block, token
    if len(starts) > 1:
        block = jnp.arange(chunk) // width
        other = jnp.where(block[:, None] > block[None], products_BCGRQQ, 0)
        rows = other.reshape(*other.shape[:-1], len(starts), width).sum(axis=-1)  # token i, block j
        to_after = other.sum(axis=-2).reshape(total.shape)
        total += _prefix_sums(rows.sum(axis=-1).reshape(total.shape), reverse=True)
        total += _prefix_sums(to_after, inclusive=False)
        between = jnp.stack([rows[..., k : k + width, :].sum(axis=-2) for k in starts], axis=-2)
        total += _straddle(between, inclusive=False)[..., None]
    return total.reshape(*products_BCGRQQ.shape[:-1])


def _straddle(products, inclusive: bool = True):
    """Sums of products[..., i, j] over j < t <= i; over j < t < i unless inclusive."""
    size = products.shape[-1]
    below = jnp.tril(jnp.ones((size, size), products.dtype), 0 if inclusive else -1)  # [i, t]
    left = jnp.triu(jnp.ones((size, size), products.dtype), 1)  # [j, t]
    below = jnp.expand_dims(below, range(products.ndim - 2))
    return jnp.sum(jnp.einsum("...ij,jt->...it", products, left, precision=_HIGHEST) * below, axis=-2)
