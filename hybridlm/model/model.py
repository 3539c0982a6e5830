# SPDX-License-Identifier: Apache-2.0
"""HybridLM: embedding, nested loops over pre-norm residual sublayers, final norm, unembedding.

Axis letters: B batch, T tokens, D model, V vocabulary, L depths of a sublayer of the program.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.layers import params, vocabulary
from hybridlm.layers.block import Tokens, shares
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes, Layout
from hybridlm.layers.params import ParamInfo, param_info
from hybridlm.layers.segments import padding_last, positions_within, room_in_front
from hybridlm.model import depth, pattern, remat, stacks, strands
from hybridlm.model.config import ModelConfig
from hybridlm.model.statistics import kind_of
from hybridlm.model.sublayer import ChannelScales, Sublayer, last_norm, make_options, stream_norm
from pallas_kernels.checks import AnyArray, check_array, check_shape, rank
from pallas_kernels.segments import document_ids

__all__ = ["Cache", "HybridLM", "ParamInfo", "Sublayer", "param_info"]


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """What a model remembers of the tokens it has read; made by `HybridLM.init_cache`, a pytree."""

    length_B: jax.Array
    """int32 [B]: tokens read of each row, prefix tokens included."""
    groups: list[list]
    """Of each loop of the program, of each of its sublayers: what its mixer remembers, arrays [L, B, ...]."""
    limit: int | None = field(default=None, metadata={"static": True})
    """Tokens that a row can have, prefix tokens included; None: any number, as no sublayer's cache grows."""


