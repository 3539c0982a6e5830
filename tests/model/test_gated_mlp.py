# SPDX-License-Identifier: Apache-2.0
"""A gated MLP whose products make what stands between them: as with passes of its own, whatever is kept."""

import functools
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import MeshConfig
from hybridlm.layers.block import Make, Tokens
from hybridlm.layers.mlp import MLP
from hybridlm.layers.quantized import Wide
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM
from pallas_kernels import assume_platform, gated_product
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter
from tests.tolerances import check_close


@jax.jit
def gated_products(x_RD, w_DcF):
    """Of `pallas_kernels.gated_product`, by definition."""
    h = jnp.tensordot(x_RD, w_DcF, 1)
    return h, jax.nn.silu(h[:, 0]) * h[:, 1]


@jax.jit
def hidden_gradients(dy_RD, w_FD, h_RcF):
    """Likewise."""
    return jax.vjp(lambda h: jax.nn.silu(h[:, 0]) * h[:, 1], h_RcF)[1](dy_RD @ w_FD.T)[0]


def by_definition():
    """Context in which they serve."""
    changes = {"gated_products": gated_products, "hidden_gradients": hidden_gradients}
    return mock.patch.multiple(gated_product, why_not_products=lambda *_: None, **changes)


def lowered(remat: str):
    """Value and gradients of a model of one MLP, jitted anew, lowered and its arguments."""
    config = ModelConfig(
        vocab_size=16, d_model=8, pattern="-", blocks={"-": MLP(d_ff=24)}, compute_dtype="float32", remat=remat
    )
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))
    params = drawn(replace(config, remat="none"))
    tokens = np.arange(2 * 6, dtype=np.int32).reshape(2, 6)
    loss = lambda params: jnp.square(nnx.merge(graphdef, params)(tokens)).mean()
    return jax.jit(jax.value_and_grad(loss)).lower(params), params


@functools.cache
def drawn(config: ModelConfig):
    return jax.jit(lambda: nnx.state(HybridLM(config, rngs=nnx.Rngs(0))))()


@functools.cache
def without_products():
    """(value and gradients, parameters)."""
    plain, params = lowered("none")
    return plain.compile()(params), params


@pytest.mark.parametrize(
    ("remat", "products"),
    [("none", 1), ("kernels,mlp_hidden", 1), ("kernels", 1), ("dots", 1), ("mixer", 1), ("full", 2), ("mlp_hidden", 2)],
)
def test_what_is_kept_is_not_made_again(remat, products):
    """`products`: how often the first product is made."""
    expected, params = without_products()
    with by_definition():
        ours, _ = lowered(remat)
    assert ours.as_text().count("call @gated_products") == products
    assert ours.as_text().count("call @hidden_gradients") == 1
    actual = ours.compile()(params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        check_close(a, b, dtype="float32", what="loss or gradient")


@pytest.mark.parametrize(
    "change",
    [{"activation": "geglu"}, {"bias": True}, {"gate_multiplier": 0.5}, {"activation": "silu"}],
)
def test_others_are_as_before(change):
    x = jnp.ones((1, 4, 8), jnp.float32)
    with by_definition():
        mixer = MLP(d_ff=24, **change).build(8, Make(nnx.Rngs(0), 0.02, 0.02, "float32", 1e-5))
        text = jax.jit(jax.grad(lambda x: mixer.mix(x, Tokens()).y_BTD.sum())).lower(x).as_text()
    assert "gated_products" not in text


@pytest.mark.parametrize("tensor", [2, 4])
def test_where_tokens_go_round(tensor):
    """Each device makes its widths of all tokens by the kernels; the same numbers, gradients included."""
    graphdef, state = nnx.split(MLP(d_ff=24).build(8, Make(nnx.Rngs(0), 0.5, 0.5, "float32", 1e-5)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8)), jnp.float32)
    loss = lambda state, x: jnp.square(nnx.merge(graphdef, state).mix(x, Tokens()).y_BTD).sum()
    expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)
    mesh = sharding.make_mesh(MeshConfig(1, tensor=tensor), jax.devices()[:tensor])
    with by_definition(), jax.set_mesh(mesh):
        ours = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(state, x)
        actual = ours.compile()(state, x)
    assert ours.as_text().count("call @gated_products") == ours.as_text().count("call @hidden_gradients") == tensor
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        check_close(a, b, dtype="float32", what="loss or gradient")


def test_nothing_is_stored_where_nothing_is_differentiated():
    x = jnp.ones((1, 4, 8), jnp.float32)
    with by_definition():
        mixer = MLP(d_ff=24).build(8, Make(nnx.Rngs(0), 0.02, 0.02, "float32", 1e-5))
        text = jax.jit(lambda x: mixer.mix(x, Tokens()).y_BTD).lower(x).as_text()
    assert "gated_products" not in text


@needs_gpu_interpreter
@pytest.mark.parametrize("wide", [False, True], ids=["", "sums of gradients"])
def test_by_the_kernels(wide):
    """Values and gradients, interpreted, against float32 arrays."""
    rng = np.random.default_rng(0)
    make = lambda std, *shape: jnp.asarray(std * rng.standard_normal(shape), jnp.bfloat16)
    graphdef, state = nnx.split(MLP(d_ff=256).build(64, Make(nnx.Rngs(0), 0.02, 0.02, "bfloat16", 1e-5)))
    x, dy = make(1.0, 2, 128, 64), make(1.0, 2, 128, 64)
    weights = {"w_in": make(0.25, 64, 2, 256), "w_out": make(0.0625, 256, 64)}
    slots = {name: jnp.zeros((1, *w.shape), jnp.float32) for name, w in weights.items()}

    def run(x, weights, slots=None):
        values = weights if slots is None else {name: Wide(w, slots[name]) for name, w in weights.items()}
        mixer = nnx.merge(graphdef, state)
        for name, value in values.items():
            setattr(mixer, name, getattr(mixer, name).replace(value))
        return mixer.mix(x, Tokens()).y_BTD

    own = mock.patch.object(gated_product, "hidden_gradients", wraps=gated_product.hidden_gradients)
    with mosaic_interpreted(), assume_platform("gpu", capability="9.0", multiprocessors=2), own as called:
        y, pull = jax.vjp(run, x, weights, *([slots] if wide else []))
        dx, *of_weights = pull(dy)
    assert called.called

    def exact(x, weights):
        h = jnp.einsum("btd,dcf->btcf", x, weights["w_in"], precision="highest")
        return jnp.dot(jax.nn.silu(h[:, :, 0]) * h[:, :, 1], weights["w_out"], precision="highest")

    widened = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights, dy))
    expected_y, pull = jax.vjp(exact, *widened[:2])
    expected_dx, expected = pull(widened[2])
    check_close(y, expected_y, dtype="bfloat16", what="y")
    check_close(dx, expected_dx, dtype="bfloat16", what="dx")
    for name, gradient in of_weights[-1].items():
        assert gradient.dtype == (jnp.float32 if wide else jnp.bfloat16)
        check_close(gradient[0] if wide else gradient, expected[name], dtype="bfloat16", what=f"d{name}")
