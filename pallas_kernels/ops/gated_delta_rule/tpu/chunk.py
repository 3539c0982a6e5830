# SPDX-License-Identifier: Apache-2.0
"""One chunk of the gated delta rule on a TPU: a function of values in registers, and with it its gradient.

Per head, with c the sums of log decays from the start of the chunk, D_ij = exp(c_i - c_j), S the entering state and A
what stands below the diagonal of beta_i (k_i . k_j) D_ij, the corrections d of the chunk's tokens solve

    (1 + A) d = beta (v - exp(c) k S)
    y = scale (exp(c) q S + (q k^T o D) d)        S' = exp(c_end) S + (exp(c_end - c) k)^T d

The backward kernel traces `jax.vjp` of `advance`. What has a gradient of its own here has one because of its rounding:
products round their cotangent to the type of their operands, and sums of log decays are sums in the gradient too.

**Sums.** No sum of log decays is a difference. For pairs they come from one product per head with a triangle of ones,
sum over t of [t <= i] g_t [t > j]; ones are exact in bfloat16 and g is cut into three terms that are. Its gradient is
the sum over the pairs that lie across a token, and of nothing else. A document's first token forgets all.

**Inverse.** (1 + A)^-1 by halves (1, 2, 4, ... tokens): as exact as forward substitution, for keys that are alike make
powers of A large. Left operands are lists, a stage for all heads: they fill each other's latencies.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_tpu import F32, LANES, NN, NT, SUBLANES, TN, dot

CHUNK = LANES  # tokens


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Static sizes of one kernel call.

    heads, groups: a block; key, width: N and P, multiples of 128; dtype: of q, k and v, and of operands; decays:
    whether any token decays; initial, final: whether a state comes in, and goes out.
    """

    heads: int
    groups: int
    key: int
    width: int
    dtype: str
    scale: float
    decays: bool
    initial: bool
    final: bool

    @property
    def gate_rows(self) -> int:
        """Rows of the block of gates: log decays of the heads, their step sizes, and zeros to whole tiles."""
        return -(-2 * self.heads // 8) * 8


def _iotas():
    return (lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in range(2))


def _terms(array, count: int) -> list:
    """A float32 array as `count` terms that bfloat16 holds."""
    terms = []
    for _ in range(count - 1):
        terms.append(array.astype(jnp.bfloat16))
        array = array - terms[-1].astype(F32)
    return [*terms, array.astype(jnp.bfloat16)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a, b, dims, dtype):
    """a b of float32 arrays, rounded to `dtype`."""
    return dot(a.astype(dtype), b.astype(dtype), dims)


def _product_forward(a, b, dims, dtype):
    a, b = a.astype(dtype), b.astype(dtype)
    return dot(a, b, dims), (a, b)


def _product_backward(dims, dtype, operands, given):
    (a, b), given = operands, given.astype(dtype)
    if dims == NN:
        return dot(given, b, NT), dot(a, given, TN)
    if dims == NT:
        return dot(given, b, NN), dot(given, a, TN)
    return dot(b, given, NT), dot(a, given, NN)


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def token_sums(array, behind: bool):
    """Sums over the tokens t of [t, ...]: up to and with each token or, `behind`, over all behind it. float32 exact."""
    return _masked_sums(array, behind, NN)


def _masked_sums(array, behind: bool, dims):
    row, column = _iotas()
    ones = (column > row if behind else column <= row).astype(F32).astype(jnp.bfloat16)
    return functools.reduce(jnp.add, [dot(ones, term, dims) for term in _terms(array, 3)])


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def solve(inverse, below, right, dtype):
    """d of (1 + below) d = right by the inverse, whose own gradient is zero: that of `below` is the equation's."""
    del below
    return dot(inverse, right.astype(dtype))


def _solve_forward(inverse, below, right, dtype):
    solved = solve(inverse, below, right, dtype)
    return solved, (inverse, solved.astype(dtype))


def _solve_backward(dtype, kept, given):
    inverse, solved = kept
    right = dot(inverse, given.astype(dtype), TN)
    return jnp.zeros_like(inverse), -dot(right.astype(dtype), solved, NT), right


solve.defvjp(_solve_forward, _solve_backward)


def _accurate(left: list, right: list) -> jax.Array:
    """Product of operands in terms: all of them but those of two low terms."""
    pairs = [(a, b) for i, a in enumerate(left) for j, b in enumerate(right) if i + j < max(len(left), len(right))]
    return functools.reduce(jnp.add, [dot(a, b) for a, b in reversed(pairs)])


def _right_rows(array, width: int):
    """The rows of every second block of `width`."""
    return jnp.concatenate([array[at : at + width] for at in range(width, CHUNK, 2 * width)], axis=0)


def _less(array, step, width: int):
    """array - step, which has all rows or those of `_right_rows`."""
    if step.shape == array.shape:
        return array - step
    parts = []
    for i, at in enumerate(range(0, CHUNK, 2 * width)):
        right = array[at + width : at + 2 * width] - step[i * width : (i + 1) * width]
        parts += [array[at : at + width], right]
    return jnp.concatenate(parts, axis=0)


def unit_inverses(belows: list, dtype) -> list:
    """(1 + below)^-1 of strictly lower triangles: to float32 accuracy, or that of two bfloat16 terms; in `dtype`."""
    cut = (lambda array: [array]) if dtype == F32 else (lambda array: _terms(array, 2))
    row, column = _iotas()

    def between(width):
        """From the left one of two neighbouring blocks to the right one."""
        block = row // width
        return (block == column // width + 1) & (block % 2 == 1)

    inverses = [jnp.where(row == column, 1.0, jnp.where(between(1), -below, 0.0)) for below in belows]
    width = 2
    while width < CHUNK:
        # Rows that change are those of right blocks: of whole tiles of them alone is a product half as long.
        changing = (lambda array: array) if width < SUBLANES else functools.partial(_right_rows, width=width)
        now = [cut(inverse) for inverse in inverses]
        rows = [cut(changing(inverse)) for inverse in inverses]
        left = [_accurate(a, cut(jnp.where(between(width), b, 0.0))) for a, b in zip(rows, belows, strict=True)]
        steps = [_accurate(cut(a), b) for a, b in zip(left, now, strict=True)]
        inverses = [_less(inverse, step, width) for inverse, step in zip(inverses, steps, strict=True)]
        width *= 2
    return [inverse.astype(dtype) for inverse in inverses]


def advance(q, k, v, gates, states, invert, blocks: Blocks) -> tuple[list, list]:
    """(y, leaving state) of each head.

    q, k: float32 [CHUNK, N] of each group; v: [CHUNK, P] of each head; gates: [CHUNK, gate_rows]; states: [N, P] of
    each head; invert: from the triangles of all heads to the inverses in `blocks.dtype`.
    """
    dtype, heads = jnp.dtype(blocks.dtype), range(blocks.heads)
    mul = lambda a, b, dims=NN: product(a, b, dims, dtype)
    group = lambda head: head * blocks.groups // blocks.heads
    row, column = _iotas()
    named = columns(gates)
    steps, betas = named[: blocks.heads], named[blocks.heads : 2 * blocks.heads]
    ones = [jnp.ones((1, 1), F32)] * blocks.heads
    decays, starts, tails, through = ones, ones, ones, ones
    if blocks.decays:
        starts = [jnp.exp(c) for c in columns(token_sums(gates, False))[: blocks.heads]]
        tails = [jnp.exp(c) for c in columns(token_sums(gates, True))[: blocks.heads]]
        decays = [jnp.exp(token_sums(jnp.where(row > column, step, 0.0), False)) for step in steps]
        through = [jnp.exp(jnp.sum(step, axis=0, keepdims=True)) for step in steps]
    alike = [mul(array, array_, NT) for array, array_ in zip(k, k, strict=True)]
    asked = [mul(q_, k_, NT) for q_, k_ in zip(q, k, strict=True)]
    belows = [jnp.where(row > column, betas[h] * (alike[group(h)] * decays[h]), 0.0) for h in heads]
    inverses = invert(belows)
    read = [mul(k[group(h)], states[h]) for h in heads]
    rights = [betas[h] * (v[h] - starts[h] * read[h]) for h in heads]
    written = [solve(inverses[h], belows[h], rights[h], dtype) for h in heads]
    scores = [jnp.where(row >= column, asked[group(h)] * decays[h], 0.0) for h in heads]
    carried = [mul(q[group(h)], states[h]) for h in heads]
    ys = [blocks.scale * (starts[h] * carried[h] + mul(scores[h], written[h])) for h in heads]
    leaving = [through[h] * states[h] + mul(k[group(h)], tails[h] * written[h], TN) for h in heads]
    return ys, leaving
