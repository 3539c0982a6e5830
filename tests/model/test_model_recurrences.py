# SPDX-License-Identifier: Apache-2.0
"""RG-LRU, mLSTM, sLSTM and RWKV-4 against the papers' equations in float64, token by token, and how they start."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import MLSTM, RGLRU, SLSTM, ConfigError, Rwkv4, Rwkv4Channel
from hybridlm.layers.block import Make
from tests.model.model_support import QUICK
from tests.model.properties import mixer_of
from tests.tolerances import check_close

B, T, D = 2, 9, 16


def values_of(block, seed: int = 0):
    """(the mixer's function of x, its parameters in float64 by name); none of them is 0 or 1."""
    graphdef, params = mixer_of(block, seed)
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x), compiler_options=QUICK)
    named = {str(path[0]): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(params)}
    return (lambda x: run(params, x)), named


def tokens(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, T, D)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolved(x_BT, weight, bias):
    """Causal convolution of each channel, taps oldest first."""
    width = weight.shape[-1]
    padded = np.concatenate([np.zeros((B, width - 1, *x_BT.shape[2:])), x_BT], axis=1)
    return sum(padded[:, w : w + T] * weight[..., w] for w in range(width)) + bias


def layer_norm(x, weight, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight


def test_rglru():
    run, p = values_of(RGLRU(n_heads=4, d_inner=24, d_conv=3, activation="silu"))
    x = tokens()
    branches = np.einsum("btd,dchp->btchp", x, p["w_in"]) + p["b_in"]
    gate, u = branches[:, :, 0], convolved(branches[:, :, 1], p["conv"], p["conv_bias"])
    gates = np.einsum("bthq,qchp->btchp", u, p["w_gates"]) + p["b_gates"]
    i, r = sigmoid(gates[:, :, 0]), sigmoid(gates[:, :, 1])
    a = np.exp(-8 * r * np.log1p(np.exp(p["decay"])))
    h, out = np.zeros_like(u[:, 0]), []
    for t in range(T):
        h = a[:, t] * h + (1.0 if t == 0 else np.sqrt(1 - a[:, t] ** 2)) * i[:, t] * u[:, t]
        out.append(h)
    y = np.stack(out, axis=1) * gate * sigmoid(gate)
    expected = np.einsum("bthp,hpd->btd", y, p["w_out"]) + p["b_out"]
    check_close(run(x), expected, dtype="float32", what="y")


@pytest.mark.parametrize("cap", [None, 2.0])
def test_mlstm(cap):
    """With numbers at which the memory's divisor is now the sum's, now the bound."""
    block = MLSTM(n_heads=2, d_key=6, d_head=8, gate_softcap=cap, norm_eps=1e-3, eps=1e-2, bias=True, chunk=4)
    graphdef, params = mixer_of(block)
    params["b_gates"] = params["b_gates"].replace(params["b_gates"][...] + np.array([[9.0], [-3.0]], np.float32))
    p = {str(path[0]): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(params)}
    x = tokens()
    q, k = np.moveaxis(np.einsum("btd,dchn->btchn", x, p["w_qk"]) + p["b_qk"], 2, 0)
    v, o = np.moveaxis(np.einsum("btd,dchp->btchp", x, p["w_vo"]) + p["b_vo"], 2, 0)
    gates = np.einsum("btd,dch->btch", x, p["w_gates"]) + p["b_gates"]
    gates = gates if cap is None else cap * np.tanh(gates / cap)
    i, f = np.exp(gates[:, :, 0]), sigmoid(gates[:, :, 1])
    C, n, out, bounded = np.zeros((B, 2, 6, 8)), np.zeros((B, 2, 6)), [], []
    m = np.zeros((B, 2))
    for t in range(T):
        C = f[:, t, :, None, None] * C + i[:, t, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None] / np.sqrt(6)
        n = f[:, t, :, None] * n + i[:, t, :, None] * k[:, t] / np.sqrt(6)
        m = np.maximum(np.log(f[:, t]) + m, np.log(i[:, t]))
        total = np.abs((n * q[:, t]).sum(-1))
        bounded.append(total < 1)
        divisor = np.maximum(total, 1) + 1e-2 * np.exp(m)  # both sides of the quotient times exp(m)
        out.append(np.einsum("bhnp,bhn->bhp", C, q[:, t]) / divisor[..., None])
    assert 0.1 < np.mean(bounded) < 0.9
    y = (layer_norm(np.stack(out, axis=1), p["norm"], 1e-3) + p["norm_bias"]) * sigmoid(o)
    expected = np.einsum("bthp,hpd->btd", y, p["w_out"]) + p["b_out"]
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x), compiler_options=QUICK)
    check_close(run(params, x), expected, dtype="float32", what="y")


