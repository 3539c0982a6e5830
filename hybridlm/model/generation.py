# SPDX-License-Identifier: Apache-2.0
"""Writing text: prompts are read in pieces, then one token a step is written inside one compiled loop.

Axis letters: B batch, T prompt tokens, N new tokens.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import WHOLE
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.model.arguments import check_number, check_whole, integers, one_of_each_row, rows_of_integers
from hybridlm.model.decoding import CHUNK, Sampling, Writer, room_for
from hybridlm.model.model import HybridLM
from pallas_kernels.platform import memory, memory_of


def generate(
    model: HybridLM,
    tokens_BT: jax.Array | np.ndarray | Sequence[Sequence[int]],
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    lengths: jax.Array | np.ndarray | Sequence[int] | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: jax.Array | None = None,
    *,
    seed: int = 0,
    prefill_chunk: int | None = CHUNK,
    cache_types: CacheTypes = AS_COMPUTED,
) -> jax.Array:
    """The next `max_new_tokens` tokens of each row, int32 [B, N].

    Args:
      tokens_BT: prompts, integers [B, T]; rows of different lengths are padded on the right, see `lengths`. Lists of
        different lengths say them themselves.
      temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
      top_k: draw from the k likeliest tokens only.
      top_p: draw, after top_k, from the fewest likeliest tokens whose probabilities add up to this.
      lengths: real tokens of each row, [B], each 1..T; None: T.
      eos_id: a row that writes it (one of them) is done and filled up with it; the loop ends when all are.
      key: jax.random.key, of what is drawn; None: that of `seed`.
      seed: integer; the same one gives the same tokens.
      prefill_chunk: tokens of a prompt that are read at once: beside the cache, memory grows with them instead of the
        prompt; None: all of it. What is written does not depend on it beyond float32 rounding.
      cache_types: how the cache is stored, `hybridlm.CacheTypes(keys="int8", states="bfloat16")`: smaller, and what is
        written may differ.

    Where a mesh is set, the cache is split over it as the model is: rows, heads and channels.
    The number of compiled programs does not grow with the number of prompt lengths: they are rounded up inside. Raises
    ValueError for arguments out of range, for a bidirectional model and for more new tokens than memory can hold,
    TypeError for tokens that are not integers.
    """
    prompts_BT, lengths_B = check_prompt(model, tokens_BT, lengths)
    how = sampling(temperature, top_k, top_p, eos_id, seed, key)
    check_counts(max_new_tokens, prefill_chunk)
    batch, tokens = prompts_BT.shape
    check_room(model, batch, tokens, max_new_tokens, types=cache_types)
    writer = Writer(model, prefill_chunk, cache_types)
    state = writer.start(batch, tokens + max_new_tokens)
    return writer.write(writer.read(state, prompts_BT, lengths_B), max_new_tokens, how)[0]


def check_prompt(model: HybridLM, tokens_BT, lengths=None) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, T], int32 [B]) of prompts as `generate` takes them; its errors. model: may be abstract."""
    ahead = model.config.sees_ahead
    require(not ahead, f"the model cannot be decoded token by token: {ahead}")
    if lengths is None and isinstance(tokens_BT, list | tuple) and len({np.size(row) for row in tokens_BT}) > 1:
        tokens_BT, lengths = _padded(tokens_BT)
    tokens_BT = rows_of_integers("tokens_BT", tokens_BT)
    batch, tokens = tokens_BT.shape
    lengths_B = np.full((batch,), tokens) if lengths is None else one_of_each_row("lengths", lengths, batch)
    if lengths_B.min() < 1 or lengths_B.max() > tokens:
        raise ValueError(
            f"lengths ({lengths_B.min()}..{lengths_B.max()}) must be in 1..{tokens}, the width of tokens_BT"
        )
    lowest, highest = tokens_BT.min(), tokens_BT.max()
    if lowest < 0 or highest >= model.config.vocab_size:
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"tokens_BT holds {bad}, outside of vocab_size ({model.config.vocab_size})")
    return tokens_BT.astype(np.int32), lengths_B.astype(np.int32)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as an array, padded on the right, and their lengths."""
    arrays = [np.asarray(row) for row in rows]
    for i, row in enumerate(arrays):
        if row.ndim != 1 or not row.size:
            raise ValueError(f"tokens_BT[{i}] must be a list of tokens, not empty, not of shape {row.shape}")
        if not np.issubdtype(row.dtype, np.integer):
            raise TypeError(f"tokens_BT[{i}] ({row.dtype}) must be of an integer type")
    lengths_B = np.array([row.size for row in arrays])
    return np.stack([np.pad(row, (0, lengths_B.max() - row.size)) for row in arrays]), lengths_B


def sampling(
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    seed: int = 0,
    key: jax.Array | None = None,
) -> Sampling:
    """How tokens are chosen; arguments and errors of `generate`."""
    check_number("temperature", temperature)
    check_whole("top_k", top_k)
    check_number("top_p", top_p)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature ({temperature}) must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k ({top_k}) must be positive")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p ({top_p}) must be in (0, 1]")
    if not isinstance(seed, int | np.integer) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed ({seed}) must be a whole number of 64 bits")
    eos_ids = () if eos_id is None or np.size(eos_id) == 0 else tuple(integers("eos_id", np.ravel(eos_id)).tolist())
    return Sampling(temperature, top_k, top_p, eos_ids, int(seed), key)


def check_counts(max_new_tokens: int, prefill_chunk: int | None) -> None:
    """ValueError where they are not positive."""
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("prefill_chunk", prefill_chunk)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be positive")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk ({prefill_chunk}) must be positive, or None for the whole prompt at once")


def check_room(
    model: HybridLM, batch: int, tokens: int, max_new_tokens: int, argument: str = "max_new_tokens",
    types: CacheTypes = AS_COMPUTED,
) -> None:  # fmt: skip
    """ConfigError where memory, that of all devices of a mesh that is set, cannot hold so many new tokens of each row,
    and what the model keeps of them.

    model: may be abstract. tokens: width of the prompts. argument: what the message calls max_new_tokens.
    """
    mesh = sharding.mesh_in_force()
    limit = memory() if mesh is None else memory_of(mesh.devices.flat)
    longest = WHOLE - tokens  # positions are int32
    require(max_new_tokens <= longest, f"{argument} ({max_new_tokens}) must be at most {longest}")
    graphdef, params = nnx.split(model)
    cache = jax.eval_shape(
        lambda p: nnx.merge(graphdef, p).init_cache(batch, room_for(tokens + max_new_tokens), types), params
    )
    n_bytes = 4 * batch * max_new_tokens + sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))
    require(
        limit is None or n_bytes <= limit,
        f"{argument} ({max_new_tokens}) needs {n_bytes / 2**30:,.1f} GiB for the tokens and the model's cache, where "
        f"{(limit or 0) / 2**30:,.1f} GiB are there: lower it",
    )
