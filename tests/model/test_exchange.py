# SPDX-License-Identifier: Apache-2.0
"""Products of the stream on a mesh beside those of one device, gradients included: rows or tokens that tensor splits,
tokens that go round, sums that leave one after the other."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import exchange, sharding
from hybridlm.config import MLP, Attention, Mamba2, MeshConfig
from hybridlm.layers import params
from hybridlm.layers.block import Tokens
from hybridlm.model import remat
from pallas_kernels import platform
from tests.model import properties
from tests.model.model_support import QUICK
from tests.tolerances import check_close

ONE, D, T = MeshConfig(1), properties.D, 8
BLOCKS = {
    "mlp": MLP(d_ff=24, bias=True, out_multiplier=0.5),
    "ungated": MLP(d_ff=24, activation="gelu"),
    "attention": Attention(n_heads=4, n_kv_heads=2, d_head=4, gate="head", out_bias=True),
    "mamba": Mamba2(d_state=4, d_head=4, n_heads=4, chunk=4, proj_bias=True),
}
MESHES = {
    "tensor 2": replace(ONE, tensor=2),
    "tensor 4": replace(ONE, tensor=4),
    "fsdp 2, tensor 2, context 2": replace(ONE, fsdp=2, tensor=2, context=2),
}
ROWS = {"rows": 4, "tokens": 3, "neither": 1}
"""Rows of the batch by what tensor splits of the stream; one row of seven tokens it does not split."""
CASES = [("mlp", mesh, "rows") for mesh in MESHES]
CASES += [("ungated", "tensor 2", "tokens"), ("attention", "tensor 2", "rows"), ("attention", "tensor 2", "tokens")]
CASES += [("attention", "tensor 4", "rows"), ("mlp", "tensor 2", "neither"), ("mamba", "tensor 2", "tokens")]
CASES += [("mamba", mesh, "rows") for mesh in MESHES]


def traced(block, mesh: MeshConfig, rows: int, tokens: int, policy: str = "kernels"):
    """(program of the outputs and the gradients of parameters and input of a sublayer under a remat policy, operands);
    to be compiled and run on the mesh."""
    rng = np.random.default_rng(0)
    x_BTD, dy_BTD = (rng.normal(size=(rows, tokens, D)).astype(np.float32) for _ in range(2))
    with on(mesh):
        graphdef, state = properties.mixer_of(block)

        def loss(state, x_BTD):
            x_BTD = sharding.constrain(x_BTD, *sharding.STREAM)
            mix = lambda state, x_BTD: nnx.merge(graphdef, state).mix(x_BTD, Tokens()).y_BTD
            y_BTD = sharding.constrain(remat.wrap(mix, policy, block, in_loop=False)(state, x_BTD), *sharding.STREAM)
            return (y_BTD * dy_BTD).sum(), y_BTD

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True)).trace(state, x_BTD), (state, x_BTD)


def on(mesh: MeshConfig):
    """With as many devices as it has."""
    n = int(np.prod([mesh.fsdp, mesh.tensor, mesh.context]))
    return jax.set_mesh(sharding.make_mesh(mesh, jax.devices()[:n]))


@functools.cache
def run(block, mesh: MeshConfig, rows: int, tokens: int):
    """Outputs, gradients of input and parameters."""
    program, operands = traced(block, mesh, rows, tokens)
    with on(mesh):
        (d_state, dx_BTD), y_BTD = jax.device_get(program.lower().compile(QUICK)(*operands))
    return y_BTD, dx_BTD, nnx.to_pure_dict(d_state)


@pytest.mark.parametrize(("name", "mesh", "split"), CASES)
def test_a_mesh_equals_one_device(name, mesh, split):
    block, rows, tokens = BLOCKS[name], ROWS[split], 7 if split == "neither" else T
    y_BTD, dx_BTD, d_state = run(block, MESHES[mesh], rows, tokens)
    y_one, dx_one, d_one = run(block, ONE, rows, tokens)
    check_close(y_BTD, y_one, dtype="float32", what="y")
    check_close(dx_BTD, dx_one, dtype="float32", what="dx")
    for path, of_one in jax.tree_util.tree_flatten_with_path(d_one)[0]:
        found = d_state
        for key in path:
            found = found[key.key]
        check_close(found, of_one, dtype="float32", what=f"gradient of {jax.tree_util.keystr(path)}")


def exchanges(text: str) -> dict[str, int]:
    """Those of the stream in a traced program; gradients of weights are summed over other axes, here of one device."""
    kinds = re.findall(r"= (all_gather|reduce_scatter|ppermute)\w*\[", text)
    return {kind: kinds.count(kind) for kind in set(kinds)}


def test_tokens_go_round():
    """An MLP on n devices passes each device's tokens and sums n - 1 times forward, and their gradients, the tokens
    once more unless they are kept; nothing is put together."""
    block = BLOCKS["ungated"]
    for n in (2, 4):
        again, kept = (
            exchanges(str(traced(block, replace(ONE, tensor=n), 4, T, policy)[0].jaxpr))
            for policy in ("full", "sublayer_gathered")
        )
        assert again == {"ppermute": 5 * (n - 1)}
        assert kept == {"ppermute": 4 * (n - 1)}


def test_where_the_stream_is_split():
    """Rows over tensor where they divide, else tokens; a TPU's stream by its tokens alone; what does not divide not."""
    with jax.set_mesh(sharding.make_mesh(replace(ONE, fsdp=2, tensor=2, context=2))):
        of = lambda rows, tokens: [
            tuple(axis for axis in of_dim if axis in ("fsdp", "context", "tensor"))
            for of_dim in sharding.dims_axes(sharding.STREAM, (rows, tokens, D))
        ]
        assert of(4, 8) == [("fsdp", "tensor"), ("context",), ()]
        assert of(2, 8) == [("fsdp",), ("context", "tensor"), ()]
        assert of(4, 6) == [("fsdp",), ("context",), ()]
        assert sharding.stream_split(4, 8) == (0, ("tensor",))
        assert sharding.stream_split(2, 8) == (1, ("tensor",))
        assert sharding.stream_split(4, 6) == (1, ())
        with platform.assume_platform("tpu", generation="v5e"):
            assert sharding.stream_split(4, 8) == (1, ("tensor",))


