# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet, Kimi Delta and latent attention against the published formulas, token by token in float64. The rest:
test_mixers.py."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm import sharding
from hybridlm.config import ConfigError, GatedDeltaNet, KimiDelta, LatentAttention, MeshConfig, Rope
from hybridlm.layers.block import Make, Tokens
from hybridlm.layers.rope import rotate
from hybridlm.model import init
from hybridlm.model.pattern import places
from tests.model import properties
from tests.model.model_support import QUICK, VARIANTS, build, named, small
from tests.tolerances import check_close

D, T = properties.D, 9
DELTAS = ("delta", "delta_reflecting", "kimi", "kimi_bounded")
LATENTS = ("latent", "latent_queries")


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def softplus(a):
    return np.log1p(np.exp(a))


def normed(a, weight, eps):
    return a / np.sqrt((a**2).mean(-1, keepdims=True) + eps) * weight


def convolved(a_BTHP, weight_HPW):
    """The causal convolution, and silu."""
    window = weight_HPW.shape[-1]
    padded = np.pad(a_BTHP, ((0, 0), (window - 1, 0), (0, 0), (0, 0)))
    a = sum(padded[:, j : j + a_BTHP.shape[1]] * weight_HPW[..., j] for j in range(window))
    return a * sigmoid(a)


def expected_delta(c, w, x_BTD):
    """S <- decay S; S <- S + beta k (v - S^T k)^T; y = S^T q / sqrt(N), head by head."""
    q, k, v = (
        convolved(np.einsum("btd,dhp->bthp", x_BTD, w[f"in_{name}"]), w[f"conv_{name}"]) for name in ("q", "k", "v")
    )
    if isinstance(c, GatedDeltaNet):
        b, a = np.moveaxis(np.einsum("btd,dch->btch", x_BTD, w["in_ba"]), 2, 0)
        g = -np.exp(w["A_log"])[:, None] * softplus(a + w["dt_bias"])[..., None]
        z = np.einsum("btd,dhp->bthp", x_BTD, w["in_z"])
        gate = sigmoid(z) * (z if c.gate == "silu" else 1)
    else:
        b = np.einsum("btd,dh->bth", x_BTD, w["in_b"])
        f, z = (
            np.einsum("btr,rhp->bthp", x_BTD @ w.get(f"in_{name}", np.eye(D)), w[name]) for name in ("decay", "gate")
        )
        A, f = np.exp(w["A_log"])[:, None], f + w["dt_bias"]
        g = -A * softplus(f) if c.lower_bound is None else c.lower_bound * sigmoid(A * f)
        gate = sigmoid(z)
    beta, y = sigmoid(b) * (2 if c.neg_eigval else 1), np.zeros_like(v)
    for row in range(x_BTD.shape[0]):
        for head in range(c.n_heads):
            group, state = head // (c.n_heads // q.shape[2]), np.zeros((c.d_key, c.d_head))
            for t in range(x_BTD.shape[1]):
                qt, kt = (a[row, t, group] / np.sqrt((a[row, t, group] ** 2).sum() + 1e-6) for a in (q, k))
                state = np.exp(g[row, t, head])[:, None] * state
                state += beta[row, t, head] * np.outer(kt, v[row, t, head] - state.T @ kt)
                y[row, t, head] = state.T @ qt / np.sqrt(c.d_key)
    return np.einsum("bthp,hpd->btd", normed(y, w["norm"], c.norm_eps) * gate, w["out"])


def turned(a_BTHP, theta):
    """Neighbours as complex numbers, turned by position / theta^(2 i / P)."""
    pairs = a_BTHP[..., ::2] + 1j * a_BTHP[..., 1::2]
    freqs = theta ** (-2 * np.arange(pairs.shape[-1]) / a_BTHP.shape[-1])
    pairs = pairs * np.exp(1j * np.arange(a_BTHP.shape[1])[:, None, None] * freqs)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(a_BTHP.shape)


