# SPDX-License-Identifier: Apache-2.0
"""A model's steps as functions of flat dicts of arrays, with what each array is.

Axis letters: B batch, T tokens of a piece, D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm.infer.cache_size import cache_size
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.model import pattern
from hybridlm.model.decoding import read_piece
from hybridlm.model.model import Cache, HybridLM

LENGTH, LAST = "length", "last"
"""Of the cache beside what sublayers remember: tokens that each row has, and the hidden vector of its last."""
Arrays = dict[str, Any]
"""Arrays by name."""


class Steps:
    """Of a model as `Writer.prepared` gives it; its parameters may be shapes."""

    def __init__(self, graphdef: nnx.GraphDef, params: nnx.State, context: int, types: CacheTypes = AS_COMPUTED):
        """context: tokens that a row can have. types: how caches are stored."""
        self.context, self.types = context, types
        self._graphdef, self._structure = graphdef, jax.tree.structure(params)
        self._variables = _variables(params)
        self.weights = [name for variable in self._variables for name in variable[0]]
        """Names of the weights, in the order of the leaves of the parameters."""
        like = dict(zip(self.weights, jax.tree.leaves(params), strict=True))
        self._types = {name: np.dtype(a.dtype) for name, a in like.items()}
        self._weights_like = {
            name: jax.ShapeDtypeStruct(a.shape, stored(self._types[name])) for name, a in like.items()
        }
        self.config = nnx.merge(graphdef, params).config
        empty: Cache = jax.eval_shape(lambda w: self._model(w).init_cache(1, context, types), self._weights_like)
        self._cache_structure = jax.tree.structure(empty)
        paths = [_words(path) for path, _ in jax.tree_util.tree_leaves_with_path(empty)]
        by_place = [loop.spots() for loop in pattern.loops(self.config.pattern, self.config.unroll or 1)]
        self._held: dict[str, tuple[pattern.Spot, str] | None] = {}
        for path in paths:
            if path[0] != "groups":
                self._held[LENGTH] = None
                continue
            spot, rest = by_place[int(path[1])][int(path[2])], ".".join(path[3:])
            self._held[f"{spot.number}.{rest}" if rest else str(spot.number)] = spot, rest

    # The steps --------------------------------------------------------------------------------------------------------

    def start(self, weights: Arrays, lengths_B: jax.Array) -> Arrays:
        """The cache of rows of which nothing was read; how many there are is what lengths_B says, nothing else."""
        model, batch = self._model(weights), lengths_B.shape[0]
        width = jax.eval_shape(model.unembedding).shape[-1]
        x_BD = jnp.zeros((batch, width), self.config.compute_dtype)
        return self._packed(model.init_cache(batch, self.context, self.types), x_BD)

    def prefill(self, weights: Arrays, cache: Arrays, tokens_BT: jax.Array, lengths_B: jax.Array) -> tuple:
        """(logits [B, V] of the next token, the likeliest, cache) after the first lengths_B of these tokens of each
        row; a row without any stays as it is."""
        model = self._model(weights)
        read, x_BD = read_piece(model, *self._unpacked(cache), tokens_BT, lengths_B)
        return self._answer(model, read, x_BD)

    def decode(self, weights: Arrays, cache: Arrays, token_B: jax.Array) -> tuple:
        """The same after one more token of each row."""
        model = self._model(weights)
        x_B1D, read = model.extend_hidden(token_B[:, None], self._unpacked(cache)[0])
        return self._answer(model, read, x_B1D[:, 0])

    def calls(self, batch: Any, prefill: int) -> dict[str, tuple[Callable, tuple]]:
        """Step -> (function, shapes of its arguments). batch: rows, a number or a symbol; prefill:
        tokens of a piece."""
        rows = jax.ShapeDtypeStruct((batch,), np.int32)
        piece = jax.ShapeDtypeStruct((batch, prefill), np.int32)
        weights, cache = self._weights_like, self._cache_like(batch)
        return {
            "start": (self.start, (weights, rows)),
            "prefill": (self.prefill, (weights, cache, piece, rows)),
            "decode": (self.decode, (weights, cache, rows)),
        }

    def _answer(self, model: HybridLM, read: Cache, x_BD: jax.Array) -> tuple:
        logits_BV = model.logits(x_BD)
        return logits_BV, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), self._packed(read, x_BD)

    def _model(self, weights: Arrays) -> HybridLM:
        arrays = [
            weights[name] if stored(kind) == kind else jax.lax.bitcast_convert_type(weights[name], kind)
            for name, kind in self._types.items()
        ]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._structure, arrays))

    def _packed(self, cache: Cache, x_BD: jax.Array) -> Arrays:
        return {**dict(zip(self._held, jax.tree.leaves(cache), strict=True)), LAST: x_BD}

    def _unpacked(self, cache: Arrays) -> tuple[Cache, jax.Array]:
        return jax.tree.unflatten(self._cache_structure, [cache[name] for name in self._held]), cache[LAST]

    def _cache_like(self, batch: Any) -> Arrays:
        return jax.eval_shape(self.start, self._weights_like, jax.ShapeDtypeStruct((batch,), np.int32))

    # What each array is -----------------------------------------------------------------------------------------------

    def describe_cache(self, batch: int | None) -> dict[str, dict[str, Any]]:
        """Of each array of the cache its shape ("batch" for rows of any number), type, logical axes, and what it
        holds, of which sublayers."""
        size = cache_size(self.config, 1, self.context, types=self.types)
        parts = {(part.symbol, part.name): part for part in size.parts}
        found: dict[str, dict[str, Any]] = {}
        for name, like in self._cache_like(1 if batch is None else batch).items():
            said: dict[str, Any]
            held = self._held.get(name)
            if held is not None:
                spot, path = held
                part = parts[spot.symbol, path]
                said = {"axes": ["depth", *part.axes], "holds": part.kind}
                said |= {"block": spot.symbol, "sublayers": list(spot.depths)}
            elif name == LENGTH:
                said = {"axes": ["batch"], "holds": "tokens that each row has"}
            else:
                said = {"axes": ["batch", "d_model"], "holds": "the hidden vector of each row's last token"}
            rows = said["axes"].index("batch")
            shape: list[Any] = list(like.shape)
            shape[rows] = "batch" if batch is None else batch
            found[name] = {"shape": shape, "dtype": like.dtype.name, **said}
        return found

    def describe_weights(self) -> dict[str, dict[str, Any]]:
        """Of each weight its shape, type and logical axes; null where an array is only a part of one."""
        found = {}
        for names, axes in self._variables:
            for name in names:
                like, kind = self._weights_like[name], self._types[name]
                known = None if axes is None or len(names) > 1 else [*["depth"] * (like.ndim - len(axes)), *axes]
                found[name] = {"shape": list(like.shape), "dtype": like.dtype.name, "axes": known}
                if kind != like.dtype:
                    found[name]["bits_of"] = kind.name
        return found


def stored(kind: np.dtype) -> np.dtype:
    """The type in which weights of a type are written, and given to programs: numbers of eight bits that libraries for
    safetensors do not read are whole numbers with the same bits."""
    return np.dtype(np.uint8) if kind.itemsize == 1 and kind != np.int8 else kind


def _variables(params: nnx.State) -> list[tuple[list[str], tuple[str | None, ...] | None]]:
    """(names of its arrays, logical axes) of each variable, in the order of leaves. Most are one array."""
    found = []
    is_variable = lambda node: isinstance(node, nnx.Variable)
    for path, variable in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        leaves = jax.tree_util.tree_leaves_with_path(variable)
        inside = [[word for word in _words(rest) if word != "value"] for rest, _ in leaves]
        names = [".".join([*_words(path), *rest]) for rest in inside]
        found.append((names, variable.get_metadata().get("axes") if is_variable(variable) else None))
    return found


def _words(path: tuple) -> list[str]:
    """A path in a pytree, of keys of any kind."""
    return [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
