# SPDX-License-Identifier: Apache-2.0
"""Look-ups in a table that a mesh splits: those of a whole one, gradients included, and nothing whole on a device."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hybridlm import exchange, sharding
from hybridlm.config import MeshConfig
from hybridlm.layers import vocabulary
from hybridlm.plan import hlo
from hybridlm.plan.slices import slice_devices
from hybridlm.sharding import STREAM, make_mesh
from hybridlm.train.loss import cross_entropy, training_loss
from pallas_kernels import platform
from tests.model.model_support import QUICK
from tests.tolerances import check_close

V, D, B, T, CHUNK = 88, 24, 8, 16, 8
ONE = MeshConfig(1)
MESHES = {
    "fsdp": replace(ONE, fsdp=8),
    "tensor": replace(ONE, tensor=8),
    "data": replace(ONE, data=8),
    "fsdp, tensor": replace(ONE, fsdp=2, tensor=4),
    "data, fsdp, context": replace(ONE, data=2, fsdp=2, context=2),
    "fsdp, tensor, context": replace(ONE, fsdp=2, tensor=2, context=2),
    "expert, fsdp": replace(ONE, expert=4, fsdp=2),
}
SHAPES = {
    "": (B, T, V),
    "one row": (1, T, V),
    "tokens that tensor does not divide": (B, 6, V),
    "vocabulary that tensor does not divide": (B, T, V - 1),
}
CASES = [(mesh, "") for mesh in MESHES] + [("fsdp, tensor", shape) for shape in SHAPES if shape]


def inputs(shape, dtype):
    batch, tokens, vocab = SHAPES[shape]
    rng = np.random.default_rng(0)
    table_VD = rng.normal(size=(vocab, D)).astype(np.float32)
    ids_BT = rng.integers(0, vocab, (batch, tokens)).astype(np.int32)
    ids_BT[0, :5] = (0, vocab - 1, 7, 8, 8)  # ends, both sides of a chunk's edge, the same twice
    return table_VD, ids_BT, jnp.asarray(rng.normal(size=(batch, tokens, D)), dtype)


def on_mesh(mesh, table_VD, run):
    """`run(placed table)` jitted on the mesh, traced anew: results, and the program's text."""
    with jax.set_mesh(mesh):
        axes = [sharding.split_axes(name, size) or None for name, size in zip(vocabulary.TABLE, table_VD.shape)]
        at = jax.NamedSharding(mesh, jax.P(*axes))
        compiled = (
            jax.jit(lambda table_VD: run(table_VD))
            .lower(jax.ShapeDtypeStruct(table_VD.shape, jnp.float32, sharding=at))
            .compile(QUICK)
        )
        return compiled(jax.device_put(table_VD, at)), compiled.as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_look_up(name, shape, dtype):
    table_VD, ids_BT, weight_BTD = inputs(shape, dtype)

    def run(table_VD, chunk=CHUNK):
        look_up = lambda w_VD: vocabulary.look_up(w_VD, ids_BT, dtype, 1.7, chunk)
        x_BTD, pull = jax.vjp(look_up, table_VD)
        return x_BTD, pull(weight_BTD)[0]

    (x_BTD, grad), _ = on_mesh(make_mesh(MESHES[name]), table_VD, run)
    np.testing.assert_array_equal(x_BTD, (1.7 * table_VD)[ids_BT].astype(jnp.dtype(dtype)))
    expected = np.zeros_like(table_VD, dtype=np.float64)
    np.add.at(expected, ids_BT.reshape(-1), 1.7 * np.asarray(weight_BTD, np.float64).reshape(-1, D))
    check_close(grad, expected, dtype="float32", what="gradient of the table")


