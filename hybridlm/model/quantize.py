# SPDX-License-Identifier: Apache-2.0
"""A model's matrices in eight bits: which ones, what the parameters then are, what they take.

All matrices are rounded but those that are used in float32 (routers, recurrent matrices) and those that
`quantize.keep` names. Embeddings and the output projection are bfloat16. Recurrence parameters, norms, convolutions,
biases and attention sinks stay float32. Arithmetic: `layers.quantized`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.errors import require
from hybridlm.layers.params import ParamInfo, contracted_axes, quantized_info
from hybridlm.layers.quantized import TYPES, Quantized, quantise, rounded
from hybridlm.model import init
from hybridlm.model.config import ModelConfig, QuantizeConfig
from hybridlm.model.init import Abstract, stacked
from hybridlm.model.lora import fits, flat, name_of, unflat

STAYS = {
    "embedding": ("embeddings and output", "bfloat16"),
    "matrix": ("other matrices", "bfloat16"),
    "exact": ("matrices used in float32", "float32"),
    "recurrence": ("recurrence parameters", "float32"),
    "conv": ("convolutions", "float32"),
    "norm": ("norms", "float32"),
    "bias": ("biases", "float32"),
    "sink": ("attention sinks", "float32"),
}
"""Kind of parameter -> what it is, and the type in which a quantised model has it."""


class Row(NamedTuple):
    """Some of a model's parameters."""

    what: str
    parameters: int
    dtype: str
    """That of a quantised model."""
    bytes: int
    """What they take there, scales included."""
    before: int
    """What they take with matrices and embeddings in bfloat16."""
    names: tuple[str, ...]
    """Of the matrices among them; empty for other kinds."""


def chosen(quantize: QuantizeConfig, info: dict) -> dict[tuple, ParamInfo]:
    """The matrices that are rounded, by their paths. info: of the model's parameters.

    Raises ConfigError where a pattern of `quantize.keep` names no matrix, and where they leave none.
    """
    matrices = {path: leaf for path, leaf in flat(info).items() if leaf.kind == "matrix" and not leaf.exact}
    names = sorted({name_of(path) for path in matrices})
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    for pattern in quantize.keep:
        known = any(fits(path, (pattern,)) for path in matrices)
        require(known, f"quantize.keep ({pattern}) fits no matrix of the model, which has {shown or 'none'}")
    left = {path: leaf for path, leaf in matrices.items() if not fits(path, quantize.keep)}
    require(bool(left), f"quantize.keep ({' '.join(quantize.keep)}) leaves no matrix to round: the model has {shown}")
    return left


# Parameters in eight bits -------------------------------------------------------------------------------------------


def parameters(config: ModelConfig, quantize: QuantizeConfig) -> Callable[[dict], dict]:
    """A function that quantises parameters, nested dicts in float, one after the other."""
    info = init.abstract(config).info
    matrices, kinds = chosen(quantize, info), flat(info)
    weights = _weights(quantize)

    def made(params: dict) -> dict:
        found: dict[tuple, Any] = {}
        for path, value in flat(params).items():
            if path in matrices:
                found[path] = quantise(value, contracted_axes(matrices[path]), weights)
            else:
                found[path] = jnp.asarray(value, _stays(kinds[path])[1])
        return unflat(found)

    return made


@functools.cache
def abstract(config: ModelConfig, quantize: QuantizeConfig) -> Abstract:
    """`model.init.abstract` of a model whose parameters are quantised: `Quantized` where a matrix was."""
    of = init.abstract(config)
    matrices, weights = chosen(quantize, of.info), _weights(quantize)
    shapes, info = {}, {}
    for path, leaf in flat(of.info).items():
        if path not in matrices:
            shapes[path], info[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(_stays(leaf)[1])), leaf
            continue
        info[path] = quantized_info(leaf, _scale_shape(leaf))
        shapes[path] = jax.tree.map(
            lambda part: jax.ShapeDtypeStruct(part.shape, TYPES[weights] if part.kind == "quantized" else jnp.float32),
            info[path],
        )
    graphdef = marked(of, matrices, quantize.activations) if quantize.activations else of.graphdef
    return Abstract(graphdef, unflat(shapes), unflat(info))


