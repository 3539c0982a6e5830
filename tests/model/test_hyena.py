# SPDX-License-Identifier: Apache-2.0
"""Hyena, its filters and Titans' mixer against their papers' formulas, written out in float64."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from hybridlm.config import Bidirectional, ConfigError, Hyena, ImplicitFilter, ModalFilter, Titans
from hybridlm.config.find import load_config
from hybridlm.layers.block import Tokens
from hybridlm.model.init import abstract
from tests.model import properties
from tests.model.model_support import QUICK, VARIANTS, named
from tests.tolerances import check_close

FILTER = ImplicitFilter(max_len=20, d_features=5, width=6, n_inner=2, frequency=2.0, shift=0.1)


def numbers(module) -> dict[str, np.ndarray]:
    """Parameters by dotted path, float64."""
    return {name: value.astype(np.float64) for name, value in named(nnx.state(module)).items()}


def implicit(p: dict[str, np.ndarray], c: ImplicitFilter, n_lags: int, prefix: str = "") -> np.ndarray:
    """HyenaFilter of HyenaDNA's code: positional embedding, MLP with sines, exponential modulation."""
    p = {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}
    lag = np.arange(c.max_len)[:, None]
    time = np.linspace(0, 1, c.max_len)[:, None]
    bands = (c.d_features - 1) // 2
    z = np.exp(-1j * np.linspace(1e-4, bands - 1, bands) * 2 * np.pi * lag / c.max_len)
    h = np.concatenate([time, z.real, z.imag], axis=-1)
    layers = [(p["first"], p["first_bias"]), *zip(p["inner"], p["inner_bias"], strict=True)]
    for weight, bias in layers:
        h = np.sin(p["frequency"] * (h @ weight + bias))
    h = h @ p["last"]
    deltas = np.linspace(np.log(c.target) / c.slow_decay, np.log(c.target) / c.fast_decay, h.shape[1])
    return (h * (np.exp(-time * np.abs(deltas)) + c.shift))[:n_lags]


@cache
def filter_network():
    return jax.jit(lambda: FILTER.build(5, nnx.Rngs(3)), compiler_options=QUICK)()


@pytest.mark.parametrize("n_lags", [7, 20, 33])
def test_implicit_filters_are_those_of_hyenadna(n_lags):
    network = filter_network()
    h = jax.jit(lambda network: network(n_lags), compiler_options=QUICK)(network)
    assert h.shape == (min(n_lags, 20), 5)
    check_close(h, implicit(numbers(network), FILTER, n_lags), dtype="float32", what="filter")


def test_modal_filters_are_a_state_space():
    """x_t = exp(dt A) x_(t-1) + (exp(dt A) - 1) / A u_t, y_t = 2 Re C x_t, at u = 1, 0, 0, ..."""
    block = ModalFilter(d_state=3, dt_min=0.05, dt_max=0.5)
    modes = jax.jit(lambda: block.build(4, nnx.Rngs(1)), compiler_options=QUICK)()
    p = numbers(modes)
    A, C = -np.exp(p["A_log"]) + 1j * p["A_imaginary"], p["weights"][0] + 1j * p["weights"][1]
    decay = np.exp(np.exp(p["dt_log"]) * A)
    x, expected = (decay - 1) / A, []
    for _ in range(30):
        expected.append(2 * (C * x).real.sum(0))
        x = decay * x
    h = jax.jit(lambda modes: modes(30), compiler_options=QUICK)(modes)
    check_close(h, np.array(expected), dtype="float32", what="filter")


def test_hyena_is_two_gates_around_a_convolution():
    """HyenaOperator of order 2, of HyenaDNA's code."""
    block = Hyena(FILTER)
    graphdef, params = properties.mixer_of(block)
    x = np.random.default_rng(0).normal(size=(2, 15, properties.D))
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params).mix(x, Tokens()).y_BTD, compiler_options=QUICK)
    p = {name: value.astype(np.float64) for name, value in named(params).items()}
    u = np.einsum("btd,dnc->btnc", x, p["w_in"]) + p["w_in_bias"]
    padded = np.pad(u, ((0, 0), (2, 0), (0, 0), (0, 0)))
    u = sum(padded[:, w : w + 15] * p["conv"][..., w] for w in range(3)) + p["conv_bias"]
    v, h = u[:, :, 2] * u[:, :, 1], implicit(p, FILTER, 15, "filter.")
    y = np.stack([sum(h[t - s] * v[:, s] for s in range(t + 1)) for t in range(15)], axis=1) + p["D"] * v
    expected = (y * u[:, :, 0]) @ p["out"] + p["out_bias"]
    check_close(run(params, x.astype(np.float32)), expected, dtype="float32", what="output")


