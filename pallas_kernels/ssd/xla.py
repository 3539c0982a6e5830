# SPDX-License-Identifier: Apache-2.0
"""`ssd` in chunked einsums with a hand-written backward pass: any backend, memory linear in T.

Within a chunk of Q tokens the outputs are one masked [Q, Q] product, between chunks a [P, N] state is carried (Dao and Gu
2024, section 6). Nothing of size [Q, Q] is kept for the backward pass, which recomputes it. Long sequences go through in
slabs of `_SLAB` tokens, so that the [Q, Q] arrays in flight do not grow with T.

Decays are exp(difference of cumulative sums) and never quotients. A chunk's sum may reach -1e4 while single steps are as
small as -1e-6, where a plain float32 cumulative sum would lose the small steps: see `_cumulative_sums`. The gradient of the
decays is summed without cancellation for the same reason: see `_straddling_sums`.

Axis letters beyond hybridlm's: C chunks, Q (einsum q, s) position in a chunk, R heads of a group.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp

from pallas_kernels import segments

_HIGHEST = jax.lax.Precision.HIGHEST
_SLAB = 8192  # tokens a slab
_FORGOTTEN = 128.0  # exp(-128) is 0 in float32
_BLOCK = 16  # chunks longer than this are multiples of it


class _Operands(typing.NamedTuple):
    """What the two passes read, for a slab or for the whole row; gradients of the first six come in the same form."""

    x_BTHP: jax.Array
    dt_BTH: jax.Array
    A_H: jax.Array
    B_BTGN: jax.Array
    C_BTGN: jax.Array
    D: jax.Array | None
    real_BT: jax.Array | None
    document_BT: jax.Array | None
    entering_BT: jax.Array | None  # document of the token before; 0 before the first


def ssd_xla(
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, *, D=None, segment_ids=None, initial_state=None, return_final_state=False, chunk=None
):
    """See `pallas_kernels.ssd`."""
    n_batch, n_tokens, n_heads, d_head = x_BTHP.shape
    d_state = B_BTGN.shape[3]
    dtype = _accumulation_dtype(x_BTHP, dt_BTH)
    if initial_state is None:
        initial_state = jnp.zeros((n_batch, n_heads, d_head, d_state), dtype)
    real_BT = document_BT = entering_BT = None
    if segment_ids is not None:
        real_BT = segment_ids != 0
        document_BT = segments.document_numbers(segment_ids)
        entering_BT = jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0)))
    operands = _Operands(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D, real_BT, document_BT, entering_BT)
    chunk = _chunk_size(chunk, n_tokens, d_head, d_state)
    y_BTHP, final_state_BHPN = _ssd(operands, initial_state.astype(dtype), chunk)
    return (y_BTHP, final_state_BHPN) if return_final_state else y_BTHP


def _accumulation_dtype(x, dt):
    return jnp.result_type(x, dt, jnp.float32)


def _chunk_size(chunk: int | None, n_tokens: int, d_head: int, d_state: int) -> int:
    """The [Q, Q] products cost Q a token, the states P N / Q: the default balances them."""
    if chunk is None:
        balance = math.sqrt(3 * d_head * d_state)
        chunk = min(256, max(32, 2 ** round(math.log2(balance))))
    chunk = min(chunk, n_tokens)
    return chunk if chunk <= _BLOCK else -(-chunk // _BLOCK) * _BLOCK


# --- whole rows: slabs ------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ssd(operands: _Operands, initial_BHPN, chunk: int):
    return _ssd_forward(operands, initial_BHPN, chunk)[0]


def _ssd_forward(operands: _Operands, initial_BHPN, chunk: int):
    slabs = _slabs(operands, chunk)
    if slabs is None:
        y_BTHP, final_BHPN = _forward(_pad(operands, chunk), initial_BHPN, chunk)
        entering_SBHPN = None
    else:
        count, width, padded = slabs

        def step(state_BHPN, index):
            y_BTHP, left_BHPN = _forward(_slab(padded, index, width), state_BHPN, chunk)
            return left_BHPN, (y_BTHP, state_BHPN)

        final_BHPN, (y_SBTHP, entering_SBHPN) = jax.lax.scan(step, initial_BHPN, jnp.arange(count))
        y_BTHP = _join(y_SBTHP)
    return (y_BTHP[:, : operands.x_BTHP.shape[1]], final_BHPN), (operands, initial_BHPN, entering_SBHPN)


def _ssd_backward(chunk: int, residuals, cotangents):
    operands, initial_BHPN, entering_SBHPN = residuals
    dy_BTHP, dfinal_BHPN = cotangents
    n_tokens = operands.x_BTHP.shape[1]
    slabs = _slabs(operands, chunk)
    if slabs is None:
        padded = _pad(operands, chunk)
        dy_BTHP = _pad_tokens(dy_BTHP, padded.x_BTHP.shape[1])
        grads, dinitial_BHPN = _backward(padded, initial_BHPN, dy_BTHP, dfinal_BHPN, chunk)
    else:
        count, width, padded = slabs
        dy_BTHP = _pad_tokens(dy_BTHP, count * width)

        def step(dstate_BHPN, index_and_state):
            index, state_BHPN = index_and_state
            slab_dy = jax.lax.dynamic_slice_in_dim(dy_BTHP, index * width, width, axis=1)
            grads, dstate_BHPN = _backward(_slab(padded, index, width), state_BHPN, slab_dy, dstate_BHPN, chunk)
            return dstate_BHPN, grads

        dinitial_BHPN, grads = jax.lax.scan(step, dfinal_BHPN, (jnp.arange(count), entering_SBHPN), reverse=True)
        grads = _Operands(
            *(_join(getattr(grads, name)) if name.find("_BT") > 0 else jax.tree.map(lambda g: g.sum(0), getattr(grads, name))
              for name in _Operands._fields[:6]), None, None, None)
    cut = [None if g is None else (g[:, :n_tokens] if name.find("_BT") > 0 else g) for name, g in zip(_Operands._fields, grads)]
    typed = [None if g is None else g.astype(like.dtype) for g, like in zip(cut, operands)]
    return _Operands(*typed), dinitial_BHPN.astype(initial_BHPN.dtype)


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _slabs(operands: _Operands, chunk: int):
    """None where the row is one slab; else (count, tokens a slab, padded operands)."""
    n_tokens = operands.x_BTHP.shape[1]
    count = -(-n_tokens // max(_SLAB, chunk))
    if count == 1:
        return None
    width = -(-n_tokens // (count * chunk)) * chunk
    return count, width, _pad(operands, count * width)


def _per_token(function, operands: _Operands) -> _Operands:
    """Applies function to the operands that have a token axis."""
    return _Operands(
        *(function(a) if a is not None and name.find("_BT") > 0 else a for name, a in zip(_Operands._fields, operands))
    )


def _pad_tokens(array, n_tokens: int, mode: str = "constant"):
    missing = n_tokens - array.shape[1]
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2), mode=mode) if missing else array


def _pad(operands: _Operands, multiple: int) -> _Operands:
    """Pads the token axis: x and dt are zero there, so the state passes through unchanged."""
    n_tokens = -(-operands.x_BTHP.shape[1] // multiple) * multiple
    padded = _per_token(lambda array: _pad_tokens(array, n_tokens), operands)
    if operands.document_BT is None:
        return padded
    return padded._replace(
        document_BT=_pad_tokens(operands.document_BT, n_tokens, "edge"),
        entering_BT=_pad_tokens(jnp.concatenate([operands.entering_BT, operands.document_BT[:, -1:]], axis=1), n_tokens, "edge")
        if n_tokens > operands.x_BTHP.shape[1]
        else operands.entering_BT,
    )


def _slab(operands: _Operands, index, width: int) -> _Operands:
    return _per_token(lambda array: jax.lax.dynamic_slice_in_dim(array, index * width, width, axis=1), operands)


def _join(array_SBT):
    array_BST = jnp.moveaxis(array_SBT, 0, 1)
    return array_BST.reshape(array_BST.shape[0], -1, *array_BST.shape[3:])


# --- one slab: chunks -------------------------------------------------------------------------------------------------


class _Chunks(typing.NamedTuple):
    """A slab cut into chunks. Inputs in the matmul dtype, decays in the accumulation dtype."""

    x_BCQGRP: jax.Array
    dt_BCQGR: jax.Array
    B_BCQGN: jax.Array
    C_BCQGN: jax.Array
    xdt_BCQGRP: jax.Array  # dt * x
    within_BCGRQQ: jax.Array  # decay from the column's token to the row's, 0 above the diagonal and across documents
    head_BCQGR: jax.Array  # decay from the state that enters the chunk
    tail_BCQGR: jax.Array  # decay to the state that leaves it
    through_BCGR: jax.Array  # decay from the entering to the leaving state
    scores_BCGQQ: jax.Array  # C B^T


def _cut(operands: _Operands, chunk: int) -> _Chunks:
    n_batch, n_tokens, n_heads, _ = operands.x_BTHP.shape
    n_groups = operands.B_BTGN.shape[2]
    n_chunks = n_tokens // chunk
    dtype = _accumulation_dtype(operands.x_BTHP, operands.dt_BTH)
    product_dtype = jnp.result_type(operands.x_BTHP, operands.B_BTGN, operands.C_BTGN)

    def split(array, dtype, heads=False):
        if operands.real_BT is not None:
            array = jnp.where(operands.real_BT.reshape(n_batch, n_tokens, *(1,) * (array.ndim - 2)), array, 0)
        axes = (n_groups, n_heads // n_groups) if heads else (n_groups,)
        return array.astype(dtype).reshape(n_batch, n_chunks, chunk, *axes, *array.shape[3:])

    x_BCQGRP = split(operands.x_BTHP, operands.x_BTHP.dtype, heads=True)
    dt_BCQGR = split(operands.dt_BTH, dtype, heads=True)
    B_BCQGN = split(operands.B_BTGN, product_dtype)
    C_BCQGN = split(operands.C_BTGN, product_dtype)
    A_GR = operands.A_H.astype(dtype).reshape(n_groups, -1)

    sums = _cumulative_sums(dt_BCQGR * A_GR)  # two of [B, C, G, R, Q]
    within = functools.reduce(jnp.add, (s[..., :, None] - s[..., None, :] for s in sums))
    head = functools.reduce(jnp.add, sums)
    tail = functools.reduce(jnp.add, (s[..., -1:] - s for s in sums))
    through = head[..., -1]
    visible = jnp.tril(jnp.ones((chunk, chunk), bool))
    if operands.document_BT is not None:
        document_BCQ = operands.document_BT.reshape(n_batch, n_chunks, 1, 1, chunk)
        enters_BC = operands.entering_BT.reshape(n_batch, n_chunks, 1, 1, chunk)[..., :1]
        visible = visible & (document_BCQ[..., :, None] == document_BCQ[..., None, :])
        head = jnp.where(document_BCQ == enters_BC, head, -jnp.inf)
        tail = jnp.where(document_BCQ == document_BCQ[..., -1:], tail, -jnp.inf)
        through = jnp.where((document_BCQ[..., -1:] == enters_BC)[..., 0], through, -jnp.inf)
    return _Chunks(
        x_BCQGRP,
        dt_BCQGR,
        B_BCQGN,
        C_BCQGN,
        (x_BCQGRP * dt_BCQGR[..., None]).astype(product_dtype),
        jnp.exp(jnp.where(visible, within, -jnp.inf)),
        jnp.exp(jnp.moveaxis(head, -1, 2)),
        jnp.exp(jnp.moveaxis(tail, -1, 2)),
        jnp.exp(through),
        _einsum("bcqgn,bcsgn->bcgqs", C_BCQGN, B_BCQGN, dtype),
    )


def _einsum(equation: str, left, right, dtype):
    return jnp.einsum(equation, left, right, preferred_element_type=dtype)


def _cumulative_sums(steps_BCQGR):
    """Inclusive sums over Q of steps <= 0, as a tuple of terms [B, C, G, R, Q] whose differences are to be taken one by one.

    In float32 each step is split into a multiple of a power of two, coarse enough for all sums to be exact, and a small
    rest, so that a difference of two sums is as exact as the steps between them, whatever came before.
    """
    chunk = steps_BCQGR.shape[2]
    before = jnp.triu(jnp.ones((chunk, chunk), steps_BCQGR.dtype))
    add_up = functools.partial(jnp.einsum, "bcqgr,qs->bcgrs", precision=_HIGHEST)
    if steps_BCQGR.dtype == jnp.float64:
        return (add_up(steps_BCQGR, before),)
    grain = _FORGOTTEN * 2.0 ** math.ceil(math.log2(chunk)) / 2.0**24
    steps_BCQGR = jnp.maximum(steps_BCQGR, -_FORGOTTEN)
    coarse_BCQGR = jnp.round(steps_BCQGR / grain) * grain
    return add_up(coarse_BCQGR, before), add_up(steps_BCQGR - coarse_BCQGR, before)


def _carry(states_BCGRPN, through_BCGR, start_BGRPN, reverse: bool = False):
    """States that enter each chunk, and the one after the last: s <- through * s + state, chunk by chunk."""

    def step(state, chunk):
        added, through = chunk
        return through[..., None, None] * state + added, state

    chunks = (jnp.moveaxis(states_BCGRPN, 1, 0), jnp.moveaxis(through_BCGR, 1, 0))
    last, entering = jax.lax.scan(step, start_BGRPN, chunks, reverse=reverse)
    return jnp.moveaxis(entering, 0, 1), last


def _grouped(state_BHPN, like: _Chunks):
    n_groups, n_shared = like.dt_BCQGR.shape[3:]
    return state_BHPN.reshape(state_BHPN.shape[0], n_groups, n_shared, *state_BHPN.shape[2:])


def _forward(operands: _Operands, state_BHPN, chunk: int):
    """(y, leaving state) of one slab."""
    dtype = state_BHPN.dtype
    c = _cut(operands, chunk)
    product_dtype = c.xdt_BCQGRP.dtype
    states_BCGRPN = _einsum("bcqgrp,bcqgn->bcgrpn", _scale(c.xdt_BCQGRP, c.tail_BCQGR), c.B_BCQGN, dtype)
    entering_BCGRPN, left_BGRPN = _carry(states_BCGRPN, c.through_BCGR, _grouped(state_BHPN, c))
    weights_BCGRQQ = (c.scores_BCGQQ[:, :, :, None] * c.within_BCGRQQ).astype(product_dtype)
    y_BCQGRP = _einsum("bcgrqs,bcsgrp->bcqgrp", weights_BCGRQQ, c.xdt_BCQGRP, dtype)
    across_BCQGRP = _einsum("bcqgn,bcgrpn->bcqgrp", c.C_BCQGN, entering_BCGRPN.astype(product_dtype), dtype)
    y_BCQGRP += across_BCQGRP * c.head_BCQGR[..., None]
    if operands.D is not None:
        y_BCQGRP += c.x_BCQGRP * _skip(operands.D, c)
    y_BTHP = y_BCQGRP.reshape(operands.x_BTHP.shape)
    if operands.real_BT is not None:
        y_BTHP = jnp.where(operands.real_BT[:, :, None, None], y_BTHP, 0)
    return y_BTHP.astype(operands.x_BTHP.dtype), left_BGRPN.reshape(state_BHPN.shape)


def _scale(array_BCQGRP, factor_BCQGR):
    """Per-token factor in the accumulation dtype, result in the array's."""
    return (array_BCQGRP * factor_BCQGR[..., None]).astype(array_BCQGRP.dtype)


