# SPDX-License-Identifier: Apache-2.0
"""The gradient of angles that turn B and C of a token and of all tokens behind it, as those of `mamba3` do.

A turn of all tokens from t on changes nothing among them. What it changes is what they read of the state before t:
<R, J S>, with R the gradient of that state and J a quarter turn of a pair of its columns. As a sum over these tokens of
what B and C hand their angles, that is a small rest of much that cancels, and what each token is off by adds up along
the row. So the sum over a span of tokens is set to what the states at its two ends say, or of its first and its last
document each where it has several: what one is off by is no business of the other.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.segments import document_numbers

F32 = jnp.float32
SPAN = 128  # tokens between states that the Hopper kernels keep


@dataclasses.dataclass(frozen=True)
class Turns:
    """Columns of B, C and the states that are turned together: `first + i step` and `second + i step`, i < count."""

    count: int
    first: int
    second: int
    step: int
    alone: int  # so many tokens side by side, 64 or a divisor of it, read nothing of themselves and each other

    def turned(self, grad, array):
        """[..., count]: the derivative of <grad, array> by the angle that turns each pair of the array's columns."""

        def columns(v):
            starts = (self.first, self.second)
            return (v[..., start : start + self.count * self.step : self.step].astype(F32) for start in starts)

        (grad_1, grad_2), (array_1, array_2) = columns(grad), columns(array)
        return grad_2 * array_1 - grad_1 * array_2


def turn_gradients(turns, maps, inner, start, end, segment_ids=None, span: int = SPAN):
    """d loss / d turn ``[B, T, G, count]``; the turn of a token is to be added up over it and all behind it.

    maps: (B, dB), (C, dC), each ``[B, T, G, N]``. inner: states at the start of each span but the first and their
    gradients, ``[B, spans - 1, H, P, N]``; start, end: of the states that enter and leave the row, ``[B, H, P, N]``,
    None for zeros.
    """
    d_turn = sum(turns.turned(grad, array) for array, grad in maps)
    batch, tokens, groups, count = d_turn.shape
    by_span = jnp.pad(d_turn, ((0, 0), (0, -tokens % span), (0, 0), (0, 0))).reshape(batch, -1, span, groups, count)

    def read(state, grad):
        """What a turn of all behind a state changes, ``[B, spans, G, count]``."""
        heads = turns.turned(state, grad).sum(-2)
        return heads.reshape(*heads.shape[:2], groups, heads.shape[2] // groups, count).sum(3)

    none = jnp.zeros_like(by_span[:, :1, 0])
    enters, leaves = (none if pair is None else read(*(v[:, None] for v in pair)) for pair in (start, end))
    read_BSGZ = jnp.concatenate([enters, read(*inner), leaves], axis=1)
    enters, leaves = read_BSGZ[:, :-1], read_BSGZ[:, 1:]
    if segment_ids is None:
        by_span = by_span.at[:, :, 0].add(enters - leaves - by_span.sum(2))
    else:
        documents = jnp.pad(document_numbers(segment_ids), ((0, 0), (0, -tokens % span)), mode="edge")
        documents = documents.reshape(batch, -1, span, 1, 1)
        first, last = documents == documents[:, :, :1], documents == documents[:, :, -1:]
        is_one = first[:, :, -1]
        error = enters - jnp.where(is_one, leaves, 0) - jnp.where(first, by_span, 0).sum(2)
        error_of_last = jnp.where(is_one, 0, -leaves - jnp.where(last, by_span, 0).sum(2))
        begins = last & ~jnp.roll(last, 1, axis=2)  # the last document, where it is not the first
        by_span = by_span.at[:, :, 0].add(error) + jnp.where(begins, error_of_last[:, :, None], 0)
    return by_span.reshape(batch, -1, groups, count)[:, :tokens]
