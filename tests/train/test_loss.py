# SPDX-License-Identifier: Apache-2.0
"""Chunked cross entropy: optax's value and gradients, without an array of [B, T, V]."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybridlm.train.loss import cross_entropy

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