def of_run(config: ModelConfig, quantize: QuantizeConfig) -> Abstract:
    """The model of a run without its values: quantised where its parameters are."""
    return abstract(config, quantize) if quantize.stored else init.abstract(config)


def as_dicts(tree: Any) -> Any:
    """Parameters as checkpoints hold them: of a quantised matrix its two arrays by name."""
    apart = lambda leaf: {"values": leaf.values, "scale": leaf.scale} if isinstance(leaf, Quantized) else leaf
    return jax.tree.map(apart, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def from_dicts(tree: dict) -> dict:
    """The inverse of `as_dicts`."""
    if tree.keys() == {"values", "scale"}:
        return Quantized(tree["values"], tree["scale"])  # type: ignore[return-value]
    return {name: from_dicts(child) if isinstance(child, dict) else child for name, child in tree.items()}


# Rounded in training ------------------------------------------------------------------------------------------------


def check_trained(config: ModelConfig, quantize: QuantizeConfig) -> None:
    """ConfigError, one line, where a model cannot be trained so."""
    require(
        not quantize.stored,
        "quantize.stored (True) is of a model whose parameters are quantised: train the run that they were made of",
    )
    if quantize.on or quantize.products:
        chosen(quantize, init.abstract(config).info)


def round_matrices(params: dict, config: ModelConfig, quantize: QuantizeConfig) -> dict:
    """Parameters whose matrices are those that a quantised model has, in float32."""
    if quantize.weights is None:
        return params
    leaves = flat(params)
    matrices = chosen(quantize, init.abstract(config).info)
    near = {
        path: rounded(leaves[path], contracted_axes(leaf), quantize.weights)
        for path, leaf in matrices.items()
        if path in leaves
    }
    return unflat(leaves | near)


def stacked_graphdef(config: ModelConfig, quantize: QuantizeConfig) -> nnx.GraphDef:
    """That of the stacked model, whose products round activations, or are taken in fp8, where they are to."""
    of, how = stacked(config), quantize.activations or quantize.products
    return marked(of, chosen(quantize, of.info), how) if how else of.graphdef


def marked(of: Abstract, matrices: dict[tuple, ParamInfo], activations: str) -> nnx.GraphDef:
    """The graphdef of a model the products of whose matrices round their other side."""
    model, found = of.model(), set()
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and tuple(path) in matrices:
            node.set_metadata("activations", activations)
            found.add(tuple(path))
    assert found == matrices.keys()
    return nnx.split(model, nnx.Param)[0]


# What they take -----------------------------------------------------------------------------------------------------


def sizes(config: ModelConfig, quantize: QuantizeConfig) -> list[Row]:
    """What the parameters of a quantised model are, and take, from their shapes alone."""
    info = init.abstract(config).info
    matrices, weights = chosen(quantize, info), _weights(quantize)
    rows: dict[str, list] = {}
    for path, leaf in flat(info).items():
        n = math.prod(leaf.shape)
        if path in matrices:
            what, dtype, size = "matrices", weights, n + 4 * math.prod(_scale_shape(leaf))
        else:
            what, dtype = _stays(leaf)
            size = n * jnp.dtype(dtype).itemsize
        cast = leaf.kind in ("matrix", "embedding") and not leaf.exact
        rows.setdefault(what, []).append((dtype, n, size, (2 if cast else 4) * n, path, leaf.kind))
    return [
        Row(
            what, sum(n for _, n, *_ in found), found[0][0], sum(size for _, _, size, *_ in found),
            sum(before for *_, before, _, _ in found),
            tuple(dict.fromkeys(name_of(path) for *_, path, kind in found if kind == "matrix")),
        )
        for what, found in sorted(rows.items(), key=lambda item: -sum(size for _, _, size, *_ in item[1]))
    ]  # fmt: skip


def _stays(leaf: ParamInfo) -> tuple[str, str]:
    return STAYS["exact" if leaf.exact else leaf.kind]


def _scale_shape(leaf: ParamInfo) -> tuple[int, ...]:
    contracted = contracted_axes(leaf)
    return tuple(1 if axis in contracted else n for axis, n in enumerate(leaf.shape))


def _weights(quantize: QuantizeConfig) -> str:
    require(quantize.weights is not None, "quantize.weights is None: set it to int8 or fp8")
    return str(quantize.weights)