def _skip(D, like: _Chunks):
    return D.astype(like.dt_BCQGR.dtype).reshape(*like.dt_BCQGR.shape[3:], -1)


def _backward(operands: _Operands, state_BHPN, dy_BTHP, dleft_BHPN, chunk: int):
    """(gradients of the slab's operands, gradient of the entering state)."""
    dtype = state_BHPN.dtype
    c = _cut(operands, chunk)
    product_dtype = c.xdt_BCQGRP.dtype
    if operands.real_BT is not None:
        dy_BTHP = jnp.where(operands.real_BT[:, :, None, None], dy_BTHP, 0)
    dy_BCQGRP = dy_BTHP.reshape(c.x_BCQGRP.shape).astype(product_dtype)
    tailed_BCQGRP = _scale(c.xdt_BCQGRP, c.tail_BCQGR)
    headed_BCQGRP = _scale(dy_BCQGRP, c.head_BCQGR)

    # States again, and their gradients from the last chunk to the first.
    states_BCGRPN = _einsum("bcqgrp,bcqgn->bcgrpn", tailed_BCQGRP, c.B_BCQGN, dtype)
    entering_BCGRPN, _ = _carry(states_BCGRPN, c.through_BCGR, _grouped(state_BHPN, c))
    dstates_BCGRPN = _einsum("bcqgrp,bcqgn->bcgrpn", headed_BCQGRP, c.C_BCQGN, dtype)
    dleaving_BCGRPN, dstate_BGRPN = _carry(dstates_BCGRPN, c.through_BCGR, _grouped(dleft_BHPN, c), reverse=True)
    dthrough_BCGR = c.through_BCGR * jnp.sum(entering_BCGRPN * dleaving_BCGRPN, axis=(-2, -1))
    entering_BCGRPN = entering_BCGRPN.astype(product_dtype)
    dleaving_BCGRPN = dleaving_BCGRPN.astype(product_dtype)

    # Within chunks.
    dweights_BCGRQQ = _einsum("bcqgrp,bcsgrp->bcgrqs", dy_BCQGRP, c.xdt_BCQGRP, dtype) * c.within_BCGRQQ
    dscores_BCGQQ = dweights_BCGRQQ.sum(axis=3).astype(product_dtype)
    dsteps_BCQGR = _straddling_sums(dweights_BCGRQQ * c.scores_BCGQQ[:, :, :, None])
    weights_BCGRQQ = (c.scores_BCGQQ[:, :, :, None] * c.within_BCGRQQ).astype(product_dtype)
    dxdt_BCQGRP = _einsum("bcgrqs,bcqgrp->bcsgrp", weights_BCGRQQ, dy_BCQGRP, dtype)

    # Through the states.
    dxdt_left_BCQGRP = _einsum("bcqgn,bcgrpn->bcqgrp", c.B_BCQGN, dleaving_BCGRPN, dtype) * c.tail_BCQGR[..., None]
    across_BCQGRP = _einsum("bcqgn,bcgrpn->bcqgrp", c.C_BCQGN, entering_BCGRPN, dtype) * c.head_BCQGR[..., None]
    dtail_BCQGR = jnp.sum(c.xdt_BCQGRP * dxdt_left_BCQGRP, axis=-1)
    dhead_BCQGR = jnp.sum(dy_BCQGRP * across_BCQGRP, axis=-1)
    dsteps_BCQGR += jax.lax.cumsum(dhead_BCQGR, axis=2, reverse=True)
    dsteps_BCQGR += jax.lax.cumsum(dtail_BCQGR, axis=2) - dtail_BCQGR + dthrough_BCGR[:, :, None]
    dxdt_BCQGRP += dxdt_left_BCQGRP

    dB_BCQGN = _einsum("bcgqs,bcqgn->bcsgn", dscores_BCGQQ, c.C_BCQGN, dtype)
    dB_BCQGN += _einsum("bcqgrp,bcgrpn->bcqgn", tailed_BCQGRP, dleaving_BCGRPN, dtype)
    dC_BCQGN = _einsum("bcgqs,bcsgn->bcqgn", dscores_BCGQQ, c.B_BCQGN, dtype)
    dC_BCQGN += _einsum("bcqgrp,bcgrpn->bcqgn", headed_BCQGRP, entering_BCGRPN, dtype)

    dx_BCQGRP = dxdt_BCQGRP * c.dt_BCQGR[..., None]
    dD = None
    if operands.D is not None:
        dx_BCQGRP += _skip(operands.D, c) * dy_BCQGRP
        dD = jnp.sum(c.x_BCQGRP.astype(dtype) * dy_BCQGRP, axis=(0, 1, 2))
        dD = (dD if operands.D.ndim == 2 else dD.sum(-1)).reshape(operands.D.shape)
    A_GR = operands.A_H.astype(dtype).reshape(c.dt_BCQGR.shape[3:])
    ddt_BCQGR = jnp.sum(dxdt_BCQGRP * c.x_BCQGRP, axis=-1) + dsteps_BCQGR * A_GR
    dA_GR = jnp.sum(dsteps_BCQGR * c.dt_BCQGR, axis=(0, 1, 2))
    if operands.real_BT is not None:
        ddt_BCQGR = jnp.where(operands.real_BT.reshape(*ddt_BCQGR.shape[:3], 1, 1), ddt_BCQGR, 0)
    grads = _Operands(
        dx_BCQGRP.reshape(operands.x_BTHP.shape).astype(operands.x_BTHP.dtype),
        ddt_BCQGR.reshape(operands.dt_BTH.shape),
        dA_GR.reshape(-1),
        dB_BCQGN.reshape(operands.B_BTGN.shape),
        dC_BCQGN.reshape(operands.C_BTGN.shape),
        dD,
        None,
        None,
        None,
    )
    return grads, dstate_BGRPN.reshape(state_BHPN.shape)


