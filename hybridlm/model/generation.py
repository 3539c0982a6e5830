# SPDX-License-Identifier: Apache-2.0
"""Writing text: the prompt in parallel, then one token a step inside one compiled loop.

Axis letters: B batch, T prompt tokens, N new tokens, V vocabulary.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm.errors import require
from hybridlm.fields import WHOLE
from hybridlm.layers.params import in_type, param_info
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import Cache, HybridLM
from pallas_kernels.platform import memory


def generate(
    model: HybridLM,
    tokens_BT: jax.Array,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    lengths: jax.Array | None = None,
    eos_id: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The next `max_new_tokens` tokens of each row, int32 [B, N].

    Args:
      tokens_BT: prompts, integers [B, T]; rows of different lengths are padded on the right, see `lengths`.
      temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
      top_k: draw from the k likeliest tokens only.
      top_p: draw, after top_k, from the fewest likeliest tokens whose probabilities add up to this.
      lengths: real tokens of each row, [B], each 1..T; None: T.
      eos_id: a row that writes it is done and filled up with it; the loop ends when all are.
      key: jax.random.key, needed where temperature > 0.

    The number of compiled programs does not grow with the number of prompt lengths: they are rounded up inside. Raises
    ValueError for arguments out of range and for more new tokens than memory can hold, TypeError for tokens that are
    not integers.
    """
    tokens_BT, lengths_B = _check_prompt(model, tokens_BT, lengths)
    _check_sampling(max_new_tokens, temperature, top_k, top_p, key)
    padded = _round_up(tokens_BT.shape[1])
    tokens_BT = np.pad(tokens_BT, ((0, 0), (0, padded - tokens_BT.shape[1])))
    check_room(model, *tokens_BT.shape, max_new_tokens)
    graphdef, params = nnx.split(model)
    x_BD, cache = _prefill(graphdef, params, tokens_BT, lengths_B, padded + max_new_tokens)
    key = jax.random.key(0) if key is None else key
    greedy = temperature == 0
    return _decode(cache, graphdef, params, x_BD, key, temperature, top_p, max_new_tokens, greedy, top_k, eos_id)[0]


@partial(jax.jit, static_argnums=(0, 4))
def _prefill(graphdef, params, tokens_BT, lengths_B, max_len: int) -> tuple[jax.Array, Cache]:
    """Hidden vector [B, D] of each row's last token, and the cache after it."""
    model = nnx.merge(graphdef, params)
    real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    cache = model.init_cache(tokens_BT.shape[0], max_len)
    x_BTD, cache = model.extend_hidden(tokens_BT, cache, real_BT.astype(jnp.int32))
    return jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0], cache


@partial(jax.jit, static_argnums=(1, 7, 8, 9, 10), donate_argnums=0)
def _decode(cache, graphdef, params, x_BD, key, temperature, top_p, n_new: int, greedy: bool, top_k, eos_id):
    """The loop; each step draws a token of the logits at hand and reads it into the (donated) cache."""
    config = nnx.merge(graphdef, params).config
    model = nnx.merge(graphdef, _in_compute_dtype(params, config)).stacked()
    batch = x_BD.shape[0]
    fill = 0 if eos_id is None else eos_id

    def step(carry):
        i, x_BD, cache, done_B, out_BN = carry
        logits_BV = model.logits(x_BD)
        if greedy:
            token_B = jnp.argmax(logits_BV, axis=-1)
        else:
            logits_BV = _filtered(logits_BV / temperature, top_k, top_p)
            token_B = jax.random.categorical(jax.random.fold_in(key, i), logits_BV)
        token_B = jnp.where(done_B, fill, token_B.astype(jnp.int32))
        out_BN = out_BN.at[:, i].set(token_B)
        if eos_id is not None:
            done_B |= token_B == eos_id
        x_B1D, cache = model.extend_hidden(token_B[:, None], cache)
        return i + 1, x_B1D[:, 0], cache, done_B, out_BN

    def going(carry):
        i, _, _, done_B, _ = carry
        return (i < n_new) & ~done_B.all()

    start = (jnp.int32(0), x_BD, cache, jnp.zeros((batch,), bool), jnp.full((batch, n_new), fill, jnp.int32))
    _, _, cache, _, out_BN = jax.lax.while_loop(going, step, start)
    return out_BN, cache


