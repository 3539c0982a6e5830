# SPDX-License-Identifier: Apache-2.0
"""Recurrences with a matrix as state, chunk by chunk in matrix products: what their `xla` implementations share.

A row goes through in slabs of tokens, whose intermediate values the backward pass computes again; a slab is cut into
chunks of Q tokens, all computed at once but for the state, which goes from chunk to chunk.

**Decays.** Log decays are added up and never subtracted, so no small step is lost behind a large one and no gradient is
a difference of sums that cancel. Between the tokens of a chunk that works by halves: a block of 2 w tokens is two of w,
and from token j in the left one to token i in the right one the sum is that from j to the end of the left block plus
that from the start of the right one to i. Both come from the two blocks' own sums, and both exponentials are at most 1.
A log decay of -inf forgets everything and is served.

Axis letters beyond hybridlm's: C chunks, Q (also i, j) position in a chunk, Z channels of a decay, N or 1.
"""

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import tokens_where
from pallas_kernels.segments import document_numbers
from pallas_kernels.varying import vary_alike

SLAB = 2048  # tokens a slab
CHUNK = 64  # tokens a chunk, unless asked for others
LONGEST = 256
_HIGHEST = jax.lax.Precision.HIGHEST


def chunk_size(chunk: int | None, n_tokens: int) -> int:
    """A power of two: as asked for, but no longer than the row."""
    wanted = min(chunk or CHUNK, n_tokens, LONGEST)
    return 1 << (wanted - 1).bit_length()


class Marks(typing.NamedTuple):
    """What the segment ids of a slab say."""

    real_BT: jax.Array
    document_BT: jax.Array  # its number in the row
    entering_BT: jax.Array  # that of the token before, 0 before the first