@pytest.mark.parametrize("name", ["fsdp", "fsdp, tensor, context"])
def test_look_up_in_all_rows_at_once(name):
    """As on a GPU: a gather and a sum by index, and no product with ones."""
    table_VD, ids_BT, weight_BTD = inputs("", "bfloat16")

    def run(table_VD):
        x_BTD, pull = jax.vjp(lambda w_VD: vocabulary.look_up(w_VD, ids_BT, "bfloat16", 1.7), table_VD)
        return x_BTD, pull(weight_BTD)[0]

    with platform.assume_platform("gpu", capability="9.0"):
        (x_BTD, grad), text = on_mesh(make_mesh(MESHES[name]), table_VD, run)
    assert " dot(" not in text
    np.testing.assert_array_equal(x_BTD, (1.7 * table_VD)[ids_BT].astype(jnp.bfloat16))
    expected = np.zeros_like(table_VD, dtype=np.float64)
    np.add.at(expected, ids_BT.reshape(-1), 1.7 * np.asarray(weight_BTD, np.float64).reshape(-1, D))
    check_close(grad, expected, dtype="float32", what="gradient of the table")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["fsdp", "fsdp, tensor, context"])
def test_look_up_adds_to_sums(name, tied):
    """Of each device's own sums: all together are the gradient, with the sums that were begun unless another has
    them."""
    table_VD, ids_BT, weight_BTD = inputs("", "bfloat16")
    begun_VD = np.random.default_rng(1).normal(size=table_VD.shape).astype(np.float32)

    def run(table_VD):
        axes = vocabulary.places(ids_BT.shape, table_VD.shape).tokens
        more_NVD = jnp.zeros((math.prod(sharding.axis_size(axis) for axis in axes) - 1, *table_VD.shape))
        sums_NVD = jnp.concatenate([jnp.asarray(begun_VD)[None], more_NVD])
        look_up = lambda sums: vocabulary.look_up(vocabulary.Summed(table_VD, sums, tied), ids_BT, "bfloat16", 1.7)
        x_BTD, pull = jax.vjp(look_up, sums_NVD)
        return x_BTD, pull(weight_BTD)[0].sum(0)

    (x_BTD, sums), _ = on_mesh(make_mesh(MESHES[name]), table_VD, run)
    np.testing.assert_array_equal(x_BTD, (1.7 * table_VD)[ids_BT].astype(jnp.bfloat16))
    expected = np.zeros_like(table_VD, dtype=np.float64) if tied else begun_VD.astype(np.float64)
    np.add.at(expected, ids_BT.reshape(-1), 1.7 * np.asarray(weight_BTD, np.float64).reshape(-1, D))
    check_close(sums, expected, dtype="float32", what="sums of the table")


def losses(table_VD, x_BTD, targets_BT, n_logits=None):
    how = {"n_logits": n_logits, "z_loss": 0.1, "multiplier": 0.5, "softcap": 3.0}
    loss = lambda x_BTD, w_VD: training_loss(x_BTD, w_VD, targets_BT, **how)
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_BTD, table_VD)


losses_of_one = jax.jit(losses, compiler_options=QUICK)


def cross_entropies(table_VD, x_BTD, targets_BT):
    def loss(x_BTD, w_VD):
        sums = cross_entropy(x_BTD, w_VD, targets_BT, chunk=CHUNK, multiplier=0.5, softcap=3.0)
        return sums.nats + 0.1 * sums.z

    return jax.value_and_grad(loss, argnums=(0, 1))(x_BTD, table_VD)


cross_entropies_of_one = jax.jit(cross_entropies, compiler_options=QUICK)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_loss_whose_gradient_is_formed_in_the_forward(name, shape):
    table_VD, targets_BT, x_BTD = inputs(shape, "float32")
    targets_BT[0, 3] = -1
    run = partial(losses, x_BTD=x_BTD, targets_BT=targets_BT)
    ((loss, sums), grads), _ = on_mesh(make_mesh(MESHES[name]), table_VD, partial(run, n_logits=3 * V))
    (one, one_sums), one_grads = losses_of_one(table_VD, x_BTD, targets_BT)
    check_close(loss, one, dtype="float32", what="loss")
    check_close(np.stack(sums), np.stack(one_sums), dtype="float32", what="sums")
    for what, grad, expected in zip(("x", "w"), grads, one_grads, strict=True):
        check_close(grad, expected, dtype="float32", what=f"gradient of {what}")


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_cross_entropy(name, shape):
    table_VD, targets_BT, x_BTD = inputs(shape, "float32")
    targets_BT[0, 3] = -1

    run = partial(cross_entropies, x_BTD=x_BTD, targets_BT=targets_BT)
    (loss, grads), _ = on_mesh(make_mesh(MESHES[name]), table_VD, run)
    one, one_grads = cross_entropies_of_one(table_VD, x_BTD, targets_BT)
    check_close(loss, one, dtype="float32", what="loss")
    for what, grad, expected in zip(("x", "w"), grads, one_grads, strict=True):
        check_close(grad, expected, dtype="float32", what=f"gradient of {what}")