class HybridLM(nnx.Module):
    """A language model from a pattern string: `HybridLM(config, rngs=nnx.Rngs(0))(tokens_BT) -> logits_BTV`.

    Sublayers live in `groups[g][position]`, a Sublayer whose parameters have a leading axis over the repeats of group
    g; `pattern.places(config.pattern)` says where each symbol of the pattern is. They are run as `pattern.loops` says,
    for which every call stacks them anew, see `stacked`. What the depths of a symbol share lives in `shared[symbol]`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """ConfigError for an unknown remat policy."""
        remat.check(config.remat, config.blocks.values())
        self.config, self.source, self.is_stacked = config, None, False
        V, D, std = config.vocab_size, config.d_model, config.init_std
        key = rngs.params
        self.embedding = params.make(std * jax.random.normal(key(), (V, D)), ("vocab", "d_model"), "embedding")
        self.groups = _build_groups(config, key())
        blocks: dict[str, Any] = config.blocks
        self.shared: Any = nnx.Dict(
            {
                symbol: block.build_shared(D, make_options(config, nnx.Rngs(key())))
                for symbol, block in blocks.items()
                if shares(block) and symbol in config.pattern
            }
        )
        self.embedding_scales = ChannelScales(D, 1) if config.channel_scales else None
        self.embedding_norm = stream_norm(config, inside=False) if config.embedding_norm else None
        self.norm = last_norm(config, key)
        if config.tie_embeddings:
            self.output = None
        else:
            self.output = params.make(std * jax.random.normal(key(), (V, D)), ("vocab", "d_model"), "embedding")
        self.prefix: nnx.Param | None
        if config.prefix_tokens:
            drawn = std * jax.random.normal(key(), (config.prefix_tokens, D))
            self.prefix = params.make(drawn, (None, "d_model"), "embedding")
        else:
            self.prefix = None

    def stacked(self) -> "HybridLM":
        """The same model with its parameters laid out as the program reads them: what every call would do first.

        Its `groups` are the program's sublayers (`pattern.spots`), each with a leading axis over its depths.
        """
        graphdef, state = nnx.split(self)
        model = nnx.merge(graphdef, state)
        parts = [nnx.merge(nnx.graphdef(s), of) for s, of in zip(self._sublayers(), self._states(), strict=True)]
        model.groups, model.is_stacked = nnx.List(parts), True
        return model

    @property
    def _loops(self) -> tuple[pattern.Loop, ...]:
        return pattern.loops(self.config.pattern, self.config.unroll or 1)

    @property
    def _spots(self) -> list[pattern.Spot]:
        return pattern.spots(self.config.pattern, self.config.unroll or 1)

    @property
    def logit_scale(self) -> float:
        """Multiplier of x @ unembedding.T in the logits."""
        return self.config.logit_multiplier

    def __call__(
        self, tokens_BT: AnyArray, segment_ids: AnyArray | None = None, positions: AnyArray | None = None
    ) -> jax.Array:
        """Logits [B, T, V], float32, of the token after each; arguments and errors as in `hidden`."""
        return self.logits(self.hidden(tokens_BT, segment_ids, positions))

    def hidden(
        self, tokens_BT: AnyArray, segment_ids: AnyArray | None = None, positions: AnyArray | None = None
    ) -> jax.Array:
        """[B, T, D] in compute_dtype, after the final norm: what the unembedding multiplies.

        tokens_BT: integers. segment_ids: int32 [B, T]; a change of id between real tokens starts a document, 0 is
        padding, anywhere; None: one document a row. positions: int32 [B, T], for the rotation; None: the index within
        the document. A model with prefix tokens takes the first cells of each document for them, whatever tokens stand
        there; without segment ids it puts them in front of each row, and gives the vectors of the tokens alone. One
        with a complement gives [B, T, 2 D], see `model.strands`.
        Raises ValueError for a wrong shape and TypeError for a wrong type, naming the argument.
        """
        return self.hidden_with_stats(tokens_BT, segment_ids, positions)[0]

    def hidden_with_stats(
        self, tokens_BT: Any, segment_ids: Any = None, positions: Any = None, sums=None, inspect: bool = False,
        low: depth.Low | None = None, padding_is_last: bool = False,
    ) -> tuple[jax.Array, list[list[dict[str, jax.Array]]]]:  # fmt: skip
        """`hidden`, and what mixers report: of each loop of the program, of each of its sublayers, arrays [L, ...] by
        name. sums: of a stacked model, by the number of the sublayer, see `depth.run`. inspect: the numbers of
        `Mixer.inspect` in the place of their statistics; forward alone. low: of a stacked model, see `depth.Low`.
        padding_is_last: of every row, so that none has to be moved, see `segments.with_padding_last`."""
        _check_tokens(tokens_BT, segment_ids=segment_ids, positions=positions)
        tokens_BT, segment_ids, positions = _int32(tokens_BT, segment_ids, positions)
        n_prefix, restore, within = self.config.prefix_tokens, None, None
        in_front = n_prefix if segment_ids is None else 0
        if segment_ids is not None:
            if not padding_is_last:
                (segment_ids, tokens_BT, positions), restore = padding_last(segment_ids, tokens_BT, positions)
            rows = ("batch", None)  # all tokens of a row on each of its devices: nothing is exchanged to find documents
            segment_ids, within = sharding.per_device(_documents, [segment_ids], [rows], [rows, rows])
            positions = within if positions is None else sharding.constrain(positions, *rows)
        elif in_front:
            tokens_BT, positions, within = room_in_front(tokens_BT, positions, in_front)
        if self.config.complement:
            args = tokens_BT, segment_ids, positions
            tokens_BT, segment_ids, positions = strands.both(*args, self.config.complement, self.config.vocab_size)
        x_BTD, reads = self._embed(tokens_BT, within), self.config.reads_tokens
        tokens = Tokens(segment_ids, positions, x_BTD, gaps=False, inspect=inspect, ids_BT=tokens_BT if reads else None)
        x_BTD, stats = self._through(x_BTD, tokens, sums, low)
        with jax.named_scope("norm"):
            x_BTD = sharding.constrain(self.norm(x_BTD), *sharding.STREAM)
        x_BTD = x_BTD[:, in_front:] if in_front else x_BTD
        x_BTD = strands.side_by_side(x_BTD) if self.config.complement else x_BTD
        x_BTD = x_BTD if restore is None else sharding.constrain(restore(x_BTD), *sharding.STREAM)
        return x_BTD, self._by_loop(stats)

    def unembedding(self) -> jax.Array:
        """w_VD, float32: the embedding itself where tied; [V, 2 D] of a model with a complement."""
        w_VD = self.embedding[...] if self.output is None else self.output[...]
        return strands.unembedding(w_VD, self.config.complement) if self.config.complement else w_VD

    @jax.named_scope("unembedding")
    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden vectors [..., D]: logit_multiplier and logit_softcap applied."""
        width = self.config.d_model * (2 if self.config.complement else 1)
        check_shape("x_BTD", x_BTD, (*(None,) * (rank("x_BTD", x_BTD) - 1), width), "..., width of the hidden vectors")
        w_VD = params.use(self.embedding if self.output is None else self.output, x_BTD.dtype)
        w_VD = strands.unembedding(w_VD, self.config.complement) if self.config.complement else w_VD
        logits = jnp.einsum("...D,VD->...V", x_BTD, w_VD, preferred_element_type=jnp.float32)
        if self.config.logit_multiplier != 1:
            logits *= self.config.logit_multiplier
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_cache(self, batch: int, max_len: int, types: CacheTypes = AS_COMPUTED) -> Cache:
        """Cache for `batch` rows of up to `max_len` tokens, with the prefix tokens alone in it; states and windows do
        not grow with it. It is split over the mesh that is set. ConfigError for a bidirectional model."""
        ahead, n_prefix = self.config.sees_ahead, self.config.prefix_tokens
        require(not ahead, f"the model cannot be decoded token by token: {ahead}")
        for name, value in (("batch", batch), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be positive")
        D, caches, limit, sublayers = self.config.d_model, [], None, self._sublayers()
        for spot, sublayer in zip(self._spots, sublayers, strict=True):
            caches.append(sublayer.init_cache(batch, max_len + n_prefix, Layout(types, len(spot.depths))))
            limit = max_len + n_prefix if sublayer.cache_grows else limit
        length_B = sharding.zeros((batch,), jnp.int32, ("batch",))
        if self.prefix is not None:
            x_BTD = jnp.broadcast_to(params.use(self.prefix, self.config.compute_dtype)[None], (batch, n_prefix, D))
            caches = self._extend(x_BTD, caches, length_B, None, Tokens(embedded_BTD=x_BTD, gaps=False))[1]
        return Cache(length_B + n_prefix, self._by_loop(caches), limit)

    def extend(self, tokens_BT: AnyArray, cache: Cache, segment_ids: AnyArray | None = None) -> tuple[jax.Array, Cache]:
        """Logits [B, T, V] of the next T tokens of each row, and the cache after them.

        Prefill, in one call or several, and decoding alike: the logits are those of one call with all tokens.
        segment_ids: int32 [B, T]; 0 marks padding, which is not read (its logits mean nothing); other ids all mean the
        row's one document. Raises ValueError where more tokens come than max_len leaves; in a traced call, where the
        lengths are not known, the logits of such a row are NaN instead.
        """
        x_BTD, cache = self.extend_hidden(tokens_BT, cache, segment_ids)
        return self.logits(x_BTD), cache

    def extend_hidden(self, tokens_BT: Any, cache: Cache, segment_ids: Any = None) -> tuple[jax.Array, Cache]:
        """`extend`, with the hidden vectors [B, T, D] of which `logits` makes logits."""
        _check_tokens(tokens_BT, segment_ids=segment_ids)
        tokens_BT, segment_ids = _int32(tokens_BT, segment_ids)
        real_BT = restore = None
        if segment_ids is not None:
            (segment_ids, tokens_BT), restore = padding_last(segment_ids, tokens_BT)
            real_BT = segment_ids != 0
        added_B = tokens_BT.shape[1] if real_BT is None else real_BT.sum(axis=1, dtype=jnp.int32)
        length_B = cache.length_B + added_B
        fits_B = _check_length(cache.limit, length_B)
        x_BTD, reads = self._embed(tokens_BT), self.config.reads_tokens
        tokens = Tokens(embedded_BTD=x_BTD, ids_BT=tokens_BT if reads else None, gaps=False)
        caches = [of_spot for of_loop in cache.groups for of_spot in of_loop]
        x_BTD, caches = self._extend(x_BTD, caches, cache.length_B, real_BT, tokens)
        with jax.named_scope("norm"):
            x_BTD = self.norm(x_BTD)
        if fits_B is not None:
            x_BTD = jnp.where(fits_B[:, None, None], x_BTD, jnp.nan)
        x_BTD = x_BTD if restore is None else restore(x_BTD)
        return x_BTD, Cache(length_B, self._by_loop(caches), cache.limit)

    @jax.named_scope("embedding")
    def _embed(self, tokens_BT: jax.Array, within_BT: jax.Array | None = None) -> jax.Array:
        """within: how many tokens of its document stand before each; None: no prefix token is among them."""
        dtype, multiplier = self.config.compute_dtype, self.config.embedding_multiplier
        x_BTD = vocabulary.look_up(self.embedding[...], tokens_BT, dtype, multiplier)
        x_BTD = x_BTD if self.embedding_scales is None else self.embedding_scales(x_BTD)[0]
        x_BTD = x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)
        if self.prefix is None or within_BT is None:
            return x_BTD
        n_prefix = self.config.prefix_tokens
        prefix_BTD = params.use(self.prefix, dtype)[jnp.minimum(within_BT, n_prefix - 1)]
        return sharding.constrain(jnp.where((within_BT < n_prefix)[..., None], prefix_BTD, x_BTD), *sharding.STREAM)

    def _stream(self, x_BTD: jax.Array) -> Any:
        """The residual stream, or streams, before the first sublayer, with what blocks hand to depths where some do."""
        width, streams = self.config.passed, self.config.streams
        if streams is not None:
            return sharding.constrain(jnp.tile(x_BTD, (1, 1, streams.n_streams)), *sharding.STREAM)
        if not width:
            return x_BTD
        return x_BTD, sharding.constrain(jnp.zeros((*x_BTD.shape[:2], width), jnp.float32), *sharding.STREAM)

    def _by_loop(self, values: list) -> list[list]:
        """Values of the program's sublayers, by its outermost loops."""
        return [[values[spot.number] for spot in loop.spots()] for loop in self._loops]

    def _through(self, x_BTD, tokens: Tokens, sums, low):
        """The residual stream behind all sublayers, and the statistics of each of the program, [depths, ...]."""
        calls, weights = self._of_spots(Sublayer.__call__)
        blocks, wrapped = self.config.blocks, {}
        for n, spot in enumerate(self._spots):
            in_loop = len(spot.depths) > 1
            kind = spot.symbol, in_loop
            if kind not in wrapped:
                wrapped[kind] = remat.wrap(calls[n], self.config.remat, blocks[spot.symbol], in_loop=in_loop)
            calls[n] = wrapped[kind]
        shared = {symbol: nnx.state(module) for symbol, module in self.shared.items()}
        if sums is not None:
            sums = [jax.tree.unflatten(jax.tree.structure(w), jax.tree.leaves(sums[n])) for n, w in enumerate(weights)]
        span = self.config.remat_span
        run = depth.run if span == 1 else partial(depth.run_in_spans, length=span)
        args = {"calls": calls, "weights": weights, "x_BTD": self._stream(x_BTD), "shared": shared, "tokens": tokens}
        x, stats = run(self._loops, **args, sums=sums, low=low)
        return _residual(x), stats

    def _extend(self, x_BTD, caches: list, length_B, real_BT, tokens: Tokens):
        """All sublayers; stacked caches are carried, each depth writes its own entries in place."""
        calls, weights = self._of_spots(Sublayer.extend)

        def visit(spot, index, carry):
            x, caches = carry
            n, layer = spot.number, jnp.int32(index)
            state = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), weights[n])
            shared = nnx.state(self.shared[spot.symbol]) if spot.symbol in self.shared else None
            x, new = calls[n](state, shared, x, caches[n], length_B, real_BT, layer, tokens)
            return x, [*caches[:n], new, *caches[n + 1 :]]

        x, caches = depth.walk(self._loops, visit, (self._stream(x_BTD), caches))
        return _residual(x), caches

    def _of_spots(self, method: Callable) -> tuple[list[Callable], list]:
        """Of each sublayer of the program the method, traced once for each symbol, and the stacked parameters.

        The functions take a sublayer's state, that of what the symbol's depths share or None, and the method's
        arguments, of which the last are the Tokens.
        """
        calls = {}
        spots = self._spots
        for spot, sublayer in zip(spots, self._sublayers(), strict=True):
            symbol = spot.symbol
            if symbol in calls:
                continue
            graphdef = nnx.graphdef(sublayer)
            scope = kind_of(self.config, symbol)  # what a profile calls the sublayer

            def call(state, shared_state, *args, graphdef=graphdef, symbol=symbol, scope=scope):
                *args, tokens = args
                tokens = replace(tokens, shared=self._merge_shared(symbol, shared_state))
                with jax.named_scope(scope):
                    return method(nnx.merge(graphdef, state), *args, tokens)

            calls[symbol] = jax.jit(call)
        return [calls[spot.symbol] for spot in spots], self._states()

    def _sublayers(self) -> list[Sublayer]:
        """Of each sublayer of the program one that is built like it."""
        if self.is_stacked:
            return list(self.groups)
        first = [pattern.places(self.config.pattern)[spot.depths[0]] for spot in self._spots]
        return [self.groups[place.group][place.position] for place in first]

    def _states(self) -> list[nnx.State]:
        """The parameters of each sublayer of the program, [depths, ...]."""
        if self.is_stacked:
            return [nnx.state(sublayer) for sublayer in self.groups]
        stored = [[nnx.state(sublayer) for sublayer in group] for group in self.groups]
        return stacks.stack(self.config.pattern, self.config.unroll or 1, stored)

    def _merge_shared(self, symbol: str, state: nnx.State | None) -> nnx.Module | None:
        return None if state is None else nnx.merge(nnx.graphdef(self.shared[symbol]), state)


