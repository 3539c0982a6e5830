# SPDX-License-Identifier: Apache-2.0
"""Parameters at the start, multipliers, modules by themselves, arguments that do not fit."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import MLP, Attention, Mamba2, ModelConfig
from hybridlm.layers.attention import AttentionMixer
from hybridlm.layers.mamba2 import Mamba2Mixer
from hybridlm.layers.mlp import ACTIVATIONS, GATED, FeedForward
from hybridlm.model import HybridLM, param_info
from hybridlm.model.init import abstract
from tests.model import model_support
from tests.model.model_support import QUICK, build, named, random_tokens, small
from tests.tolerances import check_close

BIG = ModelConfig(
    vocab_size=500,
    d_model=64,
    pattern="M*-" * 12,
    blocks={"M": Mamba2(d_state=16, d_head=8), "*": Attention(n_heads=4, d_head=16, gate="head"), "-": MLP(d_ff=96)},
    tie_embeddings=False,
)


@pytest.fixture(scope="module")
def drawn():
    return named(jax.jit(lambda: nnx.state(HybridLM(BIG, rngs=nnx.Rngs(1))), compiler_options=QUICK)())


def test_statistics_of_stacked_matrices(drawn):
    """Every layer of every matrix has the right deviation; the last ones are divided by sqrt(36 sublayers)."""
    last = ("mixer.out", "mixer.w_o", "mixer.w_out")
    for path in ("0.mixer.in_zx", "0.mixer.in_BC", "0.mixer.in_dt", "0.mixer.out", "1.mixer.w_q", "1.mixer.w_gate",
                 "1.mixer.w_o", "2.mixer.w_in", "2.mixer.w_out"):  # fmt: skip
        value = drawn[f"groups.0.{path}"]
        std = 0.02 / (6 if path.endswith(last) else 1)
        assert value.shape[0] == 12
        for layer in value:
            assert layer.std() == pytest.approx(std, rel=5 / np.sqrt(2 * layer.size)), path
            assert abs(layer.mean()) < 5 * std / np.sqrt(layer.size), path
        assert len({layer.tobytes() for layer in value}) == 12, f"{path}: layers drawn alike"
    for path in ("embedding", "output"):
        assert drawn[path].std() == pytest.approx(0.02, rel=0.03)


def test_published_initialisation_of_mamba2(drawn):
    mixer = {path.removeprefix("groups.0.0.mixer."): v for path, v in drawn.items() if ".0.0.mixer." in path}
    dt = np.log1p(np.exp(mixer["dt_bias"].astype(np.float64)))
    assert dt.min() > 0.99e-3
    assert dt.max() < 1.01e-1
    quantiles = np.quantile(np.log(dt), [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quantiles, np.quantile(np.log([1e-3, 1e-1]), [0.25, 0.5, 0.75]), atol=0.6)
    A = np.exp(mixer["A_log"])
    assert A.min() >= 1
    assert A.max() <= 16.001
    assert A.mean() == pytest.approx(8.5, rel=0.1)
    assert (mixer["D"] == 1).all()
    assert (mixer["norm"] == 1).all()
    for name in ("conv_x", "conv_BC", "conv_x_bias", "conv_BC_bias"):  # uniform up to 1 / sqrt(4)
        assert np.abs(mixer[name]).max() <= 0.5
        assert mixer[name].std() == pytest.approx(0.5 / np.sqrt(3), rel=0.1)


def test_floor_of_dt():
    block = Mamba2(d_head=4, n_heads=64, dt_min=1e-5, dt_max=1e-2, dt_init_floor=1e-3)
    dt_bias = jax.jit(lambda: Mamba2Mixer(block, 16, rngs=nnx.Rngs(0)).dt_bias[...], compiler_options=QUICK)()
    dt = np.log1p(np.exp(np.asarray(dt_bias, np.float64)))
    assert dt.min() == pytest.approx(1e-3, rel=1e-3)


def test_parameters_depend_on_depth_not_on_grouping():
    """The first sublayers of two patterns that group differently are drawn alike."""

    def draw(pattern):
        config = small(pattern)
        return named(jax.jit(lambda: nnx.state(HybridLM(config, rngs=nnx.Rngs(0))), compiler_options=QUICK)())

    alone, periodic = draw("m"), draw("mm-")
    np.testing.assert_array_equal(alone["groups.0.0.mixer.in_zx"][0], periodic["groups.0.0.mixer.in_zx"][0])


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATED])
def test_feed_forward(activation):
    """Against the formulas, written out with numpy."""
    from math import erf

    make = lambda rngs: FeedForward(MLP(12, activation, bias=True), 6, rngs=rngs, init_std=0.5, dtype="float32")
    layer = nnx.merge(*model_support.drawn(make, seed=0))
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    formulas = {
        "silu": lambda h: h / (1 + np.exp(-h)),
        "gelu": lambda h: h * (1 + np.vectorize(erf)(h / np.sqrt(2))) / 2,
        "gelu_tanh": lambda h: h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2,
        "relu": lambda h: np.maximum(h, 0),
        "relu2": lambda h: np.maximum(h, 0) ** 2,
    }
    phi = formulas[GATED.get(activation, activation)]
    w, b = np.asarray(layer.w_in[...], np.float64), np.asarray(layer.b_in[...], np.float64)
    gated = activation in GATED
    hidden = phi(x @ w[:, 0] + b[0]) * (x @ w[:, 1] + b[1]) if gated else phi(x @ w + b)
    expected = hidden @ np.asarray(layer.w_out[...], np.float64) + np.asarray(layer.b_out[...])
    check_close(jax.jit(lambda layer, x: layer(x))(layer, x), expected, dtype="float32", what=activation)


def test_multipliers_and_softcap():
    tokens = random_tokens(1, 5)
    plain = build(small("-"))
    scaled = build(
        small("-", embedding_multiplier=3.0, residual_multiplier=0.5, logit_multiplier=2.0, logit_softcap=4.0)
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(plain, scaled):
        x = 3.0 * plain.embedding[...][tokens]
        (sublayer,) = plain.groups[0]
        graphdef, state = nnx.split(sublayer)
        sublayer = nnx.merge(graphdef, jax.tree.map(lambda a: a[0], state))
        x = x + 0.5 * sublayer.mixer(sublayer.norm(x))
        logits = 2.0 * plain.norm(x) @ plain.unembedding().T
        return 4.0 * jnp.tanh(logits / 4.0), scaled(tokens), scaled.logits(scaled.hidden(tokens))

    expected, logits, in_two = run(plain, scaled)
    check_close(logits, expected, dtype="float32", what="logits")
    assert scaled.logit_scale == 2.0
    check_close(in_two, logits, dtype="float32", what="hidden and unembedding")


def test_untied_unembedding():
    model = build(small("-", tie_embeddings=False))
    assert np.abs(model.unembedding() - model.embedding[...]).max() > 0.1
    assert build(small("-")).output is None


def test_compute_dtype():
    model = build(small("M*-", compute_dtype="bfloat16"))
    tokens = random_tokens(2, 9)
    hidden, logits = jax.jit(lambda: (model.hidden(tokens), model(tokens)), compiler_options=QUICK)()
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    model32 = build(small("M*-"))
    exact = jax.jit(lambda: model32(tokens), compiler_options=QUICK)()
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 0.05 * np.std(exact)
    assert all(leaf.dtype == np.float32 for leaf in named(nnx.state(model)).values())


class Net(nnx.Module):
    """Someone else's model with our mixers in it."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 16, rngs=rngs)
        self.mixer = Mamba2Mixer(Mamba2(d_state=4, d_head=8), 16, rngs=rngs)
        self.attention = AttentionMixer(Attention(n_heads=2, d_head=8), 16, rngs=rngs)

    def __call__(self, x):
        return self.attention(self.mixer(self.first(x)))


