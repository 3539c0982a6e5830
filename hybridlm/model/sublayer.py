# SPDX-License-Identifier: Apache-2.0
"""One symbol of the pattern: norm, mixer, residual stream. Axis letters: B batch, T tokens, D model."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import exchange, sharding
from hybridlm.layers import cache as caches
from hybridlm.layers import fork, one_row, params, streams
from hybridlm.layers.block import Make, Output, Tokens, inspect, of_streams, passes, reads_tokens, shares
from hybridlm.layers.norm import LayerNorm, RMSNorm
from hybridlm.layers.parallel import scaled
from hybridlm.model.config import ModelConfig


def make_options(config: ModelConfig, rngs: nnx.Rngs, depth: jax.Array | int = 0) -> Make:
    """What every mixer of the model is made with. depth: index into the pattern, perhaps traced."""
    out_std = config.init_std / math.sqrt(len(config.pattern))
    mixing = [config.blocks[symbol].MIXES_TOKENS for symbol in config.pattern]
    before = np.cumsum(mixing, dtype=np.int32) - mixing
    layer = jnp.asarray(before, jnp.int32)[depth], max(sum(mixing), 1)
    return Make(rngs, config.init_std, out_std, config.compute_dtype, config.norm_eps, layer)


def stream_reader(config: ModelConfig, rngs: nnx.Rngs, *, adds: bool, eps: float | None = None) -> streams.StreamReader:
    """What reads the streams of a model that has several. adds: of a sublayer; eps: None: norm_eps."""
    several: Any = config.streams
    return streams.StreamReader(
        several, config.d_model, rngs=rngs, init_std=config.init_std, eps=eps or config.norm_eps,
        offset=config.norm_offset, adds=adds,
    )  # fmt: skip


def stream_norm(config: ModelConfig, *, inside: bool, eps: float | None = None) -> RMSNorm | LayerNorm:
    """A norm of the residual stream. inside: of a sublayer; eps: None: norm_eps."""
    kind: type[Any] = {"rms": RMSNorm, "layer": LayerNorm}[config.norm]
    bias = config.norm_bias == "all" or (inside and config.norm_bias == "sublayers")
    return kind(config.d_model, eps or config.norm_eps, offset=config.norm_offset, bias=bias)


def last_norm(config: ModelConfig, key: Callable[[], jax.Array]) -> RMSNorm | LayerNorm | streams.StreamReader:
    """What gives the hidden vectors of the stream, or streams, behind all sublayers. key: gives keys of its numbers."""
    if config.streams is None:
        return stream_norm(config, inside=False, eps=config.final_norm_eps)
    return stream_reader(config, nnx.Rngs(key()), adds=False, eps=config.final_norm_eps)


class ChannelScales(nnx.Module):
    """(x + bias) * scale of each channel, of several arrays; in float32, the results in the types of the inputs."""

    def __init__(self, d_model: int, n: int = 2):
        """n: how many arrays are scaled."""
        self.scale = params.ones((n, d_model), (None, "d_model"), "norm")
        self.bias = params.zeros((n, d_model), (None, "d_model"), "bias")

    def __call__(self, *arrays_BTD: jax.Array) -> list[jax.Array]:
        scale, bias = (params.use(a, jnp.float32)[:, None, None] for a in (self.scale, self.bias))
        return [((x + bias[i]) * scale[i]).astype(x.dtype) for i, x in enumerate(arrays_BTD)]


class Sublayer(nnx.Module):
    """x + residual_multiplier * mixer(norm(x)); also after_norm(mixer(...)), see `ModelConfig.norms`, and a norm(x) + b
    mixer(norm(x)), see `normed_residual` there.

    Where the block's depths share weights, the mixer reads norm(x + link(x, tokens)). Of several residual streams it
    reads a mean, and what it gives is added to each times a gate, see `layers.streams`; one that is of streams reads
    and adds to all as they are.
    """

    def __init__(self, symbol: str, config: ModelConfig, *, rngs: nnx.Rngs, depth: jax.Array | int = 0):
        """rngs: parameters follow from it, in this order: mixer, link, reader. depth: index into the pattern."""
        make = make_options(config, rngs, depth)
        block: Any = config.blocks[symbol]
        self.residual_multiplier, self.of_normed = config.residual_multiplier, config.normed_residual.get(symbol)
        before, after = config.norms(symbol)
        before = before and not of_streams(block) and config.streams is None
        self.norm = stream_norm(config, inside=True) if before else None
        self.after_norm = stream_norm(config, inside=True) if after else None
        self.scales = ChannelScales(config.d_model) if config.channel_scales else None
        self.passes = passes(block, config.d_model) > 0
        self.reads_tokens = reads_tokens(block)
        self.mixer: Any = block.build(config.width(symbol), make)
        self.link: Any = block.build_link(config.d_model, make) if shares(block) else None
        several = config.streams is not None and not of_streams(block)
        self.reader = stream_reader(config, rngs, adds=True) if several else None

    @property
    def cache_grows(self) -> bool:
        """The cache grows with the number of tokens."""
        return self.mixer.cache_grows or (self.link is not None and self.link.cache_grows)

    def __call__(self, x, tokens: Tokens) -> Output:
        """The residual stream behind the sublayer, and the mixer's statistics, or what it is inspected for.

        x: x_BTD, or (x_BTD, passed_BTR) in a model with blocks that hand something on; so is what it gives."""
        if isinstance(x, tuple):
            x_BTD, passed_BTR = x
            if not self.passes:
                y_BTD, stats = self(x_BTD, tokens)
                both: Any = (y_BTD, passed_BTR)
                return Output(both, stats)
            u_BTD = self._normed(x_BTD)
            (y_BTD, stats), on_BTR = self.mixer.pass_on(u_BTD, passed_BTR, tokens)
            stats = self._inspect(x_BTD, u_BTD, tokens, passed_BTR) if tokens.inspect else stats
            both = (self._add(x_BTD, u_BTD, y_BTD), on_BTR)
            return Output(both, stats)
        x_BTD = u_BTD = x
        if self.link is not None:
            with jax.named_scope("link"):
                u_BTD = x_BTD + self.link(x_BTD, tokens)
        if u_BTD is x and self.reader is self.of_normed is None and not tokens.inspect and fork.serves(self.norm, x):
            with jax.named_scope("norm"):
                (x_BTD, u_BTD), gates = fork.fork(self.norm, x, fork.readers(self.mixer, x.shape)), None
        else:
            u_BTD, gates = self._read(u_BTD)
        y_BTD, stats = self.mixer.mix(u_BTD, tokens)
        stats = self._inspect(x_BTD, u_BTD, tokens) if tokens.inspect else stats
        return Output(self._add(x_BTD, u_BTD, y_BTD, gates), stats)

    @jax.named_scope("inspect")
    def _inspect(self, x_BTD, u_BTD, tokens: Tokens, passed_BTR=None) -> dict[str, jax.Array]:
        """What the mixer says of itself, and the link behind its name."""
        of_link = {} if self.link is None else inspect(self.link, x_BTD, tokens)
        of_mixer = inspect(self.mixer, u_BTD, tokens, passed_BTR)
        return of_mixer | {f"link.{name}": value for name, value in of_link.items()}

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> Any:
        """The mixer's cache; with a link that and the link's, by name."""
        cache = caches.make(self.mixer, batch, max_len, layout)
        return (
            cache if self.link is None else {"mixer": cache, "shared": caches.make(self.link, batch, max_len, layout)}
        )

    def extend(self, x, cache: Any, length_B, real_BT, layer, tokens: Tokens) -> tuple[Any, Any]:
        """The next T tokens from the cache, and the cache after them. x: as in a call."""
        if isinstance(x, tuple):
            if self.passes and hasattr(self.mixer, "extend_on"):
                u_BTD, at = self._normed(x[0]), (cache, length_B, real_BT, layer)
                y_BTD, passed_BTR, cache = self.mixer.extend_on(u_BTD, x[1], *at, gaps=tokens.gaps)
                return (self._add(x[0], u_BTD, y_BTD), passed_BTR), cache
            if self.passes:  # every token by itself: there is nothing in the cache
                ids = None if real_BT is None else real_BT.astype(jnp.int32)
                return self(x, Tokens(ids, gaps=tokens.gaps)).y_BTD, cache
            y_BTD, cache = self.extend(x[0], cache, length_B, real_BT, layer, tokens)
            return (y_BTD, x[1]), cache
        x_BTD = x
        if self.link is None:
            return self._extend_mixer(x_BTD, x_BTD, cache, length_B, real_BT, layer, tokens)
        with jax.named_scope("link"):
            more_BTD, of_shared = self.link.extend(x_BTD, cache["shared"], length_B, real_BT, layer, tokens)
        u_BTD = x_BTD + more_BTD
        x_BTD, new = self._extend_mixer(x_BTD, u_BTD, cache["mixer"], length_B, real_BT, layer, tokens)
        return x_BTD, {"mixer": new, "shared": of_shared}

    def _extend_mixer(self, x_BTD, u_BTD, cache, length_B, real_BT, layer, tokens: Tokens):
        if (found := self._in_few_kernels(x_BTD, cache, length_B, real_BT, layer)) is not None:
            return found
        u_BTD, gates = self._read(u_BTD)
        more = {"ids_BT": tokens.ids_BT} if self.reads_tokens else {}
        y_BTD, new = self.mixer.extend(u_BTD, cache, length_B, real_BT, layer, gaps=tokens.gaps, **more)
        return self._add(x_BTD, u_BTD, y_BTD, gates), new

    def _in_few_kernels(self, x_BTD, cache, length_B, real_BT, layer):
        """`_extend_mixer` of one token a row where `layers.one_row` serves it, or None."""
        plain = self.link is self.after_norm is self.scales is self.of_normed is self.reader is None
        if not plain or not hasattr(self.mixer, "extend_row") or not one_row.served(x_BTD, self.norm, real_BT):
            return None
        return self.mixer.extend_row(one_row.Row(x_BTD, self.norm, self.residual_multiplier), cache, length_B, layer)

    def _read(self, x) -> tuple[jax.Array, jax.Array | None]:
        """What the mixer reads of the stream, or streams; of these the gates of what it gives."""
        if self.reader is None:
            return self._normed(x), None
        with jax.named_scope("read"):
            return self.reader.read(x)

    @jax.named_scope("norm")
    def _normed(self, x_BTD):
        return x_BTD if self.norm is None else checkpoint_name(self.norm(x_BTD), fork.NORMED)

    @jax.named_scope("add")
    def _add(self, x_BTD, u_BTD, y_BTD, gates_BTC=None):
        """The stream x with the mixer's output y from its input u. gates: of several streams."""
        if gates_BTC is not None:
            return sharding.constrain(streams.add(x_BTD, y_BTD, gates_BTC), *sharding.STREAM)
        y_BTD = y_BTD if self.after_norm is None else self.after_norm(y_BTD)
        multiplier = self.residual_multiplier
        if self.of_normed is not None:
            kept, multiplier = self.of_normed
            x_BTD = scaled(u_BTD, kept)
        x_BTD, y_BTD = (x_BTD, y_BTD) if self.scales is None else self.scales(x_BTD, y_BTD)
        y_BTD = scaled(y_BTD, multiplier)
        return sharding.constrain(exchange.add_rows(x_BTD, y_BTD), *sharding.STREAM)