def _residual(x: Any) -> jax.Array:
    """The residual stream alone, of what sublayers give."""
    return x[0] if isinstance(x, tuple) else x


def _build_groups(config: ModelConfig, key: jax.Array) -> nnx.List:
    """Of each group the sublayers of its unit, their parameters stacked over its repeats.

    Parameters follow from the key and the depth alone. All sublayers of a symbol are drawn by one program, so that
    drawing compiles as fast for a long unit as for a short one.
    """
    depths: dict[str, dict] = {symbol: {} for symbol in config.pattern}
    for i, (symbol, place) in enumerate(zip(config.pattern, pattern.places(config.pattern), strict=True)):
        depths[symbol].setdefault((place.group, place.position), []).append(i)
    sublayers = {}
    for symbol, spots in depths.items():
        all_depths = jnp.array([depth for spot in spots.values() for depth in spot])
        stacked, start = _draw(symbol, config, key, all_depths), 0
        for spot, of_spot in spots.items():
            stop = start + len(of_spot)
            sublayers[spot] = jax.tree.map(lambda a, start=start, stop=stop: a[start:stop], stacked)
            start = stop
    cut = pattern.groups(config.pattern)
    return nnx.List([nnx.List([sublayers[g, i] for i in range(len(group.unit))]) for g, group in enumerate(cut)])


