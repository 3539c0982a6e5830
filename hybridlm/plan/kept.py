# SPDX-License-Identifier: Apache-2.0
"""What a remat policy keeps for the backward and what it computes again, known from shapes: nothing is compiled."""

import functools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal

from hybridlm.layers.block import Tokens
from hybridlm.layers.params import in_type, param_info
from hybridlm.model import remat
from hybridlm.model.config import ModelConfig
from hybridlm.model.flops import forward_flops
from hybridlm.model.init import abstract
from hybridlm.model.pattern import places
from pallas_kernels import platform

ELEMENTWISE = 0.02
"""Of the model's FLOPs, about what a policy costs that computes no product again."""


def kept(model: ModelConfig, seq_len: int, chip: str) -> int:
    """Bytes of a row that live from the forward to the backward under `model.remat`, beside the inputs of sublayers: of
    all sublayers, on one device that has the whole of it. chip: as `described_as` takes it."""
    return sum(n * _kept(symbol, model, seq_len, chip) for symbol, n in Counter(model.pattern).items())


def recomputed(model: ModelConfig, seq_len: int) -> float:
    """Of the FLOPs of a step those of products that `model.remat` makes again, and as much as nothing for what is no
    product: for an order of candidates."""
    if model.remat == "none":
        return 0.0
    again = {"full": model.pattern, "mixer": [s for s in model.pattern if model.blocks[s].MIXES_TOKENS]}
    flops = sum(model.blocks[symbol].flops(model.width(symbol), seq_len) for symbol in again.get(model.remat, ""))
    return ELEMENTWISE + flops * (2 if model.complement else 1) / (3 * forward_flops(model, seq_len))


def described_as(chip: str):
    """Within, programs are traced for a chip of the words of a topology: "v5p", "h100", "cpu"."""
    if chip == "cpu":
        return platform.assume_platform("cpu")
    if chip in ("h100", "h200"):
        return platform.assume_platform("gpu", capability="9.0")
    return platform.assume_platform("tpu", generation=chip.removeprefix("tpu"))


@functools.cache
def _kept(symbol: str, model: ModelConfig, seq_len: int, chip: str) -> int:
    """Of a sublayer of the symbol."""
    place = places(model.pattern)[model.pattern.index(symbol)]
    whole = abstract(model).model()
    graphdef, state = nnx.split(whole.groups[place.group][place.position])
    shared = nnx.split(whole.shared[symbol]) if symbol in whole.shared else None

    def call(weights, of_shared, x, tokens):
        tokens = tokens if shared is None else _with(tokens, nnx.merge(shared[0], of_shared))
        y, stats = nnx.merge(graphdef, weights)(x, tokens)
        return y, dict(stats)

    call = remat.wrap(call, model.remat, model.blocks[symbol], in_loop=True)

    def backward(weights, of_shared, x, ids_BT, positions_BT):
        stream = x[0] if model.passed else x
        tokens = Tokens(ids_BT, positions_BT, embedded_BTD=stream, gaps=False)
        return jax.vjp(lambda *inputs: call(*inputs, tokens), weights, of_shared, x)[1]

    arrays = (_of_depth(state, model), None if shared is None else shared[1], *_tokens(model, seq_len))
    with described_as(chip):
        jaxpr = jax.make_jaxpr(backward)(*arrays).jaxpr
    given = {id(v) for v in (*jaxpr.invars, *jaxpr.constvars)}
    made = {id(v): v.aval for v in jaxpr.outvars if not isinstance(v, Literal) and id(v) not in given}
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in made.values())


def _with(tokens: Tokens, shared: Any) -> Tokens:
    return replace(tokens, shared=shared)


def _of_depth(state: Any, model: ModelConfig) -> Any:
    """Shapes of the parameters of one depth, as the program of a step reads them."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), state)
    return jax.eval_shape(lambda state: in_type(state, param_info(state), model.compute_dtype), one)


def _tokens(model: ModelConfig, seq_len: int) -> tuple[Any, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """(the residual stream of a row, with what is handed on beside it; its segment ids, its positions)."""
    shape = (2 if model.complement else 1, seq_len)
    stream = jax.ShapeDtypeStruct((*shape, model.stream_width), jnp.dtype(model.compute_dtype))
    ids_BT = jax.ShapeDtypeStruct(shape, jnp.int32)
    if not model.passed:
        return stream, ids_BT, ids_BT
    return (stream, jax.ShapeDtypeStruct((*shape, model.passed), jnp.float32)), ids_BT, ids_BT
