# SPDX-License-Identifier: Apache-2.0
"""What mixers with a state of fixed size have in common: `mix = recurrent.mix; extend = recurrent.extend`.

Such a mixer has two methods. `_run(x_BTD, tokens, old)` computes all tokens in parallel from the cache `old`, and gives
(y_BTD, the new cache); old is None for documents from their start, and then the new cache does not matter.
`_step(x_B1D, old)` computes one token. A mixer without it has `extend = recurrent.extend_run`: its `_run` serves one
token as well, as the op goes through one token by its recurrence (`ops.implementation`), and may read positions.

Axis letters: B batch, T tokens, D model.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from hybridlm.layers import cache as caches
from hybridlm.layers import inspection
from hybridlm.layers.block import Output, Tokens
from hybridlm.layers.segments import positions_within


def mix(mixer, x_BTD: jax.Array, tokens: Tokens) -> Output:
    """[B, T, D] -> [B, T, D] in `dtype`; positions do not matter."""
    return Output(mixer._run(x_BTD, tokens, None)[0])


def state_norm(mixer, x_BTD: jax.Array, tokens: Tokens, name: str = "state") -> dict[str, jax.Array]:
    """The norm of an array of the cache behind the last token of a row, for `inspect` of such a mixer."""
    return inspection.state_norms(last(mixer, x_BTD, tokens)[name])


def last(mixer, x_BTD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
    """The cache behind the last token of each row, for `inspect` of such a mixer."""
    tokens = replace(tokens, positions=positions_within(tokens.segment_ids, x_BTD.shape[:2]))
    return mixer._run(x_BTD, tokens, mixer.init_cache(x_BTD.shape[0], 0))[1]


def extend(
    mixer, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
) -> tuple[jax.Array, dict]:
    """Outputs of the next T tokens and the cache after them; see `block.Mixer`."""
    old = caches.read_all(cache, layer)
    if x_BTD.shape[1] == 1:
        y_BTD, new = mixer._step(x_BTD, old)
        new = caches.unless_padding(real_BT, new, old)
    else:
        ids = None if real_BT is None else real_BT.astype(jnp.int32)
        y_BTD, new = mixer._run(x_BTD, Tokens(ids, gaps=gaps), old)
    return y_BTD, caches.write_all(cache, layer, new)


def extend_run(
    mixer, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
) -> tuple[jax.Array, dict]:
    """Outputs of the next T tokens and the cache after them, by `_run` alone; see `block.Mixer`."""
    tokens = tokens_behind(x_BTD, length_B, real_BT, gaps)
    y_BTD, new = mixer._run(x_BTD, tokens, caches.read_all(cache, layer))
    return y_BTD, caches.write_all(cache, layer, new)


def tokens_behind(x_BTD: jax.Array, length_B, real_BT, gaps: bool) -> Tokens:
    """What is known of tokens that stand behind length_B others of their row's one document."""
    ids, index_BT = None, jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
    if real_BT is not None:
        ids = real_BT.astype(jnp.int32)
        index_BT = jnp.cumsum(ids, axis=1) - ids
    return Tokens(ids, length_B[:, None] + index_BT, gaps=gaps)
