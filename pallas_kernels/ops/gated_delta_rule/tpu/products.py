# SPDX-License-Identifier: Apache-2.0
"""Products on the matrix unit, and moves of tokens, within the TPU kernels of the delta rule, with their gradients.

What has a gradient of its own here has one because of its rounding: products round their cotangent to bfloat16 terms as
they do their operands, and sums of log decays are sums in the gradient too.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, LANES, NN, NT, SUBLANES, TN, dot

CHUNK = LANES  # tokens


def iotas():
    """(row, column) of each entry of a chunk's pairs."""
    return (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))


def between(width: int):
    """Whether a pair leads from the left one of two neighbouring blocks of `width` tokens to the right one."""
    row, column = iotas()
    differing = jnp.where(row > column, row ^ column, 0)
    return (differing >= width) & (differing < 2 * width)


# Products ------------------------------------------------------------------------------------------------------------


def cut(array, count: int) -> list:
    """A float32 array as `count` terms that bfloat16 holds; 0: as it is."""
    if not count:
        return [array]
    terms = []
    for _ in range(count - 1):
        terms.append(array.astype(jnp.bfloat16))
        array = array - terms[-1].astype(F32)
    return [*terms, array.astype(jnp.bfloat16)]


def of_terms(left: list, right: list, dims=NN) -> jax.Array:
    """Product of operands in terms: all of them but those of two low terms."""
    pairs = [(a, b) for i, a in enumerate(left) for j, b in enumerate(right) if i + j < max(len(left), len(right))]
    return functools.reduce(jnp.add, [dot(a, b, dims) for a, b in reversed(pairs)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a, b, dims, terms: tuple[int, int, int]):
    """a b of float32 arrays. terms: bfloat16 terms of a, of b and, in the gradient, of what is given; 0s: float32."""
    return of_terms(cut(a, terms[0]), cut(b, terms[1]), dims)


def _product_forward(a, b, dims, terms):
    return product(a, b, dims, terms), (a, b)


def _product_backward(dims, terms, operands, given):
    a, b = (cut(array, count) for array, count in zip(operands, terms, strict=False))
    given = cut(given, terms[2])
    if dims == NN:
        return of_terms(given, b, NT), of_terms(a, given, TN)
    if dims == NT:
        return of_terms(given, b, NN), of_terms(given, a, TN)
    return of_terms(b, given, NT), of_terms(a, given, NN)


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve(inverse, below, right, terms: tuple[int, int, int]):
    """d of (1 + below) d = right by the inverse, whose own gradient is zero: that of `below` is the equation's."""
    del below
    return of_terms(cut(inverse, terms[0]), cut(right, terms[1]))


def _solve_forward(inverse, below, right, terms):
    solved = solve(inverse, below, right, terms)
    return solved, (inverse, solved)


def _solve_backward(terms, kept, given):
    inverse, solved = kept
    right = of_terms(cut(inverse, terms[0]), cut(given, terms[2]), TN)
    return jnp.zeros_like(inverse), -of_terms(cut(right, terms[2]), cut(solved, terms[2]), NT), right


solve.defvjp(_solve_forward, _solve_backward)


def right_rows(array, width: int):
    """The rows of every second block of `width`."""
    return jnp.concatenate([array[at : at + width] for at in range(width, CHUNK, 2 * width)], axis=0)


def less(array, step, width: int):
    """array - step, which has all rows or those of `right_rows`."""
    if step.shape == array.shape:
        return array - step
    parts = []
    for i, at in enumerate(range(0, CHUNK, 2 * width)):
        right = array[at + width : at + 2 * width] - step[i * width : (i + 1) * width]
        parts += [array[at : at + width], right]
    return jnp.concatenate(parts, axis=0)


def unit_inverses(belows: list, exact: bool) -> list:
    """(1 + below)^-1 of strictly lower triangles, float32: to its accuracy or, unless exact, of two bfloat16 terms."""
    count = 0 if exact else 2
    row, column = iotas()
    inverses = [jnp.where(row == column, 1.0, jnp.where(between(1), -below, 0.0)) for below in belows]
    width = 2
    while width < CHUNK:
        # Rows that change are those of right blocks: of whole tiles of them alone is a product half as long.
        changing = (lambda array: array) if width < SUBLANES else functools.partial(right_rows, width=width)
        now = [cut(inverse, count) for inverse in inverses]
        rows = [cut(changing(inverse), count) for inverse in inverses]
        left = [of_terms(a, cut(jnp.where(between(width), b, 0.0), count)) for a, b in zip(rows, belows, strict=True)]
        steps = [of_terms(cut(a, count), b) for a, b in zip(left, now, strict=True)]
        inverses = [less(inverse, step, width) for inverse, step in zip(inverses, steps, strict=True)]
        width *= 2
    return inverses


# Sums and columns ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def token_sums(array, behind: bool):
    """Sums over the tokens t of [t, ...]: up to and with each token or, `behind`, over all behind it. float32 exact."""
    return _masked_sums(array, behind, NN)


def _masked_sums(array, behind: bool, dims):
    row, column = iotas()
    ones = (column > row if behind else column <= row).astype(F32).astype(jnp.bfloat16)
    return functools.reduce(jnp.add, [dot(ones, term, dims) for term in cut(array, 3)])


token_sums.defvjp(
    lambda array, behind: (_masked_sums(array, behind, NN), None),
    lambda behind, _, given: (_masked_sums(given, behind, TN),),
)


@jax.custom_vjp
def columns(tile):
    """The columns of [CHUNK, n] as a list of [CHUNK, 1]."""
    return [tile[:, i : i + 1] for i in range(tile.shape[1])]


def _joined(_, given):
    lane = lax.broadcasted_iota(jnp.int32, (CHUNK, len(given)), 1)
    tile = jnp.zeros((CHUNK, len(given)), F32)
    for i, column in enumerate(given):
        tile = jnp.where(lane == i, column, tile)
    return (tile,)


columns.defvjp(lambda tile: (columns(tile), None), _joined)


# Tokens by halves ----------------------------------------------------------------------------------------------------


def of_right(width: int):
    """[CHUNK, 1]: whether a token lies in the right one of two neighbouring blocks of `width`."""
    return lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0) & width != 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def mates(array, width: int):
    """Of float32 [CHUNK, n]: row t is that of token t ^ width, in the same place of the neighbouring block."""
    if width >= SUBLANES:
        starts = range(0, CHUNK, width)
        return jnp.concatenate([array[at ^ width : (at ^ width) + width] for at in starts], axis=0)
    tiles = array.reshape(-1, SUBLANES, array.shape[1])
    back = pltpu.roll(tiles, width, 1)
    if 2 * width < SUBLANES:
        row = lax.broadcasted_iota(jnp.int32, tiles.shape, 1)
        back = jnp.where(row & width != 0, back, pltpu.roll(tiles, SUBLANES - width, 1))
    return back.reshape(array.shape)


mates.defvjp(lambda array, width: (mates(array, width), None), lambda width, _, given: (mates(given, width),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def changing_rows(array, width: int):
    """The rows of right blocks of `width` where those are whole tiles, else all."""
    return array if width < SUBLANES else right_rows(array, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def in_their_rows(rows, width: int):
    """Rows of `changing_rows` in [CHUNK, n], zeros in the others."""
    if width < SUBLANES:
        return rows
    nothing = jnp.zeros((width, rows.shape[1]), rows.dtype)
    blocks = [rows[at : at + width] for at in range(0, CHUNK // 2, width)]
    return jnp.concatenate([part for block in blocks for part in (nothing, block)], axis=0)


changing_rows.defvjp(
    lambda array, width: (changing_rows(array, width), None), lambda width, _, given: (in_their_rows(given, width),)
)
in_their_rows.defvjp(
    lambda rows, width: (in_their_rows(rows, width), None), lambda width, _, given: (changing_rows(given, width),)
)
