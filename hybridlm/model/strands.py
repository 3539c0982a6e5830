# SPDX-License-Identifier: Apache-2.0
"""Both strands of DNA read by the same weights: what Caduceus calls RCPS (Schiff et al. 2024, arXiv:2403.03234,
section 3.2).

There the channels of the stream are two halves, of which each block reads the second one reversed in tokens and
channels. The halves meet nowhere but in the logits, so here they are two rows: the tokens, and their reverse
complement. What comes out at a token is both vectors there, and the unembedding of the second has its rows exchanged.

Axis letters: B batch, T tokens, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import sharding
from hybridlm.layers.segments import positions_within


def both(tokens_BT, segment_ids, positions, complement: tuple[int, ...], n_vocab: int) -> tuple:
    """(tokens, segment ids, positions) of twice the rows: each, and behind it its reverse complement."""
    partner_V = np.concatenate([np.array(complement, np.int32), np.arange(len(complement), n_vocab, dtype=np.int32)])
    back = jnp.flip(jnp.asarray(partner_V)[tokens_BT], axis=1)
    ids = None if segment_ids is None else jnp.flip(segment_ids, axis=1)
    tokens = _in_turn(tokens_BT, back)
    if positions is not None:
        positions = _in_turn(positions, positions_within(ids, back.shape))
    return tokens, None if ids is None else _in_turn(segment_ids, ids), positions


def side_by_side(x_BTD: jax.Array) -> jax.Array:
    """[B, T, 2 D] of the streams of `both`: of each token the vector of its own strand and that of the other one."""
    x_BsTD = x_BTD.reshape(-1, 2, *x_BTD.shape[1:])
    own, other = x_BsTD[:, 0], jnp.flip(x_BsTD[:, 1], axis=1)
    return sharding.constrain(jnp.concatenate([own, other], axis=-1), *sharding.STREAM)


def unembedding(w_VD: jax.Array, complement: tuple[int, ...]) -> jax.Array:
    """[V, 2 D], which makes of `side_by_side` the sum of the logits of a base and of its partner over there."""
    partner_V = np.concatenate([np.array(complement), np.arange(len(complement), w_VD.shape[0])]).astype(np.int32)
    return jnp.concatenate([w_VD, w_VD[partner_V]], axis=1)


def _in_turn(a_BT: jax.Array, b_BT: jax.Array) -> jax.Array:
    """Rows of both in turn, so that each device keeps its own."""
    return jnp.stack([a_BT, b_BT], axis=1).reshape(2 * a_BT.shape[0], *a_BT.shape[1:])