def test_slstm():
    """Without the measure m, which cancels: numbers are small here."""
    run, p = values_of(SLSTM(n_heads=2, d_conv=3, norm_eps=1e-3))
    x = tokens().reshape(B, T, 2, 8)
    u = convolved(x, p["conv"], p["conv_bias"])
    u = u * sigmoid(u)
    fed = [np.einsum("bthq,qhp->bthp", u if g < 2 else x, p["w_in"][:, g]) for g in range(4)]
    y, c, n = (np.zeros((B, 2, 8)) for _ in range(3))
    out = []
    for t in range(T):
        i, f, z, o = (fed[g][:, t] + np.einsum("bhq,qhp->bhp", y, p["R"][:, g]) + p["bias"][g] for g in range(4))
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        y = sigmoid(o) * c / n
        out.append(y)
    expected = layer_norm(np.stack(out, axis=1), p["norm"], 1e-3).reshape(B, T, D)
    check_close(run(tokens()), expected, dtype="float32", what="y")


def mixtures(x, share):
    before = np.concatenate([np.zeros((B, 1, D)), x[:, :-1]], axis=1)
    return [x * s + before * (1 - s) for s in share]


def test_rwkv4():
    run, p = values_of(Rwkv4(d_inner=24))
    k, v, r = (mixed @ p["w_in"][:, c] for c, mixed in enumerate(mixtures(tokens(), p["share"])))
    weights, total, out = np.zeros((B, 24)), np.zeros((B, 24)), []
    for t in range(T):
        own = np.exp(p["bonus"] + k[:, t])
        out.append((total + own * v[:, t]) / (weights + own))
        decay = np.exp(-np.exp(p["decay"]))
        total, weights = decay * total + np.exp(k[:, t]) * v[:, t], decay * weights + np.exp(k[:, t])
    expected = (sigmoid(r) * np.stack(out, axis=1)) @ p["w_out"]
    check_close(run(tokens()), expected, dtype="float32", what="y")


def test_rwkv4_channel():
    run, p = values_of(Rwkv4Channel(d_ff=24))
    k, r = mixtures(tokens(), p["share"])
    expected = sigmoid(r @ p["w_receptance"]) * (np.maximum(k @ p["w_in"], 0) ** 2 @ p["w_out"])
    check_close(run(tokens()), expected, dtype="float32", what="y")


def start(block, d_model: int = 64, **options):
    build = lambda: nnx.state(block.build(d_model, Make(nnx.Rngs(0), dtype="float32", **options)))
    state = jax.jit(build, compiler_options=QUICK)()
    return {str(path[0]): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def test_starts():
    """As the papers' code: decays of RG-LRU in [0.9, 0.999], gates of mLSTM closed, sLSTM without recurrent weights."""
    decay = np.exp(-np.log1p(np.exp(start(RGLRU(4))["decay"])))
    assert 0.9 <= decay.min() < 0.91 and 0.99 < decay.max() <= 0.999
    mlstm = start(MLSTM(4, 8, 16))
    assert not mlstm["w_gates"].any()
    np.testing.assert_allclose(mlstm["b_gates"], [[-10.0] * 4, [3.0, 4.0, 5.0, 6.0]])
    slstm = start(SLSTM(4))
    assert not slstm["R"].any() and not slstm["bias"][[0, 2, 3]].any()
    np.testing.assert_allclose(slstm["bias"][1, :, [0, -1]], [[5.0] * 4, [-7.0] * 4], rtol=1e-6)
    deeper = start(SLSTM(4), layer=(2, 3))["bias"][1, 0]
    np.testing.assert_allclose(deeper, 5 - 12 * (np.arange(16) / 15) ** 1.6, rtol=1e-5)
    assert slstm["w_in"].std() == pytest.approx(np.sqrt(2 / (5 * 64)), rel=0.05)
    first, last = (start(Rwkv4(), layer=(i, 4)) for i in (0, 3))
    np.testing.assert_allclose(first["share"][0], np.arange(64) / 64, rtol=1e-6)
    np.testing.assert_allclose(last["share"][1], (np.arange(64) / 64) ** 0.25 + 0.3, rtol=1e-6)
    np.testing.assert_allclose([first["decay"][[0, -1]], last["decay"][[0, -1]]], [[-5, 3]] * 2, rtol=1e-6)
    assert first["decay"][32] > last["decay"][32]


def test_what_does_not_fit():
    for make, message in (
        (lambda: SLSTM(3).check(16), r"d_model \(16\) not divisible by n_heads \(3\)"),
        (lambda: RGLRU(5).check(16), r"d_inner \(16\) not divisible by n_heads \(5\)"),
        (lambda: replace(MLSTM(), gate_softcap=0.0), r"gate_softcap \(0.0\) must be positive"),
        (lambda: Rwkv4Channel(0), r"d_ff \(0\) must be positive"),
        (lambda: Rwkv4(-1), r"d_inner \(-1\) must be positive"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}$"):
            make()