def _straddling_sums(products_BCGRQQ):
    """For each token t of a chunk the sum of products[i, j] over j < t <= i, as [B, C, Q, G, R].

    It is the gradient of step t, which lies between j and i. Summed as written and not as a difference of row and column
    sums: behind a step that forgets everything the true sum is 0, and rounding left there would swamp the gradients of A.
    Blocks of `_BLOCK` tokens keep that cheap.
    """
    chunk = products_BCGRQQ.shape[-1]
    width = min(chunk, _BLOCK)
    n_blocks = chunk // width
    blocks = products_BCGRQQ.reshape(*products_BCGRQQ.shape[:-2], n_blocks, width, n_blocks, width)
    own = jnp.stack([blocks[..., k, :, k, :] for k in range(n_blocks)], axis=-3)
    total = _straddle(own)
    if n_blocks > 1:
        later = jnp.tril(jnp.ones((n_blocks, n_blocks), products_BCGRQQ.dtype), -1)
        rows = jnp.sum(blocks, axis=-1)  # block i, token, block j
        from_before = jnp.sum(rows * later[:, None, :], axis=-1)
        to_after = jnp.sum(blocks.sum(axis=-3) * later[:, :, None], axis=-3)  # block j, token
        total += jax.lax.cumsum(from_before, axis=from_before.ndim - 1, reverse=True)
        total += jax.lax.cumsum(to_after, axis=to_after.ndim - 1) - to_after
        total += _straddle(rows.sum(axis=-2), inclusive=False)[..., None]
    return jnp.moveaxis(total.reshape(*products_BCGRQQ.shape[:-1]), -1, 2)


def _straddle(products, inclusive: bool = True):
    """Sums of products[..., i, j] over j < t <= i; over j < t < i unless inclusive."""
    size = products.shape[-1]
    below = jnp.tril(jnp.ones((size, size), products.dtype), 0 if inclusive else -1)  # [i, t]
    left = jnp.triu(jnp.ones((size, size), products.dtype), 1)  # [j, t]
    return jnp.sum(jnp.einsum("...ij,jt->...it", products, left, precision=_HIGHEST) * below, axis=-2)
