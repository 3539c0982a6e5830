# SPDX-License-Identifier: Apache-2.0
"""One chunk of the gated delta rule on a TPU: a function of values in registers, and with it its gradient.

Per head, with c the sums of log decays from the start of the chunk, D_ij = exp(c_i - c_j), one number or one a key
channel, S the entering state and A what stands below the diagonal of r_i k_i . (D_ij o k_j), the corrections d of the
chunk's tokens solve

    (1 + A) d = w v - r (exp(c) o k) S
    y = u (exp(c) o q S + (q . D o k)^T d)        S' = exp(c_end) o S + (exp(c_end - c) o k)^T d

Where q and k are as long as they are given, r = w = beta and u = scale; with l the lengths that they are divided by,
r = beta / l^2, w = beta / l and u = scale / l: products are of the keys that were given, not of rounded quotients.

The backward kernel traces `jax.vjp` of `advance`.

**Sums.** No sum of log decays is a difference. Of heads they come from one product per head with a triangle of ones,
sum over t of [t <= i] g_t [t > j]; ones are exact in bfloat16 and g is cut into three terms that are. Its gradient is
the sum over the pairs that lie across a token, and of nothing else. A document's first token forgets all.

**Key channels.** Weights of pairs do not factor into numbers of either token without overflow, but by halves they do
(see `pallas_kernels.chunks`): at each of seven levels a token lies in the left or the right half of its block, and has
one weight, at most 1, from or to its middle. A level is one product of all tokens, of which the level's pairs are kept.

**Inverse.** (1 + A)^-1 by halves (1, 2, 4, ... tokens): as exact as forward substitution, for keys that are alike make
powers of A large. Left operands are lists, a stage for all heads: they fill each other's latencies.

**Terms.** Where keys are alike, what is left of a value is the difference of large terms. So the inverse, d, weights
of pairs and what is multiplied for them are two bfloat16 terms each, as is what the gradient of a product is given.
Keys, queries and values are exact in one; the state has one, for what it loses is not added up.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.mosaic_tpu import F32, NN, NT, SUBLANES, TN, round_up
from pallas_kernels.ops.gated_delta_rule.tpu.products import (
    CHUNK,
    between,
    changing_rows,
    columns,
    in_their_rows,
    iotas,
    mates,
    of_right,
    product,
    solve,
    token_sums,
)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Static sizes of one kernel call.

    heads, groups: a block; key, width: N and P, multiples of 128; dtype: of q, k and v; decays: whether any token
    decays; by_channel: each key channel by itself; initial, final: whether a state comes in, and goes out.
    """

    heads: int
    groups: int
    key: int
    width: int
    dtype: str
    decays: bool
    by_channel: bool
    initial: bool
    final: bool

    @property
    def gate_rows(self) -> int:
        """Rows of the block of gates: u, r, w and, where they decay, log decays of the heads; zeros to whole tiles."""
        return round_up((4 if self.of_heads else 3) * self.heads, SUBLANES)

    @property
    def of_heads(self) -> bool:
        """Whether a head decays as a whole."""
        return self.decays and not self.by_channel

    @property
    def exact(self) -> bool:
        """Whether products are of float32."""
        return jnp.dtype(self.dtype) == F32

    def terms(self, a: int, b: int) -> tuple[int, int, int]:
        """Of a product's operands and of what its gradient is given."""
        return (0, 0, 0) if self.exact else (a, b, 2)


