# SPDX-License-Identifier: Apache-2.0
"""Reading prompts and writing tokens piece by piece: what `generate`, streams and conversations are made of.

Few programs are compiled, whatever the lengths: prompts are read in pieces of fixed sizes, tokens are written by one
loop of up to BLOCK steps, and caches have room for 1, 1.25, 1.5 or 1.75 times a power of two.

Axis letters: B batch, T prompt tokens, N new tokens, V vocabulary.
"""

import functools
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm import sharding
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.layers.params import in_type, param_info
from hybridlm.model.config import ModelConfig, QuantizeConfig
from hybridlm.model.model import Cache, HybridLM
from hybridlm.model.quantize import of_run
from pallas_kernels.platform import platform

CHUNK = 1024
"""Tokens of a prompt that are read at once: what is needed beside the cache grows with them, not with the prompt."""
BLOCK = 64
"""Tokens that are written at most without the host."""
NOT_ROUNDED = QuantizeConfig()
OPTIONS: dict[str, dict[str, Any]] = {
    "gpu": {
        "xla_gpu_enable_command_buffer": ",".join(
            ("FUSION", "CUBLAS", "CUBLASLT", "CUSTOM_CALL", "CUDNN", "DYNAMIC_SLICE_FUSION", "WHILE", "CONDITIONAL")
        ),
        "xla_gpu_graph_min_graph_size": 1,
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    }
}
"""Of XLA for the program that writes, by platform: on a GPU the whole loop is one graph, whose small kernels run beside
each other where they can."""
UNROLL = {"gpu": 64}
"""`model.unroll` where it is None: on a GPU matrices of a stack would be copied out of it for each token, and states
copied in."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest; above, tokens are drawn from softmax(logits / temperature)."""
    top_k: int | None = None
    """Draw from the k likeliest only."""
    top_p: float | None = None
    """Draw, after top_k, from the fewest likeliest whose probabilities add up to this."""
    eos_ids: tuple[int, ...] = ()
    """A row that writes one of them is done, and repeats it."""
    seed: int = 0
    """Of the choices, where no key is given."""
    key: jax.Array | None = None
    """jax.random.key."""


@dataclass(frozen=True)
class State:
    """Rows that were read so far. `Writer.read` and `Writer.write` consume it and give the next."""

    cache: Cache
    x_BD: jax.Array
    """Hidden vector of each row's last token."""
    done_B: jax.Array | np.ndarray
    last_B: jax.Array | np.ndarray
    """The last token that was written."""
    length: int
    """Tokens of the longest row, at most."""
    room: int
    """Tokens that the cache was made for."""
    drawn: int = 0
    """Tokens that were written of each row: what the next choice is drawn with."""

    def copy(self) -> "State":
        """The same, which survives that the other is consumed."""
        cache, x_BD, done_B, last_B = jax.tree.map(jnp.copy, (self.cache, self.x_BD, self.done_B, self.last_B))
        return State(cache, x_BD, done_B, last_B, self.length, self.room, self.drawn)

    @property
    def is_whole(self) -> bool:
        """Whether it was not consumed, not even by a call that was interrupted."""
        return not any(isinstance(a, jax.Array) and a.is_deleted() for a in jax.tree.leaves((self.cache, self.x_BD)))

    def continued(self, drawn: int) -> "State":
        """The same, whose next choice is drawn as that behind `drawn` others."""
        return replace(self, drawn=drawn)


