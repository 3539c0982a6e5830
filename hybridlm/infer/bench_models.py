# SPDX-License-Identifier: Apache-2.0
"""Models that are timed: what one has to be able to do, and this project's own, with parameters as they are drawn.

Axis letters: B batch, T tokens.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm.infer.bound import Moved, kind_of, moved, weights_held
from hybridlm.infer.cache_size import cache_size
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.layers.params import in_type, param_info
from hybridlm.model.config import ModelConfig, QuantizeConfig
from hybridlm.model.decoding import CHUNK, NOT_ROUNDED, Sampling, State, Writer, room_for
from hybridlm.model.flops import forward_flops
from hybridlm.model.model import Cache, HybridLM
from hybridlm.model.quantize import of_run, parameters

DECODE, PREFILL = PHASES = ("decode", "prefill")
LOGITS = 12
"""Bytes of a logit while a token is chosen: it, and what is made of it, in float32."""


class Open(Protocol):
    """A model on the device."""

    def decode(self, batch: int, context: int, n_new: int, warm: bool) -> float:
        """Seconds in which every row gets n_new tokens, of which the last is its `context`-th. warm: only what has to
        be compiled is run, and the time does not count."""

    def prefill(self, batch: int, context: int, warm: bool) -> float:
        """Seconds in which context - 1 tokens of every row are read and the next is chosen."""


class Subject(Protocol):
    """A model that can be put on the device."""

    @property
    def name(self) -> str:
        """In tables, and of its rows in files."""

    @property
    def kind(self) -> str:
        """Of `bound.kind_of`."""

    @property
    def filled(self) -> str:
        """What stands before the tokens that `decode` writes."""

    @property
    def compute(self) -> str:
        """Type of weights and activations."""

    def weights(self) -> int:
        """Bytes on the device."""

    def cache(self, batch: int, context: int) -> tuple[int, dict[str, str]]:
        """Bytes of it for rows of so many tokens, and the type of each kind of what it holds."""

    def beside(self, batch: int) -> int:
        """Bytes that are needed beside weights and caches."""

    def moved(self, batch: int, context: int) -> Moved | None:
        """Of a step of decoding; None: not counted."""

    def flops(self, context: int) -> float | None:
        """Of reading rows of so many tokens, each."""

    def opened(self) -> AbstractContextManager[Any]:
        """Gives it on the device, an Open."""


@dataclass(frozen=True)
class Ours:
    """A config's model."""

    name: str
    model: ModelConfig
    types: CacheTypes = AS_COMPUTED
    """How its cache is stored."""
    filled: str = "noise in states, keys and values"
    rounding: QuantizeConfig = NOT_ROUNDED
    """Of its matrices in eight bits."""

    @property
    def kind(self) -> str:
        """See Subject."""
        return kind_of(self.model)

    @property
    def compute(self) -> str:
        """See Subject."""
        weights = self.rounding.weights
        return self.model.compute_dtype if weights is None else f"{self.model.compute_dtype}, matrices in {weights}"

    def weights(self) -> int:
        """See Subject."""
        return weights_held(self.model, self.rounding)

    def cache(self, batch: int, context: int) -> tuple[int, dict[str, str]]:
        """With the room that a Writer makes."""
        size = cache_size(self.model, batch, room_for(context), types=self.types)
        return size.total().bytes, {part.kind: part.dtype for part in size.parts if part.symbol}

    def beside(self, batch: int) -> int:
        """Logits, and some hidden vectors."""
        widest = max(self.model.d_model * 16, 1)
        return batch * (LOGITS * self.model.vocab_size + 4 * widest)

    def moved(self, batch: int, context: int) -> Moved:
        """See Subject."""
        return moved(self.model, batch, context, self.types, self.rounding)

    def flops(self, context: int) -> float:
        """See Subject."""
        return context * forward_flops(self.model, context)

    @contextmanager
    def opened(self) -> Iterator["OurOpen"]:
        """Parameters are drawn in the type of the computation, so that a large model needs no float32 of all."""
        params: Any = _drawn(self.model)(jax.random.key(0))
        if self.rounding.on:
            params = parameters(self.model, self.rounding)(nnx.to_pure_dict(params))
        writer = Writer(nnx.merge(of_run(self.model, self.rounding).graphdef, params), types=self.types)
        del params  # else both lie on the device
        yield OurOpen(writer)