def scan_slabs(slab: Callable, tokens, segment_ids, state, chunk: int, longest: int = SLAB):
    """(outputs [B, T, ...], last state) of `slab(tokens, marks, state) -> (outputs, state)`.

    tokens: pytree of [B, T, ...]; state: of [B, ...]. A slab sees a multiple of `chunk` tokens, zeros behind the last
    and in padding, and marks where there are segment ids; it has `longest` tokens at most.
    """
    n_tokens = jax.tree.leaves(tokens)[0].shape[1]
    count = -(-n_tokens // max(longest, chunk))
    width = -(-n_tokens // (count * chunk)) * chunk
    marks = None
    if segment_ids is not None:
        tokens = jax.tree.map(lambda array: tokens_where(segment_ids != 0, array), tokens)
        ids_BT = jnp.pad(segment_ids, ((0, 0), (0, count * width - n_tokens)))
        document_BT = document_numbers(ids_BT)
        marks = Marks(ids_BT != 0, document_BT, jnp.pad(document_BT[:, :-1], ((0, 0), (1, 0))))

    def stack(array):
        missing = count * width - array.shape[1]
        array = jnp.pad(array, ((0, 0), (0, missing), *((0, 0) for _ in array.shape[2:])))
        return jnp.moveaxis(array.reshape(array.shape[0], count, width, *array.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, now):
        outputs, state = slab(*now, state)
        return state, outputs

    state, outputs = jax.lax.scan(step, *vary_alike((state, jax.tree.map(stack, (tokens, marks)))))
    if segment_ids is None:
        return jax.tree.map(lambda array: _join(array, n_tokens), outputs), state
    return jax.tree.map(lambda array: tokens_where(segment_ids != 0, _join(array, n_tokens)), outputs), state


def _join(array_SBT, n_tokens: int):
    array_BST = jnp.moveaxis(array_SBT, 0, 1)
    return array_BST.reshape(array_BST.shape[0], -1, *array_BST.shape[3:])[:, :n_tokens]


def cut(array_BTH, chunk: int):
    """[B, T, H, ...] as [B, C, H, Q, ...]."""
    array_BCQH = array_BTH.reshape(array_BTH.shape[0], -1, chunk, *array_BTH.shape[2:])
    return jnp.swapaxes(array_BCQH, 2, 3)


def uncut(array_BCHQ):
    """The inverse of `cut`."""
    array_BCQH = jnp.swapaxes(array_BCHQ, 2, 3)
    return array_BCQH.reshape(array_BCQH.shape[0], -1, *array_BCQH.shape[3:])


class Seen(typing.NamedTuple):
    """Which of a chunk's decays lead through one document; None: all."""

    within_BC1QQ: jax.Array  # both tokens are of one
    entering_BC1Q1: jax.Array  # the token is of that of the state that enters the chunk
    leaving_BC1Q1: jax.Array  # of that of the state that leaves it
    through_BC11: jax.Array  # both states are of one


def seen_of(marks: Marks | None, chunk: int) -> Seen | None:
    """Of a slab's marks."""
    if marks is None:
        return None
    document_BCQ = marks.document_BT.reshape(marks.document_BT.shape[0], -1, chunk)
    enters_BC1 = marks.entering_BT.reshape(document_BCQ.shape)[..., :1]
    leaves_BC1 = document_BCQ[..., -1:]
    return Seen(
        (document_BCQ[..., :, None] == document_BCQ[..., None, :])[:, :, None],
        (document_BCQ == enters_BC1)[:, :, None, :, None],
        (document_BCQ == leaves_BC1)[:, :, None, :, None],
        (leaves_BC1 == enters_BC1)[..., None],
    )


class Sums(typing.NamedTuple):
    """Log decays added up within blocks of w tokens: [..., n, w, Z] of n blocks."""

    upto: jax.Array  # from the block's start, the token's own included
    before: jax.Array  # the same without the token's own
    after: jax.Array  # from behind the token to the block's end


def sums_by_halves(steps) -> list[Sums]:
    """Of log decays [..., Q, Z], for blocks of 1, 2, 4, ... Q tokens."""
    upto = steps[..., :, None, :]
    levels = [Sums(upto, jnp.zeros_like(upto), jnp.zeros_like(upto))]
    while levels[-1].upto.shape[-3] > 1:
        left, right = (Sums(*(array[..., half::2, :, :] for array in levels[-1])) for half in (0, 1))
        first, second = left.upto[..., -1:, :], right.upto[..., -1:, :]
        join = lambda *halves: jnp.concatenate(halves, axis=-2)
        levels.append(
            Sums(
                join(left.upto, first + right.upto),
                join(left.before, first + right.before),
                join(left.after + second, right.after),
            )
        )
    return levels


class Decays(typing.NamedTuple):
    """Of a chunk, each at most 1, documents kept apart."""

    levels: list[Sums]
    seen: Seen | None
    upto_BCHQZ: jax.Array  # from the entering state to the token, its own included
    before_BCHQZ: jax.Array  # the same without its own
    after_BCHQZ: jax.Array  # from the token to the leaving state
    through_BCHZ: jax.Array  # from state to state


def log_decays_of(steps_BCHQZ, seen: Seen | None) -> Decays:
    """Logarithms of the decays, -inf where documents keep them apart."""
    levels = sums_by_halves(steps_BCHQZ)
    upto, before, after = (array[..., 0, :, :] for array in levels[-1])
    through = upto[..., -1, :]
    if seen is not None:
        upto, before = (jnp.where(seen.entering_BC1Q1, array, -jnp.inf) for array in (upto, before))
        after = jnp.where(seen.leaving_BC1Q1, after, -jnp.inf)
        through = jnp.where(seen.through_BC11, through, -jnp.inf)
    return Decays(levels, seen, upto, before, after, through)


def decays_of(steps_BCHQZ, seen: Seen | None) -> Decays:
    """Of log decays."""
    logs = log_decays_of(steps_BCHQZ, seen)
    return Decays(logs.levels, seen, *(jnp.exp(array) for array in logs[2:]))


def products(rows, cols, decays: Decays, *, exclusive: bool = False):
    """[..., Q, Q]: rows[i] . (decay o cols[j]) where j < i and, unless exclusive, j = i; else 0.

    The decay is that of the tokens behind j up to i; exclusive: up to the one before i.
    """
    if decays.levels[0].upto.shape[-1] == 1:
        return dot(rows, jnp.swapaxes(cols, -1, -2)) * weights(decays, exclusive=exclusive)
    return _keep_seen(_products_by_channel(rows, cols, decays.levels, exclusive), decays)


def weights(decays: Decays, *, exclusive: bool = False):
    """[..., Q, Q]: the decays of `products` themselves, where they are one number a token."""
    levels = decays.levels
    ones = jnp.ones_like(levels[0].upto[..., 0, 0])
    blocks = []
    for level in levels[:-1]:
        to, since = level.before if exclusive else level.upto, level.after
        blocks.append(jnp.exp(to[..., 1::2, :, :] + jnp.swapaxes(since[..., 0::2, :, :], -1, -2)))
    return _keep_seen(_assemble(jnp.zeros_like(ones) if exclusive else ones, blocks), decays)


def log_weights(decays: Decays):
    """[..., Q, Q]: the sums of log decays whose exponentials are `weights`, -inf where those are 0."""
    levels = decays.levels
    blocks = [level.upto[..., 1::2, :, :] + jnp.swapaxes(level.after[..., 0::2, :, :], -1, -2) for level in levels[:-1]]
    whole = _assemble(jnp.zeros_like(levels[0].upto[..., 0, 0]), blocks, -jnp.inf)
    return whole if decays.seen is None else jnp.where(decays.seen.within_BC1QQ, whole, -jnp.inf)


def _keep_seen(products, decays: Decays):
    return products if decays.seen is None else jnp.where(decays.seen.within_BC1QQ, products, 0)


def _products_by_channel(rows, cols, levels: list[Sums], exclusive: bool):
    diagonal = jnp.zeros_like(rows[..., 0]) if exclusive else jnp.sum(rows * cols, axis=-1)
    blocks = []
    for level in levels[:-1]:
        n_blocks, width = level.upto.shape[-3:-1]
        right, left = (a.reshape(*a.shape[:-2], n_blocks, width, a.shape[-1]) for a in (rows, cols))
        to, since = level.before if exclusive else level.upto, level.after
        right = right[..., 1::2, :, :] * jnp.exp(to[..., 1::2, :, :])
        left = left[..., 0::2, :, :] * jnp.exp(since[..., 0::2, :, :])
        blocks.append(dot(right, jnp.swapaxes(left, -1, -2)))
    return _assemble(diagonal, blocks)


def _assemble(diagonal, blocks: list, above=0):
    """The lower triangle [..., Q, Q] of its diagonal and its blocks [..., n, w, w] below it, by halves."""
    whole = diagonal[..., :, None, None]
    for block in blocks:
        left, right = whole[..., 0::2, :, :], whole[..., 1::2, :, :]
        nothing = jnp.full_like(left, above)
        rows = [jnp.concatenate(pair, axis=-1) for pair in ((left, nothing), (block, right))]
        whole = jnp.concatenate(rows, axis=-2)
    return whole[..., 0, :, :]


def unit_inverse(below):
    """(1 + below)^-1 of a strictly lower triangle [..., Q, Q], by halves: exact as forward substitution is."""
    size = below.shape[-1]
    token = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=below.dtype), below.shape)
    width = 1
    while width < size:
        block = token // width
        mates = (block[:, None] == block[None] + 1) & (block[:, None] % 2 == 1)
        between = jnp.where(jnp.expand_dims(mates, range(below.ndim - 2)), below, 0)
        if width > 1:
            between = dot(dot(inverse, between, _HIGHEST), inverse, _HIGHEST)
        inverse, width = inverse - between, 2 * width
    return inverse


def dot(left, right, precision=None):
    """Matrix product over the last two axes; the others broadcast."""
    return jnp.einsum("...ij,...jk->...ik", left, right, precision=precision)


def dot_tokens(left, right):
    """left^T right over the tokens: [..., Q, N], [..., Q, P] -> [..., N, P]."""
    return jnp.einsum("...qn,...qp->...np", left, right)


def carry(step: Callable, state, chunks):
    """(what `step(state, chunk) -> (state, output)` gives of each chunk, last state); chunks: pytree of [B, C, ...]."""
    by_chunk = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), chunks)
    state, outputs = jax.lax.scan(step, *vary_alike((state, by_chunk)))
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1), outputs), state


def repeat_heads(array_BTGN, n_heads: int):
    """Each group for its heads, [B, T, H, N]: head h reads group h // (H / G)."""
    shared = n_heads // array_BTGN.shape[2]
    return array_BTGN if shared == 1 else jnp.repeat(array_BTGN, shared, axis=2)
