# SPDX-License-Identifier: Apache-2.0
"""Tables whose gradients each device sums by itself, as on GPUs: the same step as without."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import pytest

from hybridlm import exchange
from hybridlm.layers import norm, qk_norm
from hybridlm.layers.norm import rms_normalise
from hybridlm.train import layout, loss
from hybridlm.train.layout import tables_once
from hybridlm.train.metrics import on_host
from pallas_kernels import gated_norm, gated_product, head_norm, rms_norm
from tests.train.conftest import first_state, make_batch, small_program
from tests.train.test_step import options, relative

WORDS = options("adamw")
ONCE = ("optim.gather_once=True", "optim.scatter_once=True")
UNTIED, TIMES = "model.tie_embeddings=False", "model.embedding_multiplier=1.7"


def steps(words, sizes=(1, 1, 1)):
    """(config, mesh, parameters, metrics of three steps) on a mesh of data, fsdp, tensor, context."""
    config, mesh, program = small_program.__wrapped__(words, sizes)
    with jax.set_mesh(mesh):
        state, history = first_state(config, program), []
        for step in range(3):
            batch = jax.device_put(make_batch(config, step), program.batch_sharding)
            state, metrics = program.train_step(state, batch)
            history.append(on_host(metrics))
        return config, mesh, jax.device_get(state["params"]), history


@cache
def expected(words):
    """(parameters, metrics) of the steps as they are without."""
    return steps(words)[2:]


def rms_norm_gradients(x_RC, weight_C, grads_RC, beside_RC, eps):
    """`pallas_kernels.rms_norm`, by definition."""
    norm = lambda x, weight: rms_normalise(x, eps) * weight[None]
    grad_RC = sum(g.astype(jnp.float32) for g in grads_RC)
    dx_RC, d_weight_C = jax.vjp(norm, x_RC.astype(jnp.float32), weight_C)[1](grad_RC)
    return (dx_RC + beside_RC).astype(x_RC.dtype), d_weight_C


def gated_norm_gradients(y_RC, z_RC, weight_C, d_out_RC, eps, before_gate):
    """`pallas_kernels.gated_norm`, by definition."""

    def norm(y, z, weight):
        gate = jax.nn.silu(z)
        return (
            rms_normalise(y, eps) * weight[None] * gate if before_gate else rms_normalise(y * gate, eps) * weight[None]
        )

    wide = [a.astype(jnp.float32) for a in (y_RC, z_RC, d_out_RC)]
    dy_RC, dz_RC, d_weight_C = jax.vjp(norm, *wide[:2], weight_C)[1](wide[2])
    return dy_RC.astype(y_RC.dtype), dz_RC.astype(z_RC.dtype), d_weight_C


def gated_product_gradients(h_RcF, d_RF):
    """`pallas_kernels.gated_product`, by definition."""
    product = lambda h: jax.nn.silu(h[:, 0]) * h[:, 1]
    return jax.vjp(product, h_RcF.astype(jnp.float32))[1](d_RF.astype(jnp.float32))[0].astype(h_RcF.dtype)


def gated_products(x_RD, w_DcF):
    """`pallas_kernels.gated_product`, by definition."""
    h = jnp.tensordot(x_RD, w_DcF, 1)
    return h, jax.nn.silu(h[:, 0]) * h[:, 1]


def hidden_gradients(dy_RD, w_FD, h_RcF):
    """`pallas_kernels.gated_product`, by definition."""
    return gated_product_gradients(h_RcF, dy_RD @ w_FD.T)


def head_norm_of(x_RHP, weight_P, turn_RcC, eps, factor=1.0, n_heads=None):
    """`pallas_kernels.head_norm.head_norm`, by definition."""
    x_RHP = x_RHP[:, :n_heads]
    y = rms_normalise(x_RHP, eps) * (weight_P * factor)[None, None]
    first, second = jnp.split(y, 2, axis=-1)
    cos, sin = turn_RcC[:, 0, None], turn_RcC[:, 1, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_RHP.dtype)


def head_norm_gradients(x_RHP, weight_P, turn_RcC, dy_RHP, eps, factor=1.0, n_heads=None):
    """Its gradient."""
    rest = lambda x: x[:, x.shape[1] if n_heads is None else n_heads :]
    both = lambda x, w: (head_norm_of(x, w, turn_RcC, eps, factor, n_heads), rest(x))
    dy = dy_RHP.astype(jnp.float32)
    dx, d_weight = jax.vjp(both, x_RHP.astype(jnp.float32), weight_P)[1]((dy[:, :n_heads], rest(dy)))
    return dx.astype(x_RHP.dtype), d_weight


KERNELS = {
    rms_norm_gradients: rms_norm, gated_norm_gradients: gated_norm, gated_product_gradients: gated_product,
    head_norm_gradients: head_norm, head_norm_of: head_norm,
}  # fmt: skip
SLOW = pytest.mark.slow
ONE, DATA, FSDP, TENSOR, CONTEXT = (1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (1, 2, 1, 4)
FEW = [ONE, DATA, FSDP, TENSOR, CONTEXT]
"""Sizes of meshes."""


@pytest.mark.parametrize(
    ("more", "meshes"),
    [
        pytest.param((), [TENSOR], id="tied, tensor"),
        pytest.param((), [ONE, DATA, FSDP, CONTEXT], id="tied", marks=SLOW),
        pytest.param((UNTIED,), [*FEW, (1, 2, 1)], id="untied", marks=SLOW),
        pytest.param((UNTIED, TIMES), [DATA, CONTEXT], id="times, data and context"),
        pytest.param((UNTIED, TIMES), [ONE, FSDP, TENSOR], id="times", marks=SLOW),
        pytest.param((TIMES,), [*FEW, (1, 2, 1)], id="tied times", marks=SLOW),
    ],
)
def test_as_on_gpus(more, meshes, monkeypatch):
    """With whole sums, matrices taken apart and together, and norms of heads and gradients of norms and gates as their
    kernels make them, each device those of its own tokens."""
    params, history = expected((*WORDS, *more))
    monkeypatch.setitem(loss.LOGITS, "cpu", 1000)
    monkeypatch.setattr(layout, "APART", {"cpu"})
    monkeypatch.setattr(exchange, "_holding", lambda n_tokens: exchange._held)  # as of long rows
    called = set()
    monkeypatch.setattr(qk_norm, "is_faster", lambda rope, d_head: True)
    monkeypatch.setattr(norm, "LEAST", 0)
    for kernel, module in KERNELS.items():
        said = lambda *args, kernel=kernel, **more: called.add(kernel) or kernel(*args, **more)
        monkeypatch.setattr(module, "why_not", lambda *_: None)
        monkeypatch.setattr(module, kernel.__name__.removesuffix("_of"), said)
    for sizes in meshes:
        n_micro = 1 if sizes == (2, 1, 1) else 2
        called.clear()
        check_same_step((*more, f"optim.accumulate={n_micro}", *(ONCE if sizes[1] > 1 else ())), sizes, params, history)
        assert called == {*KERNELS} - ({gated_norm_gradients} if sizes[2] > 1 else set()), sizes


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        pytest.param((1, 1, 1), (), id="one device"),
        pytest.param((2, 1, 1), ("optim.accumulate=1",), id="data, one microbatch", marks=SLOW),
        pytest.param((2, 1, 1), (), id="data", marks=SLOW),
        pytest.param((1, 2, 1), (), id="fsdp", marks=SLOW),
        pytest.param((1, 2, 1), ONCE, id="fsdp, once", marks=SLOW),
        pytest.param((1, 2, 1, 2), (*ONCE, "model.remat=kernels"), id="fsdp, context, hidden made again"),
        pytest.param((2, 1, 2), (), id="data, tensor"),
        pytest.param((1, 1, 4), (), id="tensor", marks=SLOW),
    ],
)
def test_gated_products_as_on_gpus(sizes, more, monkeypatch):
    """With what stands between the MLP's products made by them, of each device's widths where tokens go round."""
    params, history = expected(WORDS)
    monkeypatch.setattr(layout, "APART", {"cpu"})
    monkeypatch.setattr(exchange, "_holding", lambda n_tokens: exchange._held)  # as of long rows
    called = set()
    for function in (gated_products, hidden_gradients):
        said = lambda *args, function=function: called.add(function) or function(*args)
        monkeypatch.setattr(gated_product, function.__name__, said)
    monkeypatch.setattr(gated_product, "why_not_products", lambda *_: None)
    _, _, many, many_history = steps((*WORDS, "optim.accumulate=2", *more), sizes)
    for a, b in zip(many_history, history, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4)
    assert relative(many, params) < 5e-4
    assert called == {gated_products, hidden_gradients}


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), (UNTIED, TIMES)], ids=["tied", "times"])
def test_sums_of_one_microbatch(more, monkeypatch):
    """Over fsdp where there is room, and over context."""
    params, history = expected((*WORDS, *more))
    monkeypatch.setitem(loss.LOGITS, "cpu", 1000)
    monkeypatch.setattr(layout, "_fits", lambda n_bytes, mesh: True)
    for sizes in [(1, 2, 1), (2, 2, 2), (1, 1, 1, 4)]:
        check_same_step(more, sizes, params, history)


def check_same_step(more, sizes, params, history):
    """Three steps on a mesh that has such sums give these parameters and metrics."""
    config, mesh, many, many_history = steps((*WORDS, *more), sizes)
    assert tables_once(config, mesh).names, sizes
    for a, b in zip(many_history, history, strict=True):
        chex.assert_trees_all_close(a, b, rtol=1e-4)
    assert relative(many, params) < 5e-4
