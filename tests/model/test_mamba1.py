# SPDX-License-Identifier: Apache-2.0
"""Mamba1: against the published formulas in float64, its start, what does not fit. The rest: test_mixers.py."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import ConfigError, InnerNorm, Mamba1, MeshConfig
from hybridlm.layers.mamba1 import Mamba1Mixer
from hybridlm.model import init
from hybridlm.model.model import param_info
from tests.model.model_support import QUICK, VARIANTS, named, small
from tests.tolerances import check_close

PLAIN = Mamba1(d_state=4)
BLOCKS = {
    "plain": PLAIN,
    "no_bias": replace(PLAIN, conv_bias=False, d_conv=2, dt_rank=3, expand=1.5, activation="relu"),
    "jamba": VARIANTS["mamba1"],
    "falcon": replace(PLAIN, inner_norm=InnerNorm(learned=False, eps=1e-2)),
    "zamba": VARIANTS["mamba1_heads"],
}


def make(block, d_model=16, seed=0) -> Mamba1Mixer:
    """A mixer without a parameter at 0 or 1."""
    rng = np.random.default_rng(seed)
    mixer = Mamba1Mixer(block, d_model, rngs=nnx.Rngs(seed), init_std=0.3, dtype="float32")
    nnx.update(mixer, jax.tree.map(lambda a: a + 0.2 * rng.normal(size=a.shape).astype(np.float32), nnx.state(mixer)))
    return mixer


def expected(mixer, x_BTD):
    """The forward of the paper's algorithm 2 with norms and heads, head by head and token by token, in float64."""
    from math import erf

    c, w = mixer.config, {k: v.astype(np.float64) for k, v in named(nnx.state(mixer)).items()}
    act = {
        "silu": silu,
        "relu": lambda a: np.maximum(a, 0),
        "gelu": lambda a: a * (1 + np.vectorize(erf)(a / 2**0.5)) / 2,
    }
    xz = np.einsum("btd,dchp->btchp", x_BTD, w["in_xz"]) + w.get("in_xz_bias", 0.0)
    x, z = xz[:, :, 0], xz[:, :, 1]
    padded = np.pad(x, ((0, 0), (c.d_conv - 1, 0), (0, 0), (0, 0)))
    x = sum(padded[:, j : j + x.shape[1]] * w["conv"][..., j] for j in range(c.d_conv)) + w.get("conv_bias", 0.0)
    x = act[c.activation](x)
    rank, y = w["dt_proj"].shape[0], np.zeros_like(x)
    for head in range(c.n_heads):
        parts = np.split(x[:, :, head] @ w["x_proj"][:, head], [rank, rank + c.d_state], axis=-1)
        if c.inner_norm is not None:
            parts = [a / np.sqrt((a**2).mean(-1, keepdims=True) + c.inner_norm.eps) for a in parts]
            parts = [a * w.get(f"{name}_norm.weight", 1.0) for name, a in zip(("dt", "B", "C"), parts, strict=True)]
        low, B, C = parts
        dt = np.log1p(np.exp(low @ w["dt_proj"][:, head] + w["dt_bias"][head]))
        state = np.zeros((x.shape[0], x.shape[3], c.d_state))
        for t in range(x.shape[1]):
            u = x[:, t, head]
            state = np.exp(-dt[:, t, :, None] * np.exp(w["A_log"][head])) * state
            state += (dt[:, t] * u)[:, :, None] * B[:, t, None]
            y[:, t, head] = (state * C[:, t, None]).sum(-1) + w["D"][head] * u
    return np.einsum("bthp,hpd->btd", y * silu(z), w["out"]) + w.get("out_bias", 0.0)


def silu(a):
    return a / (1 + np.exp(-a))


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_published_formulas(name):
    mixer, x_BTD = make(BLOCKS[name]), np.random.default_rng(1).normal(size=(2, 11, 16)).astype(np.float32)
    y = jax.jit(lambda mixer, x: mixer(x), compiler_options=QUICK)(mixer, x_BTD)
    check_close(y, expected(mixer, x_BTD), dtype="float32", what=name)


def test_published_initialisation():
    block = Mamba1(d_state=5, dt_min=1e-3, dt_max=0.1, dt_init_floor=2e-3, dt_scale=0.5)
    mixer = jax.jit(lambda: Mamba1Mixer(block, 64, rngs=nnx.Rngs(0)), compiler_options=QUICK)()
    np.testing.assert_allclose(np.exp(mixer.A_log[...]), np.broadcast_to(np.arange(1, 6), (1, 128, 5)), rtol=1e-6)
    assert (mixer.D[...] == 1).all()
    dt = np.log1p(np.exp(np.asarray(mixer.dt_bias[...], np.float64)))
    assert dt.min() == pytest.approx(2e-3, rel=1e-3)
    assert 0.05 < dt.max() < 0.1001
    assert mixer.dt_proj.shape == (4, 1, 128)  # 64 / 16
    limit = 0.5 / 2
    assert np.abs(mixer.dt_proj[...]).max() <= limit
    assert mixer.dt_proj[...].std() == pytest.approx(limit / 3**0.5, rel=0.1)
    constant = Mamba1Mixer(replace(block, dt_init="constant"), 64, rngs=nnx.Rngs(0))
    assert (constant.dt_proj[...] == limit).all()


def test_what_decays():
    info = {path: leaf for path, leaf in flat(param_info(make(BLOCKS["jamba"])))}
    matrices = {name for name, leaf in info.items() if leaf.kind == "matrix"}
    assert matrices == {"in_xz", "x_proj", "dt_proj", "out"}
    assert {info[name].kind for name in ("A_log", "D", "dt_bias")} == {"recurrence"}
    assert {info[f"{name}_norm.weight"].kind for name in "BC"} == {"norm"}


def flat(info):
    return [(".".join(map(str, path)), leaf.get_value()) for path, leaf in nnx.to_flat_state(info)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, r"d_state \(0\) must be positive"),
        ({"dt_rank": -1}, r"dt_rank \(-1\) must be positive"),
        ({"dt_min": 0.5}, r"dt_min \(0.5\) must be positive and at most dt_max \(0.1\)"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        Mamba1(**options)


def test_widths_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"model.blocks.X.expand \* d_model \(32\) not divisible by n_heads \(3\)"):
        small("X", {"X": Mamba1(n_heads=3)})
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8))
    with pytest.raises(ConfigError, match=r"model.blocks.X.inner width \(20\) not divisible by mesh.tensor \(8\)"):
        init.check_model(replace(small("X", {"X": Mamba1(expand=1.25)}), vocab_size=32), mesh)
