# SPDX-License-Identifier: Apache-2.0
"""What the forward and the backward TPU kernel of the Mamba-2 scan share: blocks, decay sums, document rows.

Inside the kernels the tokens of a chunk lie in lanes and heads or channels in sublanes. With c_i the inclusive sum of
log decays a_t = dt_t A up to token i, a pair (i, j), j <= i, of one document weighs exp(c_i - c_j).

Sums: every log decay is cut into pieces that bfloat16 holds exactly and whose sums over a chunk float32 holds exactly
(multiples of 1/2, of 2^-9, ...), so that one matrix product with a triangle of ones gives c as an unevaluated sum of
two floats, exact to about 2^-32. Differences of c are then as good next to a decay of exp(-80) as anywhere else.

Weights of pairs: exp(c_i - c_j) for each pair in the backward and for float32 inputs. In the forward of bfloat16 inputs
the weight is factored around the middle r_J of each group J of 8 tokens, exp(c_i - r_J) exp(r_J - c_j): the second
factor scales x_j, the first is one row per 8. Both stay in range as long as no token's log decay is below PAIR_FLOOR;
blocks that have such a token take the exponentials of every pair instead.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, LANES, NT, dot
from pallas_kernels.segments import document_numbers
from pallas_kernels.varying import call_varying

CHUNK = LANES  # tokens a chunk: one lane row
VMEM_BYTES = 64 * 2**20  # that a kernel may take
GROUP = 8  # tokens that share a decay reference in the factored form
LOG_DECAY_FLOOR = -120.0  # exp of it is zero in float32, so the limit changes nothing
PAIR_FLOOR = -16.0  # the least log decay of a token in the factored form
EXPONENT_LIMIT = 64.0


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Static sizes of one kernel call.

    heads: heads a block; groups: state groups a block; width: P; state: N; chunks: chunks a grid step; exact: full
    exponentials (float32) instead of the factored form; stage: heads whose carried products the forward holds together;
    skip: "" (no D), "head" (D [H]) or "channel" (D [H, P]); alone: so many tokens side by side, a power of 2, read
    nothing of themselves and each other, 0: all do; wide: gradients of B and C are not rounded.
    """

    heads: int
    groups: int
    width: int
    state: int
    chunks: int
    exact: bool
    stage: int
    skip: str
    documents: bool
    initial: bool
    final: bool
    alone: int = 0
    wide: bool = False

    @property
    def tokens(self) -> int:
        return self.chunks * CHUNK

    @property
    def channels(self) -> int:
        return self.heads * self.width

    @property
    def group_heads(self) -> int:
        return self.heads // self.groups

    @property
    def group_channels(self) -> int:
        return self.group_heads * self.width


def triangle(dtype, keep):
    """[CHUNK, CHUNK] of ones where keep(row, column), else zeros."""
    row = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
    column = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    return keep(row, column).astype(F32).astype(dtype)


def _to_grid(value, scale: float):
    return jnp.floor(value * scale + 0.5) * (1.0 / scale)


def decay_pieces(a_HQ):
    """Log decays cut into bfloat16 pieces: (halves, smaller pieces)."""
    halves = _to_grid(a_HQ, 2.0)
    rest = a_HQ - halves
    pieces = []
    for scale in (2.0**9, 2.0**17, 2.0**25):
        piece = _to_grid(rest, scale)
        pieces.append(piece)
        rest = rest - piece
    return halves, [*pieces, rest]


@dataclasses.dataclass(frozen=True)
class DecaySums:
    """Inclusive sums over a chunk as high + low, [heads, CHUNK]."""

    high: jax.Array
    low: jax.Array
    to_reference: jax.Array | None  # r_J - c_j, factored form only
    references: tuple | None  # r_J as (high, low), tokens-first: [CHUNK / GROUP, heads]

    @property
    def from_start(self):
        return self.high + self.low

    @property
    def to_end(self):
        last = CHUNK - 1
        return (self.high[:, last:] - self.high) + (self.low[:, last:] - self.low)

    @property
    def total(self):
        """[heads, 1]: log decay of the whole chunk."""
        return (self.high + self.low)[:, CHUNK - 1 :]


def _reference_token(token):
    return (token | (GROUP - 1)) - GROUP // 2