def test_nothing_is_whole():
    """Neither table nor gradient: no array of the program has the rows of a device with all their columns."""
    table_VD, ids_BT, _ = inputs("", "float32")

    def run(table_VD):
        def loss(w_VD):
            x_BTD = sharding.constrain(vocabulary.look_up(w_VD, ids_BT, "float32", 1.0, CHUNK), *STREAM)
            return cross_entropy(x_BTD, w_VD, ids_BT, chunk=CHUNK).nats

        return jax.value_and_grad(loss)(table_VD)

    (_, grad), text = on_mesh(make_mesh(MESHES["fsdp, tensor"]), table_VD, run)
    assert grad.addressable_shards[0].data.shape == (V // 4, D // 2)
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    tokens = [B * T // 8 * D * n for n in (1, 4)]  # of the stream; of the table's part, 4 times as many
    assert max(size for size in sizes if size not in tokens) < V // 4 * D


@pytest.mark.parametrize("generation", ["v5e", "v5p", "7x"])
def test_an_axis_over_a_whole_slice(generation, monkeypatch):
    """In two stages, of different sides on planes, cubes and chips of two devices; on each of two slices by itself."""
    monkeypatch.setattr(exchange, "WHOLE_SLICE", 4)
    table_VD, ids_BT, weight_BTD = inputs("", "float32")

    def run(table_VD):
        x_BTD, pull = jax.vjp(lambda w_VD: vocabulary.look_up(w_VD, ids_BT, "float32", 1.0, CHUNK), table_VD)
        return x_BTD, pull(weight_BTD)[0]

    for mesh in (replace(ONE, fsdp=8), replace(ONE, fsdp=4, slice=2)):
        with platform.assume_platform("tpu", generation=generation):
            (x_BTD, grad), text = on_mesh(make_mesh(mesh), table_VD, run)
        (_, expected), at_once = on_mesh(make_mesh(mesh), table_VD, run)
        np.testing.assert_array_equal(x_BTD, table_VD[ids_BT])
        check_close(grad, expected, dtype="float32", what="gradient of the table")
        assert text.count("all-gather(") == 2 * at_once.count("all-gather(") > 0


@pytest.mark.libtpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5e:2x4", "v5e:4x4"])
def test_no_gradient_over_a_whole_slice_is_all_reduced(topology):
    """As the TPU compiler makes it, in a loop over layers: gathers stay gathers, scatters scatters."""
    devices = slice_devices(topology)
    mesh = make_mesh(replace(ONE, fsdp=len(devices)), devices)

    def run(x, w):
        def layer(x, w):
            y = x @ exchange.gather_weight(w, ("fsdp",), 0)
            return jnp.tanh(y), exchange.scatter_weight(x.T @ y, ("fsdp",), 0)

        return jax.lax.scan(layer, x, w)

    split = jax.shard_map(run, in_specs=(P("fsdp"), P(None, "fsdp")), out_specs=(P("fsdp"), P(None, "fsdp")))
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512 * len(devices), 1024), (4, 1024, 1024))]
    with jax.set_mesh(mesh), platform.assume_platform("tpu", generation=topology.partition(":")[0]):
        found = hlo.collectives(hlo.parse(jax.jit(split).trace(*shapes).lower().compile().as_text()))
    assert {c.kind for c in found} - {"collective-permute"} == {"all-gather", "reduce-scatter"}