def test_mixers_alone_in_other_nnx_code():
    x = np.ones((2, 5, 3), np.float32)

    def run():
        net = Net(nnx.Rngs(0))
        loss, grads = nnx.value_and_grad(lambda net, x: (net(x).astype(jnp.float32) ** 2).mean())(net, x)
        cache = net.mixer.init_cache(2, 8)
        return loss, grads, net.mixer(net.first(x)), net.mixer.extend(net.first(x), cache, jnp.zeros(2, jnp.int32))

    loss, grads, expected, (y, cache) = jax.jit(run, compiler_options=QUICK)()
    assert loss > 0
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert (expected.dtype, cache["state"].dtype, cache["state"].shape) == (jnp.bfloat16, jnp.float32, (2, 4, 8, 4))
    check_close(y, expected, dtype="bfloat16", what="cached and not")


def test_display(capsys):
    nnx.display(HybridLM(small("M-"), rngs=nnx.Rngs(0)))
    assert "Mamba2Mixer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros(4, np.int32),), ValueError, r"tokens_BT must be \[batch, tokens\].*\(4,\)"),
        ((np.zeros((2, 0), np.int32),), ValueError, r"tokens_BT must be \[batch, tokens\].*\(2, 0\)"),
        ((np.zeros((2, 4), np.float32),), TypeError, r"tokens_BT \(float32\) must be of an integer type"),
        (
            (np.zeros((2, 4), int), np.zeros((2, 5), int)),
            ValueError,
            r"segment_ids \(2, 5\) must have the shape.*\(2, 4\)",
        ),
        ((np.zeros((2, 4), int), np.zeros((2, 4))), TypeError, r"segment_ids \(float\d\d\) must be of an integer type"),
        ((np.zeros((2, 4), int), None, np.zeros(4, int)), ValueError, r"positions \(4,\) must have the shape"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message):
    model = nnx.eval_shape(lambda: HybridLM(small("-"), rngs=nnx.Rngs(0)))
    with pytest.raises(error, match=message):
        model(*arguments)


def test_one_abstract_model():
    """Made once for equal configs, with the parameters that a real one has; each model of it is its own."""
    found = abstract(small("M*-"))
    assert abstract(small("M*-")) is found
    model = nnx.eval_shape(lambda: HybridLM(small("M*-"), rngs=nnx.Rngs(0)))
    shapes = lambda params: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
    assert shapes(found.shapes) == shapes(nnx.state(model))
    assert (
        jax.tree.leaves(found.info) == jax.tree.leaves(param_info(model)) == jax.tree.leaves(param_info(found.model()))
    )
    assert found.model() is not found.model()


def test_config_is_hashable_and_replaceable():
    config = small("M*")
    assert hash(config) == hash(replace(config))
    assert config == replace(config)
