# SPDX-License-Identifier: Apache-2.0
"""A model without its values, and one whose parameters are born sharded on a mesh."""

import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from hybridlm.errors import require
from hybridlm.layers.params import param_info
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM
from hybridlm.sharding import RULES, param_shardings
from pallas_kernels.platform import platform_of


class Abstract(NamedTuple):
    """A model without its values; shapes and info are nested dicts, as `nnx.to_pure_dict` makes them of parameters."""

    graphdef: nnx.GraphDef
    """`nnx.merge(graphdef, params)` is the model with these parameters, a nested dict or a State."""
    shapes: dict
    """jax.ShapeDtypeStruct of each parameter."""
    info: dict
    """ParamInfo of each parameter."""

    def model(self) -> HybridLM:
        """A model of its own with shapes in place of values."""
        return nnx.merge(self.graphdef, self.shapes)


@functools.cache
def abstract(config: ModelConfig) -> Abstract:
    """The model of a config without its values, made once for each config."""
    return _without_values(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))


@functools.cache
def stacked(config: ModelConfig) -> Abstract:
    """The same of `HybridLM.stacked()`, the model as its program reads it."""
    return _without_values(nnx.eval_shape(lambda model: model.stacked(), abstract(config).model()))


def _without_values(model: HybridLM) -> Abstract:
    graphdef, params = nnx.split(model, nnx.Param)
    shapes = nnx.to_pure_dict(params)
    info = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(param_info(params)))
    return Abstract(graphdef, shapes, info)


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """ConfigError for the first size of the model that the mesh cannot split.

    Key/value heads and state groups need not divide: fewer of them than tensor shards are replicated.
    """
    sizes = [("d_model", config.d_model, "d_model"), ("vocab_size", config.vocab_size, "vocab")]
    for symbol in dict.fromkeys(config.pattern):
        of_block = config.blocks[symbol].split(config.d_model)
        sizes += [(f"blocks.{symbol}.{name}", size, axis) for name, size, axis in of_block]
    for name, size, axis in sizes:
        mesh_axes = RULES[axis]
        n = math.prod(mesh.shape.get(mesh_axis, 1) for mesh_axis in mesh_axes)
        require(size % n == 0, f"model.{name} ({size}) not divisible by mesh.{' * mesh.'.join(mesh_axes)} ({n})")


def init_sharded(config: ModelConfig, mesh: Mesh, seed: int) -> HybridLM:
    """HybridLM whose parameters are born on their devices: no device ever holds a whole sharded parameter.

    The values depend on the seed alone, not on the mesh. ConfigError where the mesh cannot split the model.
    """
    draw = compile_init(config, mesh)
    graphdef, shapes, _ = abstract(config)
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(shapes), draw(jax.random.key(seed))))


def compile_init(config: ModelConfig, mesh: Mesh) -> jax.stages.Compiled:
    """The program from a random key to the leaves of the sharded parameters, in the order of `abstract(config)`."""
    check_model(config, mesh)

    def build(key: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(nnx.state(HybridLM(config, rngs=nnx.Rngs(key))))

    shardings = jax.tree.leaves(param_shardings(abstract(config).info, mesh))
    on_cpu = platform_of(mesh.devices.flat[0]) == "cpu"  # where full effort triples the time to compile
    options: dict[str, Any] | None = {"xla_backend_optimization_level": 1} if on_cpu else None
    with jax.set_mesh(mesh):
        draw = jax.jit(build, out_shardings=shardings)
        return draw.lower(jax.eval_shape(jax.random.key, 0)).compile(options)
