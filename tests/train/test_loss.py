# SPDX-License-Identifier: Apache-2.0
"""Chunked cross entropy: optax's value and gradients, without an array of [B, T, V]."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybridlm import sharding
from hybridlm.layers.vocabulary import Summed, places
from hybridlm.sharding import MeshConfig, make_mesh
from hybridlm.train.loss import cross_entropy, training_loss
from pallas_kernels import assume_platform
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close

B, T, D = 2, 6, 8


def inputs(n_vocab, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x_BTD = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    w_VD = jax.random.normal(keys[1], (n_vocab, D)).astype(dtype)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, n_vocab).at[0, 2].set(-1).at[1, T - 1].set(-1)
    return x_BTD, w_VD, targets_BT


def oracle(x_BTD, w_VD, targets_BT, multiplier=1.0, softcap=None):
    """Sums by optax from whole logits, float32."""
    logits = multiplier * x_BTD.astype(jnp.float32) @ w_VD.astype(jnp.float32).T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    valid = targets_BT >= 0
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, targets_BT, 0))
    z = jax.nn.logsumexp(logits, -1) ** 2
    return jnp.sum(nats * valid), jnp.sum(z * valid), valid.sum()


def both(x, w, targets, z_weight=0.3, chunk=16, shards=1, **how):
    """((value, gradients) of ours, of the oracle), the loss a mix of cross entropy and z-loss."""

    def ours(x, w):
        sums = cross_entropy(x, w, targets, chunk=chunk, shards=shards, **how)
        return sums.nats / sums.tokens + z_weight * sums.z

    def theirs(x, w):
        nats, z, tokens = oracle(x, w, targets, **how)
        return nats / tokens + z_weight * z

    return [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, w) for f in (ours, theirs)]


CAPPED = {"multiplier": 0.5, "softcap": 2.0}


@pytest.mark.parametrize(
    ("n_vocab", "chunk", "shards", "how"),
    [
        (16, 16, 1, {}), (50, 7, 1, CAPPED), (50, 64, 1, {}), (48, 6, 4, CAPPED), (50, 5, 4, {}), (3, 1, 4, {}),
        (1, 4, 1, {}), (700, 200, 2, CAPPED),
    ],
)  # fmt: skip
def test_equals_optax(n_vocab, chunk, shards, how):
    ours, theirs = both(*inputs(n_vocab), chunk=chunk, shards=shards, **how)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


def formed(x, w, targets, z_loss=0.3, **how):
    """((objective, sums), gradients) with the gradient formed in the forward."""
    loss = lambda x, w: training_loss(x, w, targets, z_loss=z_loss, **how)
    (total, sums), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, w)
    return total, sums, grads


@pytest.mark.parametrize(
    ("n_vocab", "n_logits", "how"),
    [(50, 10**6, {}), (50, 1, CAPPED), (300, 300, {"z_loss": 0.0}), (3, 5, CAPPED), (1, 1, {})],
)
def test_gradient_formed_in_the_forward_is_that_of_optax(n_vocab, n_logits, how, monkeypatch):
    """Whole, in chunks of 3 tokens that do not divide them, and of 1; without a gradient, too."""
    x, w, targets = inputs(n_vocab)
    z_loss = how.get("z_loss", 0.3)

    def theirs(x, w):
        nats, z, _ = oracle(x, w, targets, **{k: v for k, v in how.items() if k != "z_loss"})
        return nats + z_loss * z, (nats, z)

    (expected, of_sums), expected_grads = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1), has_aux=True))(x, w)
    monkeypatch.setattr("hybridlm.train.loss.TILE", 1)
    total, sums, grads = formed(x, w, targets, n_logits=n_logits, **how)
    alone, sums_alone = jax.jit(lambda x, w: training_loss(x, w, targets, n_logits=n_logits, **{"z_loss": 0.3} | how))(
        x, w
    )
    for value, of in ((total, sums), (alone, sums_alone)):
        check_close(value, expected, dtype="float32", what="objective")
        check_close(jnp.stack(of[:2]), jnp.stack(of_sums), dtype="float32", what="sums")
        assert of.tokens == B * T - 2
    for grad, like in zip(grads, expected_grads, strict=True):
        check_close(grad, like, dtype="float32", what="gradient")


def test_gradient_formed_in_the_forward_of_bfloat16():
    """Sums and gradient of the table are as of float32: only the gradient of the logits is rounded."""
    x, w, targets = inputs(300, jnp.bfloat16)
    w = w.astype(jnp.float32)
    total, _, grads = formed(x, w, targets, z_loss=0.0, n_logits=1500)
    (expected, _), expected_grads = jax.value_and_grad(
        lambda x, w: oracle(x, w, targets)[:2], argnums=(0, 1), has_aux=True
    )(x.astype(jnp.float32), w)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32]
    for grad, like in zip(grads, expected_grads, strict=True):
        assert np.linalg.norm(np.asarray(grad, np.float32) - like) < 0.01 * np.linalg.norm(like)


def test_only_a_gpu_forms_the_gradient_in_the_forward_whole_table_or_split():
    x, w, targets = inputs(64)
    products = lambda: str(jax.make_jaxpr(jax.grad(lambda w: training_loss(x, w, targets)[0]))(w)).count("dot_general")
    assert products() == 4  # the logits twice
    with assume_platform("gpu", capability="8.0"):
        assert products() == 3
        with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
            assert products() == 3


def test_gradient_formed_in_the_forward_over_devices():
    x, w, targets = inputs(64)
    one = formed(x, w, targets, n_logits=128)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, context=2), jax.devices()[:4])):
        split = formed(x, w, targets, n_logits=128)
        program = jax.jit(jax.grad(lambda w: training_loss(x, w, targets, n_logits=128)[0]))
        assert str(program.trace(w).jaxpr).count("dot_general") == 3  # the logits once
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(one), strict=True):
        check_close(a, b, dtype="float32", what="objective, sums and gradients")


def kernel_in_plain_words(z_RV, base_R, factor):
    """As `pallas_kernels.exponentials.exponentials`, without rounding."""
    z_RV = factor * z_RV
    largest_R = z_RV.max(1)
    base_R = jnp.where(largest_R - base_R > 60, largest_R, base_R)
    e_RV = jnp.exp(z_RV - base_R[:, None])
    return e_RV, e_RV.sum(1), base_R


def products_in_plain_words(x_RD, w_VD, base_R, factor):
    """As `pallas_kernels.exponentials.product_exponentials`, without rounding."""
    return kernel_in_plain_words(jnp.einsum("rd,vd->rv", x_RD, w_VD), base_R, factor)


@pytest.fixture
def by_kernel(monkeypatch):
    monkeypatch.setattr("pallas_kernels.exponentials.why_not", lambda *_: None)
    monkeypatch.setattr("pallas_kernels.exponentials.exponentials", kernel_in_plain_words)


@pytest.mark.parametrize(
    ("scale", "n_logits", "how", "of_products"),
    [
        (1, 10**6, {"multiplier": 0.5}, False), (1, 300, {"z_loss": 0.0}, True),
        (12, 1200, {"multiplier": 1.5, "z_loss": 1e-4}, False), (12, 600, {"multiplier": 1.5, "z_loss": 1e-4}, True),
    ],
)  # fmt: skip
def test_gradient_by_the_kernel_is_that_of_optax(scale, n_logits, how, of_products, by_kernel, monkeypatch):
    """Of logits that are read once, and of products that are not stored; where targets are not the largest by far, too:
    in the last cases by more than a hundred nats."""
    if of_products:
        monkeypatch.setattr("pallas_kernels.exponentials.why_not_products", lambda *_: None)
        monkeypatch.setattr("pallas_kernels.exponentials.product_exponentials", products_in_plain_words)
    x, w, targets = inputs(300)
    how = {"z_loss": 0.3} | how
    total, sums, grads = formed(scale * x, w, targets, n_logits=n_logits, **how)
    nats, z, tokens = oracle(scale * x, w, targets, how.get("multiplier", 1.0))
    check_close(jnp.stack(sums[:2]), jnp.stack([nats, z]), dtype="float32", what="sums")
    check_close(total, nats + how["z_loss"] * z, dtype="float32", what="objective")
    assert sums.tokens == tokens

    def theirs(x, w):
        nats, z, _ = oracle(x, w, targets, how.get("multiplier", 1.0))
        return nats + how["z_loss"] * z

    for grad, like in zip(grads, jax.grad(theirs, (0, 1))(scale * x, w), strict=True):
        check_close(grad, like, dtype="float32", what="gradient")


def test_gradient_by_the_kernel_over_rows_of_the_table(by_kernel):
    x, w, targets = inputs(64)
    one = formed(30 * x, w, targets, n_logits=128)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])):
        split = formed(30 * x, w, targets, n_logits=128)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(one), strict=True):
        check_close(a, b, dtype="float32", what="objective, sums and gradients")


def test_products_are_not_stored_over_devices_with_whole_tables(by_kernel, monkeypatch):
    """Rows of the table that no device shares are no reason to store products: data and fsdp are axes of the mesh, and
    so is a tensor of one."""
    asked = []

    def products(*args):
        asked.append(args[0].shape)
        return products_in_plain_words(*args)

    monkeypatch.setattr("pallas_kernels.exponentials.why_not_products", lambda *_: None)
    monkeypatch.setattr("pallas_kernels.exponentials.product_exponentials", products)
    x, w, targets = inputs(64)
    one = formed(30 * x, w, targets, n_logits=128)
    asked.clear()
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])):
        split = formed(30 * x, w, targets, n_logits=128)
    assert asked
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(one), strict=True):
        check_close(a, b, dtype="float32", what="objective, sums and gradients")


@needs_gpu_interpreter
def test_gradient_by_the_kernel_itself():
    x, w, targets = inputs(512, jnp.bfloat16)
    w = w.astype(jnp.float32)
    plain = formed(4 * x, w, targets, n_logits=2048)
    with assume_platform("gpu", capability="9.0"), mosaic_interpreted():
        ours = formed(4 * x, w, targets, n_logits=2048)
    for a, b in zip(jax.tree.leaves(ours[:2]), jax.tree.leaves(plain[:2]), strict=True):
        check_close(a, b, dtype="float32", what="objective and sums")
    for a, b in zip(ours[2], plain[2], strict=True):
        assert a.dtype == b.dtype
        check_close(a, b, dtype="bfloat16", what="gradient")


def test_large_logits_do_not_overflow_in_one_pass():
    x, w, targets = inputs(50)
    total, _, grads = formed(1e3 * x, 1e2 * w, targets, z_loss=0.0)
    _, (expected, expected_grads) = both(1e3 * x, 1e2 * w, targets, z_weight=0.0)
    np.testing.assert_allclose(total, expected * (B * T - 2), rtol=1e-4)
    for grad, like in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, like * (B * T - 2), rtol=1e-4, atol=1e-3)


def test_bfloat16_keeps_float32_statistics():
    x, w, targets = inputs(300, jnp.bfloat16)
    (ours, ours_grads), (theirs, theirs_grads) = both(x, w, targets, z_weight=0.0)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # the inputs are exact, and so are the statistics
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        assert a.dtype == jnp.bfloat16
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_left_out_targets_have_no_gradient_and_do_not_count():
    x, w, targets = inputs(50)
    grad = jax.grad(lambda x: cross_entropy(x, w, targets, chunk=16).nats)(x)
    assert np.all(grad[0, 2] == 0) and np.all(grad[1, T - 1] == 0) and np.any(grad[0, 0] != 0)
    assert cross_entropy(x, w, targets, chunk=16).tokens == B * T - 2
    nothing = cross_entropy(x, w, jnp.full((B, T), -1), chunk=16)
    assert [float(v) for v in jax.tree.leaves(nothing)] == [0.0, 0.0, 0.0]


def test_large_logits_do_not_overflow():
    x, w, targets = inputs(50)
    ours, theirs = both(1e3 * x, 1e2 * w, targets, z_weight=0.0)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def jaxpr_shapes(jaxpr):
    """Shapes of everything computed, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                yield from jaxpr_shapes(getattr(inner.jaxpr, "jaxpr", inner.jaxpr))
            elif hasattr(inner, "eqns"):
                yield from jaxpr_shapes(inner)


