# SPDX-License-Identifier: Apache-2.0
"""Each way to set LinearAttention against its paper's recurrence, token by token in NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import ChannelDecay, ConfigError, LinearAttention, ModelConfig, Rope
from hybridlm.layers.block import Tokens
from hybridlm.model.model import HybridLM
from tests.model.model_support import QUICK, VARIANTS, named, random_tokens, small
from tests.model.properties import D, mixer_of
from tests.tolerances import check_close

T = 7


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, eps=1e-5):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def read(q, k, v, decay):
    """y_t of one row: q, k, decay [T, H, N] (decay broadcast), v [T, H, P]."""
    decay = np.broadcast_to(decay, k.shape)
    state, out = np.zeros((*k.shape[1:], v.shape[-1])), []
    for t in range(len(q)):
        state = decay[t][..., None] * state + k[t][..., None] * v[t][:, None]
        out.append(np.einsum("hnp,hn->hp", state, q[t]))
    return np.stack(out)


def projected(p, x, *names):
    return [np.einsum("td,dhn->thn", x, p[f"w_{name}"]) for name in names]


def turned(x, theta):
    """Pairs (i, i + half) of [T, H, N] rotated by t theta^(-2 i / N), as complex numbers."""
    n = x.shape[-1] // 2
    z = (x[..., :n] + 1j * x[..., n:]) * np.exp(1j * np.arange(T)[:, None, None] * theta ** (-np.arange(n) / n))
    return np.concatenate([z.real, z.imag], axis=-1)


def gla(p, x):
    q, k, v, gate = projected(p, x, "q", "k", "v", "gate")
    raw = np.einsum("tr,rhn->thn", x @ p["w_decay"], p["w_decay_up"]) + p["decay_bias"]
    return rms(read(q / 6**0.5, k, v, sigmoid(raw) ** (1 / 2)), 1e-2) * p["norm"] * silu(gate)


def simple_gla(p, x):
    q, k, v = projected(p, x, "q", "k", "v")
    decay = sigmoid(np.einsum("td,dh->th", x, p["w_decay"]) + p["decay_bias"]) ** (1 / 2)
    return rms(read(q / 4**0.5, k, v, decay[..., None])) * p["norm"]


def retnet(p, x):
    q, k, v, gate = projected(p, x, "q", "k", "v", "gate")
    gamma = np.array([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256])[None, :, None]
    return rms(read(turned(q, 100.0), turned(k, 100.0) / 8**0.5, v, gamma), 1e-2) * silu(gate)


def lightning(p, x):
    """As MiniMax-01 has it: no scale, one norm over all heads, a sigmoid gate."""
    q, k, v = (silu(a) for a in projected(p, x, "q", "k", "v"))
    y = read(q, k, v, np.exp(-p["slopes"])[None, :, None])
    y = rms(y.reshape(T, -1)).reshape(y.shape) * p["norm"]
    return y * sigmoid(projected(p, x, "gate")[0])


def hgrn2(p, x):
    """As fla has it: q / sqrt(N), one norm over all heads."""
    q, f, v = projected(p, x, "q", "k", "v")
    bound = sigmoid(p["lower_bound"])
    forget = bound + (1 - bound) * sigmoid(f)
    y = read(silu(q) / 8**0.5, 1 - forget, v, forget)
    return rms(y.reshape(T, -1)).reshape(y.shape) * p["norm"]


def hgrn2_no_bound(p, x):
    q, f, v, gate = projected(p, x, "q", "k", "v", "gate")
    return read(q / 4**0.5, 1 - sigmoid(f), v, sigmoid(f)) * silu(gate)


def weighed(weights_TSH, v):
    """Causal means of the values."""
    weights = np.where(np.tril(np.ones((T, T), bool))[..., None], weights_TSH, 0)
    return np.einsum("tsh,shp->thp", weights, v) / (weights.sum(1)[..., None] + 1e-6)


def based(p, x):
    q, k, v = projected(p, x, "q", "k", "v")
    scores = np.einsum("thn,shn->tsh", q, k) / 4**0.5
    return weighed(1 + scores + scores**2 / 2, v)


def linear(p, x):
    q, k, v = projected(p, x, "q", "k", "v")
    q, k = (np.where(a > 0, a + 1, np.exp(np.minimum(a, 0))) for a in (q, k))
    return weighed(np.einsum("thn,shn->tsh", q / 6**0.5, k), v)


@pytest.mark.parametrize("published", [gla, simple_gla, retnet, lightning, hgrn2, hgrn2_no_bound, based, linear])
def test_the_published_recurrence(published):
    graphdef, state = mixer_of(VARIANTS[published.__name__])
    x_TD = np.random.default_rng(2).normal(size=(T, D)).astype(np.float32)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state).mix(x, Tokens()).y_BTD, compiler_options=QUICK)
    p = {name: value.astype(np.float64) for name, value in named(state).items()}
    expected = np.einsum("thp,hpd->td", published(p, x_TD.astype(np.float64)), p["w_o"])
    check_close(run(state, x_TD[None])[0], expected, dtype="float32", what="output")


def first_parameters(config: ModelConfig) -> dict[str, np.ndarray]:
    model = jax.jit(lambda key: nnx.state(HybridLM(config, rngs=nnx.Rngs(key))), compiler_options=QUICK)
    return named(model(jax.random.key(0)))


def test_what_starts_by_depth():
    """Layers are counted without feed-forward sublayers, whatever groups the pattern falls into."""
    blocks = {"L": VARIANTS["lightning"], "H": VARIANTS["hgrn2"], "-": VARIANTS["mlp"]}
    p = first_parameters(small("L-L-H-L-H-", blocks))
    slopes = np.concatenate([p[name] for name in p if name.endswith("slopes")])
    rates = 2.0 ** -np.array([4, 8])
    expected = [rates * (1 - layer / (4 + 1e-5) + 1e-5) for layer in (0, 1, 3)]
    check_close(slopes, np.stack(expected), dtype="float32", what="slopes")
    bounds = sigmoid(np.concatenate([p[name] for name in p if name.endswith("lower_bound")])[:, 0, 0])
    check_close(bounds, np.array([2 / 5, 4 / 5]), dtype="float32", what="lower bounds")
    alone = sigmoid(first_parameters(small("HH", blocks))["groups.0.0.mixer.lower_bound"][:, 0, 0])
    check_close(alone, np.array([1e-3, 1 / 2]), dtype="float32", what="lower bounds")


def test_slopes_are_not_trained():
    config = small("L", VARIANTS | {"L": VARIANTS["lightning"]})
    graphdef, params = nnx.split(HybridLM(config, rngs=nnx.Rngs(0)))
    loss = lambda params: nnx.merge(graphdef, params)(random_tokens(1, 5)).std()
    for name, gradient in named(jax.jit(jax.grad(loss), compiler_options=QUICK)(params)).items():
        assert bool(np.any(gradient)) != name.endswith("slopes"), name


def test_errors_name_the_field():
    with pytest.raises(ConfigError, match=r"^d_key \(0\) must be positive$"):
        LinearAttention(d_key=0)
    with pytest.raises(ConfigError, match=r"^feature_map \('taylor'\) has other channels than decay \(ChannelDecay\)"):
        LinearAttention(decay=ChannelDecay(), feature_map="taylor")
    with pytest.raises(ConfigError, match=r"^rank \(0\) must be positive$"):
        ChannelDecay(rank=0)
    with pytest.raises(ConfigError, match=r"^rope fraction \(1.0\) of d_head \(7\) is 7: it must be even"):
        LinearAttention(d_key=7, rope=Rope())