@dataclass(frozen=True)
class OurOpen:
    """Our model on the device."""

    writer: Writer

    def decode(self, batch: int, context: int, n_new: int, warm: bool) -> float:
        """The cache is filled with noise, so that a context is reached without reading it; a first piece is written
        and forgotten, then the clock runs."""
        state = filled(self.writer, batch, context, n_new)
        _, state = self.writer.write(state, n_new, Sampling())
        jax.block_until_ready(state.x_BD)
        if warm:
            return 0.0
        state = _back(state, self.writer.config, context - n_new)
        jax.block_until_ready(state.cache)
        began = time.perf_counter()
        out_BN, state = self.writer.write(state, n_new, Sampling())
        jax.block_until_ready((out_BN, state.x_BD))
        return time.perf_counter() - began

    def prefill(self, batch: int, context: int, warm: bool) -> float:
        """Tokens are drawn evenly; warm: two pieces of them."""
        n = context - 1
        tokens_BT = np.random.default_rng(0).integers(0, self.writer.config.vocab_size, (batch, n), np.int32)
        lengths_B = np.full((batch,), min(n, 2 * CHUNK) if warm else n, np.int32)
        began = time.perf_counter()
        state = self.writer.read(self.writer.start(batch, context), tokens_BT, lengths_B)
        out_BN, _ = self.writer.write(state, 1, Sampling())
        jax.block_until_ready(out_BN)
        return time.perf_counter() - began


def filled(writer: Writer, batch: int, context: int, n_new: int) -> State:
    """Rows of which all but the last n_new of `context` tokens seem to have been read: every array of the cache holds
    noise. What decoding costs hangs on the lengths, not on the values."""
    state = writer.start(batch, context)
    cache, x_BD = _noise((state.cache, state.x_BD))
    return _back(replace(state, cache=cache, x_BD=x_BD), writer.config, context - n_new)


def _back(state: State, config: ModelConfig, length: int) -> State:
    """The same rows with so many tokens in each."""
    length_B = jnp.full(state.cache.length_B.shape, length + config.prefix_tokens, jnp.int32)
    return replace(state, cache=Cache(length_B, state.cache.groups, state.cache.limit), length=length)


@partial(jax.jit, donate_argnums=0, keep_unused=True)
def _noise(arrays: Any) -> Any:
    """Arrays of the same shapes, in their memory (what is not used would not be given away), with values within +-1/2
    (whole numbers: all of their type) that follow from their place alone: a cheap hash, for a cache may have more
    entries than a generator of random numbers can count."""

    def fill(a: jax.Array) -> jax.Array:
        mixed = jnp.uint32(0)
        for axis in range(a.ndim):
            index = jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
            mixed = (mixed ^ index) * jnp.uint32(0x9E3779B1 + 2 * axis)
            mixed = mixed ^ (mixed >> 15)
        if jnp.issubdtype(a.dtype, jnp.integer):
            return mixed.astype(a.dtype)
        return ((mixed >> 8).astype(jnp.float32) / 2**24 - 0.5).astype(a.dtype)

    return jax.tree.map(fill, arrays)


@cache
def _drawn(model: ModelConfig) -> Any:
    """The program that draws a model's parameters, in the type in which they are used."""
    return jax.jit(partial(_draw, model))


def _draw(model: ModelConfig, key: jax.Array) -> nnx.State:
    params = nnx.state(HybridLM(model, rngs=nnx.Rngs(key)))
    return in_type(params, param_info(params), model.compute_dtype)