@partial(jax.jit, static_argnums=(0, 1))
def _draw(symbol: str, config: ModelConfig, key: jax.Array, depths_L: jax.Array) -> Sublayer:
    """Sublayers of one kind at several depths, stacked."""

    def at(depth: jax.Array) -> Sublayer:
        return Sublayer(symbol, config, rngs=nnx.Rngs(jax.random.fold_in(key, depth)), depth=depth)

    return jax.vmap(at)(depths_L)


def _check_length(limit: int | None, length_B: jax.Array) -> jax.Array | None:
    """Rows whose tokens fit; None where there is no limit. ValueError if they are known not to."""
    if limit is None:
        return None
    if not isinstance(length_B, jax.core.Tracer) and int(length_B.max()) > limit:
        raise ValueError(f"tokens in the cache and new ones ({int(length_B.max())}) exceed max_len ({limit})")
    return length_B <= limit


def _documents(segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids of which each is one document's, and positions within documents."""
    return document_ids(segment_ids_BT), positions_within(segment_ids_BT, segment_ids_BT.shape)


def _int32(*arrays) -> list[Any]:
    return [None if array is None else jnp.asarray(array, jnp.int32) for array in arrays]


def _check_tokens(tokens_BT, **same_shape) -> None:
    check_array("tokens_BT", tokens_BT)
    if jnp.ndim(tokens_BT) != 2 or 0 in jnp.shape(tokens_BT):
        raise ValueError(f"tokens_BT must be [batch, tokens], neither empty, not of shape {jnp.shape(tokens_BT)}")
    for name, array in {"tokens_BT": tokens_BT, **same_shape}.items():
        if array is None:
            continue
        check_array(name, array)
        if jnp.shape(array) != jnp.shape(tokens_BT):
            raise ValueError(f"{name} {jnp.shape(array)} must have the shape of tokens_BT {jnp.shape(tokens_BT)}")
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise TypeError(f"{name} ({jnp.result_type(array)}) must be of an integer type")