class Writer:
    """A model made ready to write: its parameters are cast and laid out once, not in every step."""

    def __init__(self, model: HybridLM, prefill_chunk: int | None = CHUNK, types: CacheTypes = AS_COMPUTED):
        """prefill_chunk: tokens of a prompt that are read at once; None: all. types: how caches are stored. Where a
        mesh is set, caches are split over it from the start: rows, heads and channels."""
        graphdef, params = nnx.split(model)
        self.config, self.prefill_chunk, self.types = model.config, prefill_chunk, types
        self._graphdef, self._params = _prepared(graphdef, params, UNROLL.get(platform()))

    @property
    def parts(self) -> tuple:
        """(graph definition, parameters) as programs of one's own read them, see `scoring`."""
        return self._graphdef, self._params

    @property
    def prepared(self) -> tuple[nnx.GraphDef, nnx.State]:
        """(graphdef, parameters) of the model as programs read it: stacked, in the types in which each is used."""
        return self._graphdef, self._params

    def start(self, batch: int, room: int) -> State:
        """Rows of which nothing was read. room: tokens that they will have; more makes their caches grow."""
        room = room_for(room)
        cache, x_BD, done_B, last_B = _empty(self._graphdef, self._params, batch, room, self.types)
        return State(cache, x_BD, done_B, last_B, 0, room)

    def read(self, state: State, tokens_BT: np.ndarray, lengths_B: np.ndarray) -> State:
        """Rows with the next tokens of each. tokens_BT: int32; lengths_B: how many of each row are real, from the left,
        0 for none. What was written last and whether rows are done is forgotten."""
        n_tokens, longest = tokens_BT.shape[1], int(lengths_B.max())
        state = self._with_room(state, longest)
        size = piece_size(n_tokens, self.prefill_chunk)
        cache, x_BD = state.cache, state.x_BD
        for piece_BT, left_B in pieces_of(tokens_BT, lengths_B, size):
            cache, x_BD, done_B, last_B = _read(cache, x_BD, self._graphdef, self._params, piece_BT, left_B)
        return State(cache, x_BD, done_B, last_B, state.length + longest, state.room, state.drawn)

    def write(
        self, state: State, n_new: int, how: Sampling, done_B: np.ndarray | None = None
    ) -> tuple[jax.Array, State]:
        """(int32 [B, N] the next tokens of each row, rows with them read). done_B: rows that are ended from outside."""
        state = self._with_room(state, n_new)
        if done_B is not None:
            state = replace(state, done_B=state.done_B | done_B)
        key = jax.random.key(how.seed) if how.key is None else how.key
        options = how.temperature, how.top_p, np.array(how.eos_ids or (-1,), np.int32)
        cache, arrays, out = state.cache, (state.x_BD, state.done_B, state.last_B), []
        for first in range(0, n_new, BLOCK):
            n = min(BLOCK, n_new - first)
            at = np.int32(state.drawn + first), np.int32(n)
            out_BN, cache, *arrays = writing(platform())(
                cache, self._graphdef, self._params, *arrays, key, *at, *options, how.temperature == 0, how.top_k
            )
            out.append(out_BN if n == BLOCK else out_BN[:, :n])
        state = State(cache, *arrays, state.length + n_new, state.room, state.drawn + n_new)
        return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1), state

    def _with_room(self, state: State, more: int) -> State:
        """Rows whose caches hold that many tokens more."""
        return self.with_room(state, state.length + more)

    def with_room(self, state: State, n: int) -> State:
        """Rows whose caches hold n tokens in all; the state is not consumed where they do not."""
        if n <= state.room:
            return state
        room = room_for(n)
        return replace(state, cache=_grown(state.cache, self._graphdef, self._params, room, self.types), room=room)