def expected_latent(c, w, x_BTD):
    """Softmax over keys [latent's | shared] of each head, one query at a time."""
    if c.q_rank is None:
        q = np.einsum("btd,dhp->bthp", x_BTD, w["w_q"])
    else:
        low = x_BTD @ w["in_q"] + w.get("in_q_bias", 0.0)
        q = np.einsum("btr,rhp->bthp", normed(low, w["q_norm.weight"], c.norm_eps), w["up_q"])
    latent = x_BTD @ w["in_kv"] + w.get("in_kv_bias", 0.0)
    kv = np.einsum("btr,rhp->bthp", normed(latent[..., : c.kv_rank], w["kv_norm.weight"], c.norm_eps), w["up_kv"])
    shared = latent[..., None, c.kv_rank :]
    if c.rope is not None:
        q = np.concatenate([q[..., : c.d_nope], turned(q[..., c.d_nope :], c.rope.theta)], axis=-1)
        shared = turned(shared, c.rope.theta)
    k = np.concatenate([kv[..., : c.d_nope], np.repeat(shared, c.n_heads, axis=2)], axis=-1)
    scale = (c.d_nope + c.d_rope) ** -0.5 if c.scale is None else c.scale
    y = np.zeros((*x_BTD.shape[:2], c.n_heads, c.d_value))
    for t in range(x_BTD.shape[1]):
        scores = scale * np.einsum("bhp,bshp->bhs", q[:, t], k[:, : t + 1])
        share = np.exp(scores - scores.max(-1, keepdims=True))
        y[:, t] = np.einsum("bhs,bshp->bhp", share / share.sum(-1, keepdims=True), kv[:, : t + 1, :, c.d_nope :])
    if c.head_gate:
        y *= sigmoid(x_BTD @ w["w_gate"])[..., None]
    return np.einsum("bthp,hpd->btd", y, w["w_o"]) + w.get("b_o", 0.0)


@pytest.mark.parametrize("name", DELTAS + LATENTS)
def test_equals_the_published_formulas(name):
    graphdef, params = properties.mixer_of(VARIANTS[name])
    x_BTD = np.random.default_rng(1).normal(size=(2, T, D)).astype(np.float32)
    y = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x), compiler_options=QUICK)(params, x_BTD)
    weights = {path: value.astype(np.float64) for path, value in named(params).items()}
    formula = expected_delta if name in DELTAS else expected_latent
    check_close(y, formula(VARIANTS[name], weights, x_BTD), dtype="float32", what=name)


@pytest.mark.parametrize("name", ["delta", "kimi"])
def test_published_initialisation(name):
    """Step sizes log-uniform between their limits, A uniform, so that a head forgets within one token to thousands."""
    block = replace(VARIANTS[name], n_heads=64, **({"n_key_heads": 4} if name == "delta" else {}))
    w = named(jax.jit(lambda: nnx.state(block.build(D, Make(nnx.Rngs(0)))))())
    dt = softplus(w["dt_bias"].astype(np.float64))
    assert 1e-3 * 0.99 < dt.min() < 2e-3
    assert 0.05 < dt.max() < 0.101
    A = np.exp(w["A_log"])
    assert block.A_init[0] * 0.999 <= A.min() < 2
    assert 14 < A.max() <= 16.001
    assert (w["norm"] == 1).all()