def test_titans_is_its_op_between_projections():
    block = VARIANTS["titans"]
    graphdef, params = properties.mixer_of(block)
    x = np.random.default_rng(0).normal(size=(2, 9, properties.D))
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params).mix(x, Tokens()).y_BTD, compiler_options=QUICK)
    p = {name: value.astype(np.float64) for name, value in named(params).items()}
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    padded = np.pad(np.einsum("btd,dnhp->btnhp", x, p["w_qkv"]), ((0, 0), (3, 0), (0, 0), (0, 0), (0, 0)))
    qkv = sum(padded[:, w : w + 9] * p["conv"][..., w] for w in range(4))
    q, k, v = np.moveaxis(qkv * sigmoid(qkv), 2, 0)
    q, k = (a / np.sqrt((a**2).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    rate, eta, alpha = np.moveaxis(np.einsum("btd,dnh->btnh", x, p["w_rates"]) + p["rates"], 2, 0)
    arrays = (q, k, v, block.max_rate * sigmoid(rate), eta, alpha, p["memory_norm"], p["memory_in"], p["memory_out"])
    arrays = [a.astype(np.float32) for a in arrays]
    op = partial(pallas_kernels.titans, refresh_every=1, implementation="reference")
    y = np.asarray(jax.jit(op, compiler_options=QUICK)(*arrays), np.float64)
    y = y * sigmoid(np.einsum("btd,dhp->bthp", x, p["w_gate"]))
    expected = np.einsum("bthp,hpd->btd", y, p["out"])
    check_close(run(params, x.astype(np.float32)), expected, dtype="float32", what="output")


def test_both_directions_of_one_mixer_are_alike():
    """With all parameters in common, reversed rows give reversed results; with the projections, they do not."""
    x = np.random.default_rng(0).normal(size=(2, 9, properties.D)).astype(np.float32)
    for tied, alike in (("all", True), ("projections", False)):
        graphdef, params = properties.mixer_of(Bidirectional(VARIANTS["mamba1"], tied))
        run = jax.jit(lambda x, g=graphdef, p=params: nnx.merge(g, p).mix(x, Tokens()).y_BTD, compiler_options=QUICK)
        error = np.abs(np.asarray(run(x[:, ::-1]))[:, ::-1] - np.asarray(run(x))).max()
        assert (error < 1e-5) == alike


def mamba1(d: int, layers: int) -> int:
    """Caduceus: of each layer mamba_ssm's Mamba, another one but for in_proj and out_proj, a norm; an embedding of 16
    tokens, the last norm."""
    inner, rank = 2 * d, -(-d // 16)
    apart = 5 * inner + inner * (rank + 32) + (rank + 1) * inner + 17 * inner
    return 16 * d + d + layers * (3 * d * inner + 2 * apart + d)


def hyenadna(d: int, layers: int) -> int:
    """HyenaDNA's GPT blocks with one weight for each norm's channel: HyenaOperator and an MLP."""
    filters = 5 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * d + 64
    operator = 3 * d * d + 3 * d + 3 * (3 * d) + 3 * d + filters + d + d * d + d
    return 16 * d + d + layers * (operator + 8 * d * d + 5 * d + 2 * d)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("caduceus:ps-1k", mamba1(118, 4)),
        ("caduceus:ph-1k", mamba1(118, 4)),
        ("caduceus:ps-131k", mamba1(256, 16)),
        ("hyenadna:tiny-1k", hyenadna(128, 2)),
        ("hyenadna:small-32k", hyenadna(256, 4)),
        ("hyenadna:large-1m", hyenadna(256, 8)),
    ],
)
def test_sizes_have_the_published_number_of_parameters(name, expected):
    shapes = jax.tree.leaves(abstract(load_config(name).model).shapes)
    assert sum(p.size for p in shapes) == expected


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ImplicitFilter(d_features=4), "d_features (4) must be odd and at least 3: a lag, cosines and sines"),
        (lambda: ModalFilter(dt_min=1.0), "dt_min (1.0) must be positive and at most dt_max (0.1)"),
        (lambda: Titans(3).check(16), "d_model (16) not divisible by n_heads (3): give d_head"),
        (lambda: Titans(store_every=4, refresh_every=6), "refresh_every (6) not a multiple of store_every (4)"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(make, told):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == told