def test_no_logits_of_the_whole_vocabulary():
    n_vocab, chunk = 4096, 256
    x, w, targets = inputs(n_vocab)

    def loss(x, w):
        sums = cross_entropy(x, w, targets, chunk=chunk)
        return sums.nats + sums.z

    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(x, w)
    sizes = [int(np.prod(s)) for s in jaxpr_shapes(traced.jaxpr.jaxpr)]
    assert len(sizes) > 50 and max(sizes) < B * T * n_vocab
    memory = traced.lower().compile().memory_analysis()
    tables = 4 * n_vocab * D
    assert memory.temp_size_in_bytes < 3 * tables + 12 * 4 * B * T * chunk < 4 * B * T * n_vocab * 3


def test_vocabulary_over_devices_is_never_gathered():
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    n_vocab = 4096
    x, w, targets = inputs(n_vocab)
    mesh = jax.make_mesh((2, 1, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    def loss(x, w):
        return cross_entropy(x, w, targets, chunk=256).nats

    single = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)
    with jax.set_mesh(mesh):
        at = (NamedSharding(mesh, P("data")), NamedSharding(mesh, P("tensor")))
        placed = jax.device_put((x, w), at)
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), out_shardings=(None, at))
        split = step(*placed)
        program = step.lower(*placed).compile().as_text()
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    assert "all-gather" not in program and "all-to-all" not in program