def room_for(n: int) -> int:
    """The room of a cache for n tokens: the next multiple of 32; above 256, of an eighth of the next power of two."""
    step = max(32, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def piece_size(n_tokens: int, prefill_chunk: int | None = CHUNK) -> int:
    """Tokens that are read at once of a prompt of n: a power of two from 16 to 512 that holds it, a multiple of 512
    above, and never more than prefill_chunk."""
    n = max(16, 1 << max(0, n_tokens - 1).bit_length()) if n_tokens <= 512 else -(-n_tokens // 512) * 512
    return n if prefill_chunk is None else min(n, prefill_chunk)


def pieces_of(tokens_BT: np.ndarray, lengths_B: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(int32 [B, size] the next tokens of each row, int32 [B] how many of them are real) for as many pieces as the
    longest row has, at least one. lengths_B: how many of each row are real, from the left."""
    n_tokens, stop = tokens_BT.shape[1], max(1, -(-int(lengths_B.max()) // size)) * size
    tokens_BT = np.pad(tokens_BT, ((0, 0), (0, max(0, stop - n_tokens))))
    return [
        (
            np.ascontiguousarray(tokens_BT[:, start : start + size], np.int32),
            np.clip(lengths_B - start, 0, size).astype(np.int32),
        )
        for start in range(0, stop, size)
    ]


@partial(jax.jit, static_argnums=(0, 2))
def _prepared(graphdef, params, unroll: int | None = None):
    """The model as the program reads it, split, matrices and embeddings cast; the same numbers, as each use would cast
    them. unroll: `model.unroll` where the config says nothing."""
    config = nnx.merge(graphdef, params).config
    info = param_info(params)
    cast = in_type(params, info, config.compute_dtype)
    if config.embedding_multiplier == 1:
        embedded = lambda a, leaf: a.astype(config.compute_dtype) if leaf.kind == "embedding" else a
        cast = jax.tree.map(embedded, cast, info)
    model = nnx.merge(graphdef, cast)
    if not model.is_stacked:
        model.config = replace(config, unroll=unroll if config.unroll is None else config.unroll)
        model = model.stacked()
    return nnx.split(model)


@partial(jax.jit, static_argnums=(0, 2, 3, 4), keep_unused=True)
def _empty(graphdef, params, batch: int, room: int, types: CacheTypes) -> tuple:
    """(cache, x_BD, done_B, last_B) of rows of which nothing was read; where the parameters are, for a program is
    compiled anew for arrays that are bound to a device and for those that are not."""
    model = nnx.merge(graphdef, params)
    x_BD = sharding.zeros((batch, model.unembedding().shape[-1]), model.config.compute_dtype, ("batch", None))
    done_B, last_B = (sharding.zeros((batch,), dtype, ("batch",)) for dtype in (bool, jnp.int32))
    return model.init_cache(batch, room, types), x_BD, done_B, last_B


@partial(jax.jit, static_argnums=2, donate_argnums=(0, 1))
def _read(cache, x_BD, graphdef, params, tokens_BT, lengths_B) -> tuple:
    """(cache, x_BD, done_B, last_B) after the first `lengths_B` tokens of each row."""
    cache, x_BD = read_piece(nnx.merge(graphdef, params), cache, x_BD, tokens_BT, lengths_B)
    return cache, x_BD, jnp.zeros(x_BD.shape[:1], bool), jnp.zeros(x_BD.shape[:1], jnp.int32)


def read_piece(model: HybridLM, cache: Cache, x_BD: jax.Array, tokens_BT: jax.Array, lengths_B: jax.Array) -> tuple:
    """(cache, hidden vector of each row's last token) after the first `lengths_B` of these tokens of each row; a row
    without any keeps its x_BD."""
    real_BT = jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None]
    x_BTD, cache = model.extend_hidden(tokens_BT, cache, real_BT.astype(jnp.int32))
    last_BD = jnp.take_along_axis(x_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where(lengths_B[:, None] > 0, last_BD, x_BD)


def _write(
    cache, graphdef, params, x_BD, done_B, last_B, key, first, n_new, temperature, top_p, eos_E, greedy: bool, top_k
):  # fmt: skip
    """(tokens [B, BLOCK] of which the first n_new count, cache, x_BD, done_B, last_B) after up to n_new steps; each
    draws a token of the logits at hand and reads it into the (donated) cache. first: number of the first choice."""
    model = nnx.merge(graphdef, params)

    def step(carry):
        i, x_BD, cache, done_B, last_B, out_BN = carry
        logits_BV = model.logits(x_BD)
        if greedy:
            token_B = jnp.argmax(logits_BV, axis=-1)
        else:
            logits_BV = filtered(logits_BV / temperature, top_k, top_p)
            token_B = jax.random.categorical(jax.random.fold_in(key, first + i), logits_BV)
        token_B = jnp.where(done_B, last_B, token_B.astype(jnp.int32))
        out_BN = out_BN.at[:, i].set(token_B)
        done_B |= (token_B[:, None] == eos_E[None]).any(axis=1)
        x_B1D, cache = model.extend_hidden(token_B[:, None], cache)
        return i + 1, x_B1D[:, 0], cache, done_B, token_B, out_BN

    def going(carry):
        i, _, _, done_B, _, _ = carry
        return (i < n_new) & ~done_B.all()

    out_BN = jnp.zeros((x_BD.shape[0], BLOCK), jnp.int32)
    start = (jnp.int32(0), x_BD, cache, done_B, last_B, out_BN)
    i, x_BD, cache, done_B, last_B, out_BN = jax.lax.while_loop(going, step, start)
    out_BN = jnp.where(jnp.arange(BLOCK)[None] < i, out_BN, last_B[:, None])
    return out_BN, cache, x_BD, done_B, last_B


@functools.cache
def writing(kind: str) -> jax.stages.Wrapped:
    """`_write` as it is compiled for a platform."""
    return jax.jit(_write, static_argnums=(1, 12, 13), donate_argnums=0, compiler_options=OPTIONS.get(kind))


def filtered(logits_BV: jax.Array, top_k: int | None, top_p: jax.Array | None) -> jax.Array:
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


def _grown(cache: Cache, graphdef, params, room: int, types: CacheTypes) -> Cache:
    """The cache with room for more tokens: behind what it holds, which was never more than its room, so that no ring
    has begun anew."""
    batch = cache.length_B.shape[0]
    wanted = jax.eval_shape(lambda p: nnx.merge(graphdef, p).init_cache(batch, room, types), params)

    def widen(array, like):
        if array.shape == like.shape:
            return array
        return jnp.pad(array, [(0, more - n) for n, more in zip(array.shape, like.shape, strict=True)])

    groups = jax.tree.map(widen, cache.groups, wanted.groups)
    return Cache(cache.length_B, groups, wanted.limit)


def shapes_at_work(config: ModelConfig, rounding: QuantizeConfig = NOT_ROUNDED) -> nnx.State:
    """Shapes and types of the parameters of a config's model as a Writer holds them, by the sublayers of its program;
    nothing is made. rounding: of matrices in eight bits."""
    graphdef, params = nnx.split(of_run(config, rounding).model())
    return jax.eval_shape(partial(_prepared, graphdef), params)[1]