def advance(q, k, v, gates, steps, states, invert, blocks: Blocks) -> tuple[list, list]:
    """(y, leaving state) of each head.

    q, k: float32 [CHUNK, N] of each group; v: [CHUNK, P] of each head; gates: [CHUNK, gate_rows]; steps: log decays by
    channel [CHUNK, N] of each head, or none; states: [N, P] of each head; invert: from the triangles of all heads to
    the inverses.
    """
    heads, terms = range(blocks.heads), blocks.terms
    group = lambda head: head * blocks.groups // blocks.heads
    row, column = iotas()
    named = columns(gates)
    asks, reads, writes = (named[i * blocks.heads : (i + 1) * blocks.heads] for i in range(3))
    if blocks.by_channel:
        pairs = [_pairs_by_channel(q[group(h)], k[group(h)], steps[h], blocks) for h in heads]
        asked, alike, upto, after, total = zip(*pairs, strict=True)
        starts, tails = [jnp.exp(c) for c in upto], [jnp.exp(c) for c in after]
        through = [_as_column(jnp.exp(c), blocks.width) for c in total]
        carried = [product(q[group(h)] * starts[h], states[h], NN, terms(1, 1)) for h in heads]
        read = [product(k[group(h)] * starts[h], states[h], NN, terms(1, 1)) for h in heads]
    else:
        decays, starts, tails, through = _decays_of_heads(gates, named[3 * blocks.heads :], blocks)
        asked, alike = ([product(a, b, NT, terms(1, 1)) for a, b in zip(array, k, strict=True)] for array in (q, k))
        asked = [jnp.where(row >= column, asked[group(h)] * decays[h], 0.0) for h in heads]
        alike = [alike[group(h)] * decays[h] for h in heads]
        carried = [starts[h] * product(q[group(h)], states[h], NN, terms(1, 1)) for h in heads]
        read = [starts[h] * product(k[group(h)], states[h], NN, terms(1, 1)) for h in heads]
    belows = [jnp.where(row > column, reads[h] * alike[h], 0.0) for h in heads]
    inverses = invert(belows)
    rights = [writes[h] * v[h] - reads[h] * read[h] for h in heads]
    written = [solve(inverses[h], belows[h], rights[h], terms(2, 2)) for h in heads]
    ys = [asks[h] * (carried[h] + product(asked[h], written[h], NN, terms(2, 2))) for h in heads]
    if blocks.by_channel:
        added = [product(k[group(h)] * tails[h], written[h], TN, terms(2, 2)) for h in heads]
    else:
        added = [product(k[group(h)], tails[h] * written[h], TN, terms(1, 2)) for h in heads]
    return ys, [through[h] * states[h] + added[h] for h in heads]


def _decays_of_heads(gates, steps: list, blocks: Blocks) -> tuple:
    """(of pairs, from the entering state, to the leaving one, from state to state) of each head, each at most 1."""
    if not blocks.decays:
        return ([jnp.ones((1, 1), F32)] * blocks.heads,) * 4
    row, column = iotas()
    first, steps = 3 * blocks.heads, steps[: blocks.heads]
    starts = [jnp.exp(c) for c in columns(token_sums(gates, False))[first : first + blocks.heads]]
    tails = [jnp.exp(c) for c in columns(token_sums(gates, True))[first : first + blocks.heads]]
    decays = [jnp.exp(token_sums(jnp.where(row > column, step, 0.0), False)) for step in steps]
    through = [jnp.exp(jnp.sum(step, axis=0, keepdims=True)) for step in steps]
    return decays, starts, tails, through


def _pairs_by_channel(q, k, steps, blocks: Blocks) -> tuple:
    """(q_i . (D_ij o k_j) for j <= i, k_i . (D_ij o k_j) for j < i, log decays from the entering state, to the leaving
    one, and from state to state, the same in each row)."""
    row, column = iotas()
    upto = total = steps
    after = jnp.zeros_like(steps)
    asked = jnp.where(row == column, jnp.sum(q * k, axis=1, keepdims=True), 0.0)
    alike = jnp.zeros((CHUNK, CHUNK), F32)
    width = 1
    while width < CHUNK:
        right = of_right(width)
        weight = jnp.exp(jnp.where(right, upto, after))
        keys = k * weight
        rows = jnp.concatenate([changing_rows(array, width) for array in (q * weight, keys)], axis=0)
        both = product(rows, keys, NT, blocks.terms(2, 2))
        n_rows = both.shape[0] // 2
        of_q, of_k = (in_their_rows(both[at : at + n_rows], width) for at in (0, n_rows))
        level = between(width)
        asked, alike = asked + jnp.where(level, of_q, 0.0), alike + jnp.where(level, of_k, 0.0)
        other = mates(total, width)
        upto, after = upto + jnp.where(right, other, 0.0), after + jnp.where(right, 0.0, other)
        total, width = total + other, 2 * width
    return asked, alike, upto, after, total


def _as_column(rows, width: int):
    """[N, width] of [CHUNK, N] whose rows are the same."""
    return jnp.concatenate([rows.T] * (width // CHUNK), axis=1)
