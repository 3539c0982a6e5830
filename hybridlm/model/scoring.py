# SPDX-License-Identifier: Apache-2.0
"""Scoring texts behind what a `decoding.Writer` has read: log-likelihoods of continuations, piece by piece.

Axis letters: B rows, K tokens of continuations, D model, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hybridlm.model.decoding import State, Writer, piece_size, pieces_of

LOGITS_TOKENS = 64
"""Positions of a row whose logits are in memory at once."""


class Scored(NamedTuple):
    """Of each row's continuation, [B] each."""

    nats: np.ndarray
    """Its log-likelihood."""
    likeliest: np.ndarray
    """Whether each of its tokens is the likeliest."""


def score(writer: Writer, state: State, tokens_BK: np.ndarray, lengths_B: np.ndarray) -> Scored:
    """What the model makes of continuations of a state's rows. The state is not consumed, so that others can follow it.

    tokens_BK: int32; lengths_B: how many of each row are real, from the left, 0 for none. They are read in pieces, of
    which each needs as much memory: see `Writer`. The state's cache has to have room for them (`Writer.start`).
    """
    longest = int(lengths_B.max())
    size = 1 if longest == 1 else piece_size(longest, writer.prefill_chunk)
    pieces = pieces_of(tokens_BK, lengths_B, size)
    cache, x_BD = state.cache, state.x_BD
    found: list[tuple[jax.Array, jax.Array]] = []
    for number, (piece_BK, left_B) in enumerate(pieces):
        goes_on = number + 1 < len(pieces)
        step = _donating if number and goes_on else _keeping
        of_piece, cache, x_BD = step(cache, x_BD, *writer.parts, piece_BK, left_B, goes_on)
        found.append(of_piece)
    nats, likeliest = zip(*jax.device_get(found), strict=True)
    return Scored(np.sum(nats, axis=0), np.all(likeliest, axis=0))


def _scored(cache, x_BD, graphdef, params, tokens_BK, lengths_B, goes_on: bool) -> tuple:
    """((nats [B], likeliest [B]) of the next tokens of each row, and where more follow the cache and the hidden vector
    behind them)."""
    model = nnx.merge(graphdef, params)
    real_BK = jnp.arange(tokens_BK.shape[1])[None] < lengths_B[:, None]
    x_BKD = x_BD[:, None]
    if goes_on or tokens_BK.shape[1] > 1:
        y_BKD, cache = model.extend_hidden(tokens_BK, cache, real_BK.astype(jnp.int32))
        x_BKD = jnp.concatenate([x_BKD, y_BKD[:, :-1]], axis=1)
        last_BD = jnp.take_along_axis(y_BKD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]
        x_BD = jnp.where(lengths_B[:, None] > 0, last_BD, x_BD)

    def part(total, at):
        x_BCD, token_BC, real_BC = at
        logits_BCV = model.logits(x_BCD)
        chosen_BC = jnp.take_along_axis(logits_BCV, token_BC[..., None], axis=-1)[..., 0]
        nats_BC = jnp.where(real_BC, chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1), 0.0)
        is_likeliest_BC = (jnp.argmax(logits_BCV, axis=-1) == token_BC) | ~real_BC
        return (total[0] + nats_BC.sum(-1), total[1] & is_likeliest_BC.all(-1)), None

    batch, width = tokens_BK.shape
    n = LOGITS_TOKENS if width % LOGITS_TOKENS == 0 else width  # a piece of another size is a small one
    parts = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(batch, width // n, n, *a.shape[2:]), 1, 0), (x_BKD, tokens_BK, real_BK)
    )
    start = jnp.zeros((batch,), jnp.float32), jnp.ones((batch,), bool)
    found = lax.scan(part, start, parts)[0]
    return (found, cache, x_BD) if goes_on else (found, None, None)


_keeping = jax.jit(_scored, static_argnums=(2, 6))
"""Of the first piece, whose cache others follow, too, and of the last, behind which there is none."""
_donating = jax.jit(_scored, static_argnums=(2, 6), donate_argnums=0)
"""Of those between, whose cache is nobody else's."""