def decay_sums(a_HQ, blocks: Blocks) -> DecaySums:
    """Sums of a chunk's log decays [heads, CHUNK] along tokens."""
    heads = a_HQ.shape[0]
    halves, small = decay_pieces(a_HQ)
    stack = lambda parts: jnp.concatenate(parts, 0).astype(jnp.bfloat16)
    split = lambda sums: [sums[k * heads : (k + 1) * heads] for k in range(sums.shape[0] // heads)]
    upto = triangle(jnp.bfloat16, lambda row, column: row <= column)
    sums = split(dot(stack([halves, *small]), upto))
    high, low = sums[0] + sums[1], sums[2] + (sums[3] + sums[4])
    if blocks.exact:
        return DecaySums(high, low, None, None)
    row = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
    column = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    middle = lax.broadcasted_iota(jnp.int32, (CHUNK // GROUP, CHUNK), 0) * GROUP + GROUP // 2 - 1
    before = lax.broadcasted_iota(jnp.int32, (CHUNK // GROUP, CHUNK), 1) <= middle
    rows = max(2, heads)  # the compiler fails on products with a single column
    wide = lambda piece: jnp.broadcast_to(piece, (rows, CHUNK)).astype(jnp.bfloat16)
    at = [dot(before.astype(F32).astype(jnp.bfloat16), wide(piece), NT) for piece in (halves, *small)]
    references = at[0] + at[1], at[2] + (at[3] + at[4])
    toward = (row <= _reference_token(column)).astype(F32) - (row <= column).astype(F32)
    parts = split(dot(stack([halves, *small]), toward.astype(jnp.bfloat16)))
    to_reference = (parts[0] + parts[1]) + (parts[2] + (parts[3] + parts[4]))
    return DecaySums(high, low, to_reference, references)


def write_pair_sums(sums: DecaySums, chunk: int, refs, blocks: Blocks):
    """Leaves in scratch what `weigh_pairs` needs of a chunk: exp(c_i - r_J) of the factored form, else c itself."""
    heads = blocks.heads
    if blocks.exact:
        columns = refs["columns"]
        columns[chunk, 0, :, :heads] = sums.high.T
        columns[chunk, 1, :, :heads] = sums.low.T
        refs["pairs"][chunk, 0], refs["pairs"][chunk, 1] = sums.high, sums.low
        return
    high, low = sums.references
    for head in range(heads):
        one = slice(head, head + 1)
        exponent = (sums.high[one] - high[:, one]) + (sums.low[one] - low[:, one])
        refs["factored"][chunk, head] = jnp.exp(jnp.minimum(exponent, EXPONENT_LIMIT))


def exact_weights(chunk: int, head: int, refs):
    """[CHUNK, CHUNK] j by i: exp(c_i - c_j); 1 where i lies before j."""
    pairs, columns, one = refs["pairs"], refs["columns"], slice(head, head + 1)
    high = pairs[chunk, 0, one] - columns[chunk, 0, :, one]
    low = pairs[chunk, 1, one] - columns[chunk, 1, :, one]
    return jnp.exp(jnp.minimum(high + low, 0.0))


def weigh_pairs(factor, chunk: int, head: int, refs, blocks: Blocks):
    """[CHUNK, CHUNK] j by i: the ref `factor`, zero for pairs that are not visible, times one head's pair weights.

    In the factored form the weights are exp(c_i - r_J), finite but meaningless where i lies before group J.
    """
    if blocks.exact:
        return factor[...] * exact_weights(chunk, head, refs)
    rows = []
    for group in range(CHUNK // GROUP):
        weights = refs["factored"][chunk, head, group : group + 1]
        rows.append(factor[group * GROUP : (group + 1) * GROUP] * weights)
    return jnp.concatenate(rows, 0)


# Rows of the document array: key and query number of the document (query -1: padding), whether a token belongs to the
# document that enters its chunk, whether to the one that leaves it, both for real tokens; whether the token is real;
# and whether the document that enters the chunk is still the one at this token.
KEY, QUERY, ENTERS, LEAVES, REAL, CARRIES = range(6)


def document_rows(segment_ids_BT):
    """[B, 8, T] float32 rows as above; T is a multiple of CHUNK."""
    n_batch, n_tokens = segment_ids_BT.shape
    number_BT = document_numbers(segment_ids_BT)
    last_BC = number_BT.reshape(n_batch, n_tokens // CHUNK, CHUNK)[:, :, -1]
    before_BC = jnp.pad(last_BC[:, :-1], ((0, 0), (1, 0)))
    real_BT = segment_ids_BT != 0
    carries_BT = number_BT == jnp.repeat(before_BC, CHUNK, axis=1)
    leaves_BT = number_BT == jnp.repeat(last_BC, CHUNK, axis=1)
    zero_BT = jnp.zeros_like(number_BT)
    query_BT = jnp.where(real_BT, number_BT, -1)
    rows = [number_BT, query_BT, carries_BT & real_BT, leaves_BT & real_BT, real_BT, carries_BT, zero_BT, zero_BT]
    return jnp.stack([row.astype(F32) for row in rows], axis=1)


def _bits(keep, dtype):
    """int32 of -1 where the float is positive, else 0; for bfloat16 int16, computed two rows at a time."""
    if dtype == F32:
        return jnp.where(keep > 0, -1, 0)
    ones = (pltpu.bitcast(jnp.where(keep > 0, 1.0, 0.0).astype(dtype), jnp.int32) >> 7) & 0x00010001  # 1.0 is 0x3F80
    return pltpu.bitcast((ones << 16) - ones, jnp.int16)


def _and(array, bits):
    return lax.bitcast_convert_type(lax.bitcast_convert_type(array, bits.dtype) & bits, array.dtype)


def without_padding(tile, rows):
    """[channels, CHUNK] with zeros at padded tokens, whatever they hold. rows: as in `pair_mask`."""
    if rows is None:
        return tile
    keep = jnp.broadcast_to(rows[REAL : REAL + 1], (8 * 4 // tile.dtype.itemsize, CHUNK))
    bits = _bits(keep, tile.dtype)
    return _and(tile, jnp.concatenate([bits] * (tile.shape[0] // bits.shape[0]), 0))


def mask_maps(refs, blocks: Blocks) -> dict:
    """The refs with B and C replaced, where there are documents, by copies with zeros at padded tokens."""
    if not blocks.documents:
        return refs
    width = min(CHUNK, blocks.state)
    for chunk in range(blocks.chunks):
        tokens = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        real = refs["documents"][0, REAL : REAL + 1, tokens]
        bits = _bits(jnp.broadcast_to(real, (CHUNK, CHUNK)).T[:, :width], refs["B"].dtype)
        for name in ("B", "C"):
            for first in range(0, blocks.groups * blocks.state, width):
                lanes = slice(first, first + width)
                refs[f"masked {name}"][0, tokens, lanes] = _and(refs[name][0, tokens, lanes], bits)
    return {**refs, "B": refs["masked B"], "C": refs["masked C"]}


def pair_mask(rows, alone: int = 0):
    """[CHUNK, CHUNK] j by i: token j is visible to token i. rows: [8, CHUNK] of the documents, or None; alone: as of
    `Blocks`."""
    j = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0)
    i = lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1)
    causal = (j < (i & -alone)) if alone else (j <= i)
    if rows is None:
        return causal
    key = jnp.broadcast_to(rows[KEY : KEY + 1], (CHUNK, CHUNK)).T
    return causal & (key == jnp.broadcast_to(rows[QUERY : QUERY + 1], (CHUNK, CHUNK)))


def call_kernel(kernel, name, grid, inputs, specs, outputs, scratch, blocks, interpret):
    """Runs kernel(*refs, names=..., blocks=...) over a grid (rows, head blocks, steps in order); {output name: array}.

    inputs: {name: array}, cut by specs[name]; outputs: {name: (spec, shape)}; scratch: {name: memory}. The kernel gets
    its references in this order, with their names.
    """
    call = pl.pallas_call(
        functools.partial(kernel, names=(*inputs, *outputs, *scratch), blocks=blocks),
        grid=grid,
        in_specs=[specs[key] for key in inputs],
        out_specs=[spec for spec, _ in outputs.values()],
        out_shape=[shape for _, shape in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # of the copies, whose addresses follow from shapes: 5% of the forward's time
        ),
        interpret=interpret,
        name=name,
    )
    return dict(zip(outputs, call_varying(call, *inputs.values())))
