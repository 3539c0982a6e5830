# SPDX-License-Identifier: Apache-2.0
"""RWKV's mixers against the equations of the published code, token by token in NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import ChannelMix, ConfigError, Rwkv7
from hybridlm.layers.block import Make, Tokens
from tests.model import properties
from tests.model.model_support import QUICK, VARIANTS, named, small
from tests.model.properties import D, mixer_of
from tests.tolerances import check_close

T = 7


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def before(x):
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def times(x, w):
    """[T, D] by [D, H, N]."""
    return np.einsum("td,d...->t...", x, w)


def group_norm(y, p, eps=64e-5):
    y = y - y.mean(-1, keepdims=True)
    return y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * p["norm_weight"] + p["norm_bias"]


def rwkv7(p, x, v_first=None):
    """RWKV_Tmix_x070.forward; v_first: of a later layer."""
    xx = before(x) - x
    xr, xw, xk, xv, xa, xg = (x + xx * share for share in p["shares"])
    r, k, v = times(xr, p["w_r"]), times(xk, p["w_k"]), times(xv, p["w_v"])
    if v_first is not None:
        v = v + (v_first - v) * sigmoid(p["value_bias"] + times(xv @ p["value_down"], p["value_up"]))
    w = p["decay_bias"] + times(np.tanh(xw @ p["decay_down"]), p["decay_up"])
    w = -np.log1p(np.exp(-w)) - 0.5
    a = sigmoid(p["rate_bias"] + times(xa @ p["rate_down"], p["rate_up"]))
    g = times(sigmoid(xg @ p["gate_down"]), p["gate_up"])
    kk = k * p["k_k"]
    kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
    k = k * (1 + (a - 1) * p["k_a"])
    state, out = np.zeros((*v.shape[1:], v.shape[2])), []  # [value, key]
    for t in range(T):
        removed = np.einsum("hij,hj->hi", state, -kk[t])
        state = state * np.exp(-np.exp(w[t]))[:, None] + removed[:, :, None] * (kk[t] * a[t])[:, None]
        state = state + v[t][:, :, None] * k[t][:, None]
        out.append(np.einsum("hij,hj->hi", state, r[t]))
    y = group_norm(np.stack(out), p)
    y = y + (r * k * p["r_k"]).sum(-1, keepdims=True) * v
    return np.einsum("thn,hnd->td", y * g, p["w_o"])


def rwkv6(p, x):
    """RWKV_Tmix_x060.forward."""
    xx = before(x) - x
    low = np.tanh(np.einsum("td,dcr->tcr", x + xx * p["share"], p["share_down"]))
    more = np.einsum("tcr,crd->ctd", low, p["share_up"])
    xr, xw, xk, xv, xg = (x + xx * (share + m) for share, m in zip(p["shares"], more, strict=True))
    r, k, v = times(xr, p["w_r"]), times(xk, p["w_k"]), times(xv, p["w_v"])
    g = times(xg, p["w_gate"])
    w = np.exp(-np.exp(p["decay_bias"] + times(np.tanh(xw @ p["decay_down"]), p["decay_up"])))
    state, out = np.zeros((*v.shape[1:], v.shape[2])), []  # [key, value]
    for t in range(T):
        kv = k[t][:, :, None] * v[t][:, None]
        out.append(np.einsum("hij,hi->hj", state + p["bonus"][:, :, None] * kv, r[t]))
        state = w[t][:, :, None] * state + kv
    return np.einsum("thn,hnd->td", group_norm(np.stack(out), p) * g * sigmoid(g), p["w_o"])


def channel_mix(p, x):
    """RWKV_CMix_x060.forward."""
    xx = before(x) - x
    k = np.maximum((x + xx * p["share_in"]) @ p["w_in"], 0) ** 2
    return sigmoid((x + xx * p["share_gate"]) @ p["w_gate"]) * (k @ p["w_out"])


@pytest.mark.parametrize("published", [rwkv7, rwkv6, channel_mix])
def test_the_published_equations(published):
    graphdef, state = mixer_of(VARIANTS[published.__name__])
    x_TD = np.random.default_rng(2).normal(size=(T, D)).astype(np.float32)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state).mix(x, Tokens()).y_BTD, compiler_options=QUICK)
    p = {name: value.astype(np.float64) for name, value in named(state).items()}
    check_close(run(state, x_TD[None])[0], published(p, x_TD.astype(np.float64)), dtype="float32", what="output")


def test_values_of_the_first_layer():
    """A later layer mixes them with its own; the first hands on what it writes, later ones what came to them."""
    x_TD, passed_TD = np.random.default_rng(3).normal(size=(2, T, D)).astype(np.float32)
    x_1TD, passed_1TD = x_TD[None], passed_TD[None]

    def run(state, graphdef):
        out, handed_on = nnx.merge(graphdef, state).pass_on(x_1TD, passed_1TD, Tokens())
        return out.y_BTD[0], handed_on[0]

    for name in ("rwkv7_first", "rwkv7_mixed"):
        graphdef, state = mixer_of(VARIANTS[name])
        y_TD, handed_on = jax.jit(lambda state, g=graphdef: run(state, g), compiler_options=QUICK)(state)
        p, x = {name: value.astype(np.float64) for name, value in named(state).items()}, x_TD.astype(np.float64)
        v_first = passed_TD.reshape(T, *p["k_k"].shape) if name == "rwkv7_mixed" else None
        check_close(y_TD, rwkv7(p, x, v_first), dtype="float32", what="output")
        own = times(x + (before(x) - x) * p["shares"][3], p["w_v"]).reshape(T, D)
        check_close(handed_on, passed_TD if name == "rwkv7_mixed" else own, dtype="float32", what="handed on")


def test_values_of_the_first_layer_in_a_model():
    """From the cache, in pieces and with padding, as in one call."""
    properties.check_cache(small("FRR", {"F": VARIANTS["rwkv7_first"], "R": VARIANTS["rwkv7_mixed"]}))


def first(block, layer, d_model=D):
    build = lambda: nnx.state(block.build(d_model, Make(nnx.Rngs(0), layer=layer)))
    return named(jax.jit(build, compiler_options=QUICK)())


def test_rwkv7_starts_as_published():
    """As RWKV_Tmix_x070 of the second of three layers, by its loops over channels."""
    C, N, layer_id, n_layer = 16, 4, 1, 3
    ratio_0_to_1, ratio_1_to_almost0 = layer_id / (n_layer - 1), 1 - layer_id / n_layer
    www, zigzag, linear = np.zeros(C), np.zeros(C), np.zeros(C)
    for n in range(C):
        linear[n] = n / (C - 1) - 0.5
        zigzag[n] = ((n % N) - ((N - 1) / 2)) / ((N - 1) / 2)
        zigzag[n] = zigzag[n] * abs(zigzag[n])
        www[n] = -6 + 6 * (n / (C - 1)) ** (1 + 1 * ratio_0_to_1**0.3)
    p = first(VARIANTS["rwkv7"], (layer_id, n_layer))
    check_close(p["decay_bias"].reshape(-1), www + 0.5 + zigzag * 2.5, dtype="float32", what="w0")
    check_close(p["rate_bias"].reshape(-1), -0.19 + zigzag * 0.3 + linear * 0.4, dtype="float32", what="a0")
    check_close(p["k_k"].reshape(-1), 0.71 - linear * 0.1, dtype="float32", what="k_k")
    for share, power in zip(p["shares"], (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
        check_close(share, 1 - (np.arange(C) / C) ** (power * ratio_1_to_almost0), dtype="float32", what="share")
    assert set(p["norm_weight"].flat) == {np.float32((2 / 3) ** 0.7)}
    assert not any(p[name].any() for name in p if name.endswith("down"))


def test_ranks_follow_from_the_width():
    """As the published training code suggests them; those of released models are set."""
    for d_model, *ranks in ((768, 64, 128, 32), (1024, 64, 160, 64), (2048, 128, 224, 64), (2560, 128, 256, 96)):
        found = Rwkv7(values="mixed").resolved(d_model)
        assert [found.decay_rank, found.gate_rank, found.value_rank] == ranks, d_model
        assert found.rate_rank == found.decay_rank
        assert Rwkv7(decay_rank=8).resolved(d_model).decay_rank == 8


def test_channel_mix_starts_by_depth():
    for gate, power in ((False, 4), (True, 3)):
        share = first(ChannelMix(8, gate), (1, 4))["share_in"]
        check_close(share, 1 - (np.arange(D) / D) ** (0.75**power), dtype="float32", what="share")


def test_errors_name_the_field():
    with pytest.raises(ConfigError, match=r"^d_model \(100\) not divisible by d_head \(64\)$"):
        Rwkv7().check(100)
    with pytest.raises(ConfigError, match=r"^d_ff \(0\) must be positive$"):
        ChannelMix(0)
