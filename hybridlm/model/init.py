# SPDX-License-Identifier: Apache-2.0
"""A model whose parameters are born sharded on a mesh."""

import jax
from flax import nnx
from jax.sharding import Mesh

from hybridlm.errors import require
from hybridlm.layers import MLP, Attention, Mamba1, Mamba2, MoE
from hybridlm.layers.blocks import parts
from hybridlm.layers.params import param_info
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM
from hybridlm.sharding import param_shardings


def check_model(config: ModelConfig, mesh: Mesh) -> None:
    """ConfigError for the first size of the model that the mesh cannot split.

    Key/value heads and state groups need not divide: fewer of them than tensor shards are replicated.
    """
    sizes = [("d_model", config.d_model, "fsdp"), ("vocab_size", config.vocab_size, "tensor")]
    for symbol in dict.fromkeys(config.pattern):
        for name, block in parts(config.blocks[symbol], f"blocks.{symbol}"):
            if isinstance(block, Mamba1):
                inner = block.inner(config.d_model) if block.n_heads == 1 else block.n_heads
                sizes.append((f"{name}.{'inner width' if block.n_heads == 1 else 'n_heads'}", inner, "tensor"))
            elif isinstance(block, Mamba2):
                sizes.append((f"{name}.n_heads", block.heads(config.d_model), "tensor"))
            elif isinstance(block, Attention):
                sizes.append((f"{name}.n_heads", block.n_heads, "tensor"))
            elif isinstance(block, MLP):
                sizes.append((f"{name}.d_ff", block.d_ff, "tensor"))
            elif isinstance(block, MoE):
                sizes += [(f"{name}.n_experts", block.n_experts, "expert"), (f"{name}.d_ff", block.d_ff, "tensor")]
                sizes.append((f"{name}.d_latent", block.d_latent or config.d_model, "fsdp"))
                sizes.append((f"{name}.shared.d_ff", 0 if block.shared is None else block.shared.d_ff, "tensor"))
    for name, size, axis in sizes:
        n = mesh.shape.get(axis, 1)
        require(size % n == 0, f"model.{name} ({size}) not divisible by mesh.{axis} ({n})")


def init_sharded(config: ModelConfig, mesh: Mesh, seed: int) -> HybridLM:
    """HybridLM whose parameters are born on their devices: no device ever holds a whole sharded parameter.

    The values depend on the seed alone, not on the mesh. ConfigError where the mesh cannot split the model.
    """
    draw, abstract = compile_init(config, mesh)
    graphdef, params = nnx.split(abstract)
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(params), draw(jax.random.key(seed))))


def compile_init(config: ModelConfig, mesh: Mesh) -> tuple[jax.stages.Compiled, HybridLM]:
    """The program from a random key to the leaves of the sharded parameters, and the abstract model that they fill."""
    check_model(config, mesh)

    def build(key: jax.Array) -> HybridLM:
        return HybridLM(config, rngs=nnx.Rngs(key))

    key = jax.eval_shape(jax.random.key, 0)
    abstract = nnx.eval_shape(build, key)
    shardings = jax.tree.leaves(param_shardings(param_info(abstract), mesh))
    on_cpu = mesh.devices.flat[0].platform == "cpu"  # where full effort triples the time to compile the random draws
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    with jax.set_mesh(mesh):
        draw = jax.jit(lambda key: jax.tree.leaves(nnx.state(build(key))), out_shardings=shardings)
        return draw.lower(key).compile(options), abstract
