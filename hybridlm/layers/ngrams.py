# SPDX-License-Identifier: Apache-2.0
"""N-grams of tokens as rows of tables: the tokens before each, and the published hash of them (Qwen Team 2026).

The hash counts in 64 bits, which JAX has not by default: numbers are pairs of uint32, (high, low).

Axis letters: B batch, T tokens, N size of the longest n-gram, H hashes.
"""

import math
from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm.layers.segments import positions_within

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
"""2 ** 64 over the golden ratio: the step of splitmix64 (Steele, Lea and Flood 2014)."""
_APART = 10_007
"""Between the seeds of one table and the next."""


def multipliers(vocab_size: int, n: int, index: int, seed: int) -> list[int]:
    """Odd numbers, of the token itself and of each before it, that times a token stay below 2 ** 63. index: of the
    table among a model's."""
    bound = max(1, ((1 << 63) - 1) // max(vocab_size, 1) // 2)
    first = seed + _APART * index
    return [2 * (_splitmix(first + _GOLDEN * (i + 1)) % bound) + 1 for i in range(n)]


def _splitmix(value: int) -> int:
    """splitmix64's number behind a state (Steele, Lea and Flood 2014, figure 13)."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@cache
def primes(start: int, first: int, n: int) -> tuple[int, ...]:
    """n primes not below `start`, without the `first` ones of those."""
    found: list[int] = []
    value = start
    while len(found) < first + n:
        if _is_prime(value):
            found.append(value)
        value += 1
    return tuple(found[first:])


def _is_prime(value: int) -> bool:
    return value > 1 and all(value % divisor for divisor in range(2, math.isqrt(value) + 1))


def before(
    tokens_BT: jax.Array, segment_ids_BT: jax.Array | None, recent_BN: jax.Array | None, n: int, gaps: bool
) -> tuple[list[jax.Array], jax.Array]:
    """(of the n - 1 tokens before each the number 1 above it, 0 where its document has none; that of the row's last
    n - 1 real tokens, the last at the right).

    recent_BN: int32 [B, n - 1], the same of the tokens in front of the row; None: it begins here. gaps: whether
    padding may stand between real tokens.
    """
    shape, room = tokens_BT.shape, n - 1
    real_BT = jnp.ones(shape, bool) if segment_ids_BT is None else segment_ids_BT != 0
    within_BT = positions_within(segment_ids_BT, shape)
    index_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    row_BT, continued = tokens_BT + 1, recent_BN is not None
    if gaps and segment_ids_BT is not None:
        order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
        row_BT, index_BT = jnp.take_along_axis(row_BT, order_BT, axis=1), jnp.cumsum(real_BT, axis=1) - real_BT
    recent_BN = jnp.zeros((shape[0], room), jnp.int32) if recent_BN is None else recent_BN
    all_BS = jnp.concatenate([recent_BN, row_BT], axis=1)
    found = []
    for back in range(1, n):
        there_BT = jnp.take_along_axis(all_BS, jnp.maximum(index_BT + room - back, 0), axis=1)
        found.append(there_BT if continued else jnp.where(within_BT >= back, there_BT, 0))
    end_B1 = real_BT.sum(axis=1, keepdims=True, dtype=jnp.int32)
    last_BN = jnp.take_along_axis(all_BS, end_B1 + jnp.arange(room, dtype=jnp.int32)[None], axis=1)
    return found, last_BN


def rows(
    tokens_BT: jax.Array, earlier: Sequence[jax.Array], eos_id: int, factors: Sequence[int], sizes: Sequence[int]
) -> jax.Array:
    """int32 [B, T, H]: of each token the rows of its n-grams, in the table of all hashes one behind the other.

    earlier: as `before` gives them; what stands before an end of text counts as ends of text, as what is not there
    does. factors: of N tokens. sizes: rows of each hash; as many of the 2-gram as of each longer one.
    """
    per_order, found = len(sizes) // (len(factors) - 1), []
    high_BT, low_BT = _times(tokens_BT, factors[0])
    known_BT = jnp.ones(tokens_BT.shape, bool)
    for order, (one_above_BT, factor) in enumerate(zip(earlier, factors[1:], strict=True)):
        token_BT = jnp.where(known_BT & (one_above_BT > 0), one_above_BT - 1, eos_id)
        known_BT = token_BT != eos_id
        of_high_BT, of_low_BT = _times(token_BT, factor)
        high_BT, low_BT = high_BT ^ of_high_BT, low_BT ^ of_low_BT
        at = slice(order * per_order, (order + 1) * per_order)
        found.append(_remainder(high_BT, low_BT, np.array(sizes[at], np.uint32)))
    starts_H = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int32)
    return jnp.concatenate(found, axis=-1).astype(jnp.int32) + starts_H[None, None]


def _times(tokens_BT: jax.Array, factor: int) -> list[jax.Array]:
    """tokens * factor modulo 2 ** 64, (high, low): by digits of 16 bits, whose products fit 32."""
    token = tokens_BT.astype(jnp.uint32)
    x = [token & 0xFFFF, token >> 16]
    y = [np.uint32((factor >> (16 * i)) & 0xFFFF) for i in range(4)]
    digits, carry = [], jnp.zeros_like(token)
    for i in range(4):
        here, above = carry, jnp.zeros_like(token)
        for j in range(min(i + 1, 2)):
            product = x[j] * y[i - j]
            here, above = here + (product & 0xFFFF), above + (product >> 16)
        digits.append(here & 0xFFFF)
        carry = above + (here >> 16)
    return [(digits[3] << 16) | digits[2], (digits[1] << 16) | digits[0]]


def _remainder(high_BT: jax.Array, low_BT: jax.Array, sizes_H: np.ndarray) -> jax.Array:
    """(high * 2 ** 32 + low) modulo each size, uint32 [B, T, H]: by as many bits at once as 32 have room for."""
    bits = 32 - int(sizes_H.max()).bit_length()
    sizes = sizes_H[None, None]
    rest = high_BT[..., None] % sizes
    left = 32
    while left:
        step = min(bits, left)
        left -= step
        digit = (low_BT >> left) & np.uint32((1 << step) - 1)
        rest = ((rest << step) | digit[..., None]) % sizes
    return rest