def test_what_the_cache_holds():
    """States of fixed size; of latent attention R + P numbers a token, whatever its heads are."""
    mixers = {name: init.abstract(properties.model_of(VARIANTS[name], "X")).model() for name in (*DELTAS, *LATENTS)}
    shapes = {name: jax.eval_shape(lambda m=model: m.init_cache(2, 11)).groups[0][0] for name, model in mixers.items()}
    assert shapes["delta"]["state"].shape == (1, 2, 4, 6, 5)
    assert shapes["kimi"]["conv_q"].shape == (1, 2, 3, 2, 6)
    assert {name: leaf.shape for name, leaf in shapes["latent"].items()} == {"latent": (1, 2, 11, 1, 8 + 4)}
    assert shapes["latent_queries"]["latent"].size == 2 * 11 * (6 + 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedDeltaNet(n_heads=6, n_key_heads=4), r"n_heads \(6\) not divisible by n_key_heads \(4\)"),
        (lambda: GatedDeltaNet(d_key=0), r"d_key \(0\) must be positive"),
        (lambda: GatedDeltaNet(A_init=(0.0, 1.0)), r"A_init \(0.0, 1.0\) must satisfy 0 < low <= high"),
        (lambda: KimiDelta(lower_bound=0.5), r"lower_bound \(0.5\) must be negative"),
        (lambda: KimiDelta(dt_min=0.5), r"dt_min \(0.5\) must be positive and at most dt_max \(0.1\)"),
        (lambda: LatentAttention(kv_rank=0), r"kv_rank \(0\) must be positive"),
        (
            lambda: LatentAttention(d_rope=0),
            r"rope fraction \(1.0\) of d_head \(0\) is 0: it must be even and positive",
        ),
        (lambda: LatentAttention(d_rope=-2, rope=None), r"d_rope \(-2\) must not be negative"),
    ],
)
def test_options_that_do_not_fit(make, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        make()


def test_no_shared_keys_at_all():
    """Without positions the keys that heads share may be left out."""
    block = replace(VARIANTS["latent"], d_rope=0, rope=None)
    properties.check_cache_alone(block)


def test_what_a_mesh_divides():
    mesh = sharding.make_mesh(MeshConfig(1, fsdp=4), jax.devices()[:4])
    with pytest.raises(ConfigError, match=r"^model.blocks.X.kv_rank \(6\) not divisible by mesh.fsdp \(4\)$"):
        init.check_model(replace(small("X", {"X": VARIANTS["latent_queries"]}), vocab_size=32), mesh)


def test_interleaved_pairs_are_the_others_in_another_order():
    rng = np.random.default_rng(0)
    x_BTHP = rng.normal(size=(2, 5, 3, 12)).astype(np.float32)
    positions_BT = rng.integers(0, 1000, (2, 5)).astype(np.int32)
    order = [0, 4, 1, 5, 2, 6, 3, 7, 8, 9, 10, 11]  # of (i, i + 4) those of neighbours; the last four stay
    rope = Rope(500.0, fraction=2 / 3)
    run = jax.jit(rotate, static_argnums=2)
    apart = np.asarray(run(x_BTHP, positions_BT, rope))
    beside = run(x_BTHP[..., order], positions_BT, replace(rope, interleaved=True))
    np.testing.assert_array_equal(beside, apart[..., order])


def test_where_norms_of_sublayers_stand():
    """By symbol before, behind, both or none; a norm behind a mixer takes what is added to the length that it says."""
    blocks = {symbol: VARIANTS["mlp"] for symbol in "abcd"}
    config = small("abcd", blocks, norm_before="ac", norm_after="bc")
    model, x_BTD = build(config), np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
    at = dict(zip("abcd", places("abcd"), strict=True))
    sublayers = {symbol: model.groups[place.group][place.position] for symbol, place in at.items()}
    norms = {"a": ("norm",), "b": ("after_norm",), "c": ("norm", "after_norm"), "d": ()}
    for symbol, names in norms.items():
        graphdef, state = nnx.split(sublayers[symbol])
        assert {path for path in named(state) if "norm" in path} == {f"{name}.weight" for name in names}
        sublayer = nnx.merge(graphdef, jax.tree.map(lambda a: np.asarray(a)[0], state))
        u = normed(x_BTD, np.asarray(sublayer.norm.weight[...]), 1e-5) if "norm" in names else x_BTD
        y = np.asarray(jax.jit(lambda layer, u: layer.mixer(u))(sublayer, u.astype(np.float32)))
        y = normed(y, np.asarray(sublayer.after_norm.weight[...]), 1e-5) if "after_norm" in names else y
        found = jax.jit(lambda layer, x: layer(x, Tokens()).y_BTD)(sublayer, x_BTD)
        check_close(found, x_BTD + y, dtype="float32", what=symbol)
    with pytest.raises(
        ConfigError, match=r"^model.norm_after has the symbol 'x', which is no key of model.blocks \(a\)$"
    ):
        small("a", blocks, norm_after="x")
