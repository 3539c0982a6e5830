# SPDX-License-Identifier: Apache-2.0
"""HybridLM: embedding, scanned groups of pre-norm residual sublayers, final norm, unembedding.

Axis letters: B batch, T tokens, D model, V vocabulary, L repeats of a group.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm import sharding
from hybridlm.layers import params, vocabulary
from hybridlm.layers.block import Tokens, shares
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.params import ParamInfo, param_info
from hybridlm.layers.segments import padding_last, positions_within
from hybridlm.model import pattern, remat
from hybridlm.model.config import ModelConfig
from hybridlm.model.sublayer import Sublayer, make_options
from pallas_kernels.segments import document_ids

__all__ = ["Cache", "HybridLM", "ParamInfo", "Sublayer", "param_info"]


@jax.tree_util.register_dataclass
@dataclass
class Cache:
    """What a model remembers of the tokens it has read; made by `HybridLM.init_cache`, a pytree."""

    length_B: jax.Array
    """int32 [B]: tokens read of each row."""
    groups: list[list]
    """Of each group, of each sublayer of its unit: what its mixer remembers, arrays [L, B, ...]."""
    limit: int | None = field(default=None, metadata={"static": True})
    """Tokens that a row can have; None: any number, as no sublayer's cache grows."""


class HybridLM(nnx.Module):
    """A language model from a pattern string: `HybridLM(config, rngs=nnx.Rngs(0))(tokens_BT) -> logits_BTV`.

    Sublayers live in `groups[g][position]`, a Sublayer whose parameters have a leading axis over the repeats of group
    g; `pattern.places(config.pattern)` says where each symbol of the pattern is. What the depths of a
    symbol share lives in `shared[symbol]`.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """ConfigError for an unknown remat policy."""
        remat.check(config.remat, config.blocks.values())
        self.config, self.source = config, None
        V, D, std = config.vocab_size, config.d_model, config.init_std
        key = rngs.params
        self.embedding = params.make(std * jax.random.normal(key(), (V, D)), ("vocab", "d_model"), "embedding")
        self.groups = _build_groups(config, key())
        self.shared = nnx.Dict(
            {
                symbol: block.build_shared(D, make_options(config, nnx.Rngs(key())))
                for symbol, block in config.blocks.items()
                if shares(block) and symbol in config.pattern
            }
        )
        self.norm = RMSNorm(D, config.norm_eps)
        if config.tie_embeddings:
            self.output = None
        else:
            self.output = params.make(std * jax.random.normal(key(), (V, D)), ("vocab", "d_model"), "embedding")

    @property
    def logit_scale(self) -> float:
        """Multiplier of x @ unembedding.T in the logits."""
        return self.config.logit_multiplier

    def __call__(
        self, tokens_BT: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, T, V], float32, of the token after each; arguments and errors as in `hidden`."""
        return self.logits(self.hidden(tokens_BT, segment_ids, positions))

    def hidden(
        self, tokens_BT: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, D] in compute_dtype, after the final norm: what the unembedding multiplies.

        tokens_BT: integers. segment_ids: int32 [B, T]; a change of id between real tokens starts a document, 0 is
        padding, anywhere; None: one document a row. positions: int32 [B, T], for the rotation; None: the index within
        the document.
        Raises ValueError for a wrong shape and TypeError for a wrong type, naming the argument.
        """
        return self.hidden_with_stats(tokens_BT, segment_ids, positions)[0]

    def hidden_with_stats(
        self, tokens_BT: jax.Array, segment_ids: jax.Array | None = None, positions: jax.Array | None = None
    ) -> tuple[jax.Array, list[list[dict[str, jax.Array]]]]:
        """`hidden`, and what mixers report: of each group, of each sublayer of its unit, arrays [L, ...] by name."""
        _check_tokens(tokens_BT, segment_ids=segment_ids, positions=positions)
        tokens_BT, segment_ids, positions = _int32(tokens_BT, segment_ids, positions)
        restore = None
        if segment_ids is not None:
            (segment_ids, tokens_BT, positions), restore = padding_last(segment_ids, tokens_BT, positions)
            rows = ("batch", None)  # all tokens of a row on each of its devices: nothing is exchanged to find documents
            segment_ids, within = sharding.per_device(_documents, [segment_ids], [rows], [rows, rows])
            positions = within if positions is None else sharding.constrain(positions, *rows)
        x_BTD, stats = self._embed(tokens_BT), []
        tokens = Tokens(segment_ids, positions, embedded_BTD=x_BTD, gaps=False)
        for group, sublayers in zip(pattern.groups(self.config.pattern), self.groups, strict=True):
            x_BTD, of_group = self._run(group, sublayers, x_BTD, tokens)
            stats.append(of_group)
        with jax.named_scope("norm"):
            x_BTD = sharding.constrain(self.norm(x_BTD), *sharding.STREAM)
        return x_BTD if restore is None else sharding.constrain(restore(x_BTD), *sharding.STREAM), stats

    def unembedding(self) -> jax.Array:
        """w_VD, float32: the embedding itself where tied."""
        return self.embedding[...] if self.output is None else self.output[...]

    @jax.named_scope("unembedding")
    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of hidden vectors [..., D]: logit_multiplier and logit_softcap applied."""
        w_VD = params.use(self.embedding if self.output is None else self.output, x_BTD.dtype)
        logits = jnp.einsum("...D,VD->...V", x_BTD, w_VD, preferred_element_type=jnp.float32)
        if self.config.logit_multiplier != 1:
            logits *= self.config.logit_multiplier
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_cache(self, batch: int, max_len: int) -> Cache:
        """Empty cache for `batch` rows of up to `max_len` tokens; states and windows do not grow with it."""
        for name, value in (("batch", batch), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be positive")
        stacked, limit = [], None
        for group, sublayers in zip(pattern.groups(self.config.pattern), self.groups, strict=True):
            caches = [sublayer.init_cache(batch, max_len) for sublayer in sublayers]
            stacked.append(jax.tree.map(lambda a, n=group.repeats: jnp.zeros((n, *a.shape), a.dtype), caches))
            limit = max_len if any(sublayer.cache_grows for sublayer in sublayers) else limit
        return Cache(jnp.zeros((batch,), jnp.int32), stacked, limit)

    def extend(
        self, tokens_BT: jax.Array, cache: Cache, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, T, V] of the next T tokens of each row, and the cache after them.

        Prefill, in one call or several, and decoding alike: the logits are those of one call with all tokens.
        segment_ids: int32 [B, T]; 0 marks padding, which is not read (its logits mean nothing); other ids all mean the
        row's one document. Raises ValueError where more tokens come than max_len leaves; in a traced call, where the
        lengths are not known, the logits of such a row are NaN instead.
        """
        x_BTD, cache = self.extend_hidden(tokens_BT, cache, segment_ids)
        return self.logits(x_BTD), cache

    def extend_hidden(
        self, tokens_BT: jax.Array, cache: Cache, segment_ids: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
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
        x_BTD, new_groups = self._embed(tokens_BT), []
        tokens = Tokens(embedded_BTD=x_BTD, gaps=False)
        groups = pattern.groups(self.config.pattern)
        for group, sublayers, caches in zip(groups, self.groups, cache.groups, strict=True):
            x_BTD, new = self._extend(group, sublayers, x_BTD, caches, cache.length_B, real_BT, tokens)
            new_groups.append(new)
        with jax.named_scope("norm"):
            x_BTD = self.norm(x_BTD)
        if fits_B is not None:
            x_BTD = jnp.where(fits_B[:, None, None], x_BTD, jnp.nan)
        x_BTD = x_BTD if restore is None else restore(x_BTD)
        return x_BTD, Cache(length_B, new_groups, cache.limit)

    @jax.named_scope("embedding")
    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        dtype, multiplier = self.config.compute_dtype, self.config.embedding_multiplier
        return vocabulary.look_up(self.embedding[...], tokens_BT, dtype, multiplier)

    def _run(self, group: pattern.Group, sublayers, x_BTD, tokens: Tokens):
        """One scan over the repeats of a group."""
        shared = self._shared_states(group)
        calls, states = self._by_symbol(group, sublayers, Sublayer.__call__)
        blocks, policy, in_loop = self.config.blocks, self.config.remat, group.repeats > 1
        runs = {s: remat.wrap(call, policy, blocks[s], in_loop=in_loop) for s, call in calls.items()}

        def unit(x_BTD, states):
            stats = []
            for symbol, state in zip(group.unit, states, strict=True):
                x_BTD, of_sublayer = runs[symbol](state, shared.get(symbol), x_BTD, tokens)
                stats.append(of_sublayer)
            return x_BTD, stats

        return jax.lax.scan(unit, x_BTD, states)

    def _extend(self, group: pattern.Group, sublayers, x_BTD, caches: list, length_B, real_BT, tokens: Tokens):
        """One scan over the repeats; stacked caches are carried, each layer writes its own entries in place."""
        shared = self._shared_states(group)
        extends, all_states = self._by_symbol(group, sublayers, Sublayer.extend)

        def unit(carry, layer_states):
            x_BTD, caches = carry
            layer, states = layer_states
            new = []
            for symbol, state, cache in zip(group.unit, states, caches, strict=True):
                args = (x_BTD, cache, length_B, real_BT, layer, tokens)
                x_BTD, cache = extends[symbol](state, shared.get(symbol), *args)
                new.append(cache)
            return (x_BTD, new), None

        return jax.lax.scan(unit, (x_BTD, caches), (jnp.arange(group.repeats), all_states))[0]

    def _by_symbol(self, group: pattern.Group, sublayers, method: Callable) -> tuple[dict[str, Callable], list]:
        """Of each symbol the method of its sublayers, traced once for all of them; and the state of every sublayer.

        The functions take a sublayer's state, that of what the symbol's depths share or None, and the method's
        arguments, of which the last are the Tokens.
        """
        calls, states = {}, []
        for symbol, sublayer in zip(group.unit, sublayers, strict=True):
            graphdef, state = nnx.split(sublayer)
            states.append(state)
            scope = f"{symbol}.{type(self.config.blocks[symbol]).__name__}"  # what a profile calls the sublayer

            def call(state, shared_state, *args, graphdef=graphdef, symbol=symbol, scope=scope):
                *args, tokens = args
                tokens = replace(tokens, shared=self._merge_shared(symbol, shared_state))
                with jax.named_scope(scope):
                    return method(nnx.merge(graphdef, state), *args, tokens)

            calls.setdefault(symbol, jax.jit(call))
        return calls, states

    def _shared_states(self, group: pattern.Group) -> dict[str, nnx.State]:
        """Parameters of what the depths of the group's symbols share, by symbol."""
        return {symbol: nnx.state(self.shared[symbol]) for symbol in group.unit if symbol in self.shared}

    def _merge_shared(self, symbol: str, state: nnx.State | None) -> nnx.Module | None:
        return None if state is None else nnx.merge(nnx.graphdef(self.shared[symbol]), state)


def _build_groups(config: ModelConfig, key: jax.Array) -> nnx.List:
    """Of each group the sublayers of its unit, their parameters stacked over its repeats.

    Parameters follow from the key and the depth alone. All sublayers of a symbol are drawn by one program, so that
    drawing compiles as fast for a long unit as for a short one.
    """
    depths: dict[str, dict] = {symbol: {} for symbol in config.pattern}
    for depth, (symbol, place) in enumerate(zip(config.pattern, pattern.places(config.pattern), strict=True)):
        depths[symbol].setdefault((place.group, place.position), []).append(depth)
    sublayers = {}
    for symbol, spots in depths.items():
        all_depths = jnp.array([depth for spot in spots.values() for depth in spot])
        stacked, start = _draw(config.blocks[symbol], config, key, all_depths), 0
        for spot, of_spot in spots.items():
            stop = start + len(of_spot)
            sublayers[spot] = jax.tree.map(lambda a, start=start, stop=stop: a[start:stop], stacked)
            start = stop
    cut = pattern.groups(config.pattern)
    return nnx.List([nnx.List([sublayers[g, i] for i in range(len(group.unit))]) for g, group in enumerate(cut)])


@partial(jax.jit, static_argnums=(0, 1))
def _draw(block, config: ModelConfig, key: jax.Array, depths_L: jax.Array) -> Sublayer:
    """Sublayers of one kind at several depths, stacked."""
    return jax.vmap(lambda depth: Sublayer(block, config, rngs=nnx.Rngs(jax.random.fold_in(key, depth))))(depths_L)


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


def _int32(*arrays) -> list[jax.Array | None]:
    return [None if array is None else jnp.asarray(array, jnp.int32) for array in arrays]


def _check_tokens(tokens_BT, **same_shape) -> None:
    if jnp.ndim(tokens_BT) != 2 or 0 in jnp.shape(tokens_BT):
        raise ValueError(f"tokens_BT must be [batch, tokens], neither empty, not of shape {jnp.shape(tokens_BT)}")
    for name, array in {"tokens_BT": tokens_BT, **same_shape}.items():
        if array is None:
            continue
        if jnp.shape(array) != jnp.shape(tokens_BT):
            raise ValueError(f"{name} {jnp.shape(array)} must have the shape of tokens_BT {jnp.shape(tokens_BT)}")
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise TypeError(f"{name} ({jnp.result_type(array)}) must be of an integer type")