@pytest.mark.parametrize(
    ("mesh", "how"),
    [(None, CAPPED), (MeshConfig(data=2, context=2), {}), (MeshConfig(1, fsdp=2, tensor=2), {})],
    ids=["one", "data, context", "fsdp, tensor"],
)
def test_gradient_of_a_table_is_added_to_sums(mesh, how):
    """Each device's sums are what they were and what its tokens add: all together, the sums and the gradient."""
    x, w, targets = inputs(64)
    how = {"z_loss": 0.3, "n_logits": 128, "weight": jnp.float32(0.3)} | how
    begun = np.random.default_rng(1).normal(size=w.shape).astype(np.float32)
    total, _, grads = formed(x, w, targets, **how)

    def run(x, begun, times):
        n_devices = math.prod(sharding.axis_size(axis) for axis in places(targets.shape, w.shape).tokens)
        sums = jnp.concatenate([begun[None], jnp.zeros((n_devices - 1, *w.shape))])
        loss = lambda x, sums: times * training_loss(x, Summed(w, sums), targets, **how)[0]
        value, (dx, sums) = jax.value_and_grad(loss, argnums=(0, 1))(x, sums)
        return value, dx, sums.sum(0)

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh, jax.devices()[:4])):
        value, dx, sums = jax.jit(run)(x, begun, 1.0)
        misused = jax.jit(run)(x, begun, 2.0)[2]
    check_close(value, total, dtype="float32", what="objective")
    check_close(dx, grads[0], dtype="float32", what="gradient")
    check_close(sums, begun + grads[1], dtype="float32", what="sums")
    assert np.isnan(misused).all()