@pytest.mark.parametrize("rows", ROWS)
def test_a_stream_is_added_to_in_rows_of_each_device(rows):
    """As on GPUs, whatever splits it: the sum, with the gradient of both."""
    rng = np.random.default_rng(0)
    x_BTD, y_BTD, dz_BTD = (rng.normal(size=(ROWS[rows], T, D)).astype(np.float32) for _ in range(3))
    mesh = sharding.make_mesh(replace(ONE, fsdp=2, tensor=2, context=2), jax.devices()[:8])
    with jax.set_mesh(mesh), platform.assume_platform("gpu"):
        loss = lambda x, y: (jnp.sin(exchange.add_rows(x, y)) * dz_BTD).sum()
        grads = jax.jit(jax.grad(loss, (0, 1))).trace(x_BTD, y_BTD).lower().compile(QUICK)(x_BTD, y_BTD)
    for grad in grads:
        check_close(grad, np.cos(x_BTD + y_BTD) * dz_BTD, dtype="float32", what=rows)


@pytest.mark.parametrize("mesh", [ONE, MESHES["tensor 2"], MESHES["tensor 4"]], ids=["one", "tensor 2", "tensor 4"])
def test_products_of_one_input_as_on_gpus(mesh):
    """Their gradients are added in turn, those of small matrices are made before, and the numbers are the same."""
    rng = np.random.default_rng(0)
    x_BTD, *weights = (rng.normal(size=shape).astype(np.float32) for shape in ((4, T, D), (D, 64), (D, 48), (D, 8)))
    axes, outs = [("d_model", "d_ff")] * 3, [("batch", "tokens", "d_ff")] * 3

    def products(x, *weights):
        return [jnp.sin(x @ w) for x, w in zip(params.several(x, 3), weights, strict=True)]

    def loss(x, *weights):
        x = sharding.constrain(x, *sharding.STREAM)
        made = exchange.products(products, x, weights, x_axes=sharding.STREAM, weight_axes=axes, out_axes=outs)
        return sum(y.sum() for y in made)

    expected = jax.grad(lambda x, *ws: sum(jnp.sin(x @ w).sum() for w in ws), (0, 1, 2, 3))(x_BTD, *weights)
    with on(mesh), platform.assume_platform("gpu"):
        program = jax.jit(jax.grad(loss, (0, 1, 2, 3))).trace(x_BTD, *weights)
    assert ("optimization_barrier" in str(program.jaxpr)) is (mesh != ONE)
    with on(mesh):
        found = program.lower().compile(QUICK)(x_BTD, *weights)
    for a, b in zip(found, expected, strict=True):
        check_close(a, b, dtype="float32", what="gradient")