def _filtered(logits_BV: jax.Array, top_k: int | None, top_p: jax.Array | None) -> jax.Array:
    """Logits with -inf for the tokens that top_k and then top_p exclude."""
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def _in_compute_dtype(params, config: ModelConfig):
    """Matrices and embeddings cast once instead of in every step; the same numbers, as each use would cast them."""
    info = param_info(params)
    cast = in_type(params, info, config.compute_dtype)
    if config.embedding_multiplier != 1:
        return cast
    return jax.tree.map(lambda a, leaf: a.astype(config.compute_dtype) if leaf.kind == "embedding" else a, cast, info)


def _check_prompt(model: HybridLM, tokens_BT, lengths) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.asarray(tokens_BT)
    if tokens_BT.ndim != 2 or 0 in tokens_BT.shape:
        raise ValueError(f"tokens_BT must be [batch, tokens], neither empty, not of shape {tokens_BT.shape}")
    if not np.issubdtype(tokens_BT.dtype, np.integer):
        raise TypeError(f"tokens_BT ({tokens_BT.dtype}) must be of an integer type")
    lowest, highest = tokens_BT.min(), tokens_BT.max()
    if lowest < 0 or highest >= model.config.vocab_size:
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"tokens_BT holds {bad}, outside of vocab_size ({model.config.vocab_size})")
    batch, tokens = tokens_BT.shape
    lengths_B = np.full((batch,), tokens) if lengths is None else np.asarray(lengths)
    if lengths_B.shape != (batch,):
        raise ValueError(f"lengths {lengths_B.shape} must have one entry for each of {batch} rows")
    if lengths_B.min() < 1 or lengths_B.max() > tokens:
        raise ValueError(
            f"lengths ({lengths_B.min()}..{lengths_B.max()}) must be in 1..{tokens}, the width of tokens_BT"
        )
    return tokens_BT.astype(np.int32), lengths_B.astype(np.int32)


def _check_sampling(max_new_tokens, temperature, top_k, top_p, key) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be positive")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature ({temperature}) must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k ({top_k}) must be positive")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p ({top_p}) must be in (0, 1]")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature ({temperature}) is above 0: it needs a key (jax.random.key)")


def check_room(model: HybridLM, batch: int, tokens: int, max_new_tokens: int, argument: str = "max_new_tokens") -> None:
    """ConfigError where memory cannot hold so many new tokens of each row, and what the model keeps of them.

    model: may be abstract. tokens: width of the prompts. argument: what the message calls max_new_tokens.
    """
    padded, limit = _round_up(tokens), memory()
    longest = WHOLE - padded  # positions are int32
    require(max_new_tokens <= longest, f"{argument} ({max_new_tokens}) must be at most {longest}")
    graphdef, params = nnx.split(model)
    cache = jax.eval_shape(lambda p: nnx.merge(graphdef, p).init_cache(batch, padded + max_new_tokens), params)
    n_bytes = 4 * batch * max_new_tokens + sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(cache))
    require(
        limit is None or n_bytes <= limit,
        f"{argument} ({max_new_tokens}) needs {n_bytes / 2**30:,.1f} GiB for the tokens and the model's cache, where "
        f"{(limit or 0) / 2**30:,.1f} GiB are there: lower it",
    )


def _round_up(n: int) -> int:
    """The next power of two, from 16 to 512; above, the next multiple of 512."""
    return max(16, 1 << (n - 1).bit_length()) if n <= 512 else -(-n // 512) * 512
