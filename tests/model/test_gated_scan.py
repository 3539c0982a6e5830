# SPDX-License-Identifier: Apache-2.0
"""minGRU, minLSTM and HGRN against their papers' equations, token by token in NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import ConfigError, GatedScan
from hybridlm.layers.block import Tokens
from tests.model.model_support import QUICK, named
from tests.model.properties import D, mixer_of
from tests.tolerances import check_close

T = 7
BLOCKS = {
    "mingru": GatedScan(),
    "mingru_conv": GatedScan(positive=False, d_conv=3),
    "minlstm": GatedScan("minlstm", expand=1.5),
    "hgrn": GatedScan("hgrn"),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolved(p, x):
    past = np.concatenate([np.zeros((2, D)), x])
    y = sum(past[i : i + T] * p["conv"][:, i] for i in range(3)) + p["conv_bias"]
    return y * sigmoid(y)


def published(block: GatedScan, p, x):
    x = x if block.d_conv is None else convolved(p, x)
    parts = np.einsum("td,dcf->ctf", x, p["w_in"])
    candidate = parts[-1]
    if block.positive:
        candidate = np.where(candidate >= 0, candidate + 0.5, sigmoid(candidate))
    h, out = np.zeros(parts.shape[-1]), []
    for t in range(T):
        if block.cell == "mingru":
            z = sigmoid(parts[0, t])
            h = (1 - z) * h + z * candidate[t]
        elif block.cell == "minlstm":
            f, i = sigmoid(parts[0, t]), sigmoid(parts[1, t])
            h = f / (f + i) * h + i / (f + i) * candidate[t]
        else:
            bound = sigmoid(p["lower_bound"])
            f = bound + (1 - bound) * sigmoid(parts[0, t])
            h = f * h + (1 - f) * parts[1, t] * sigmoid(parts[1, t])
        out.append(h)
    y = np.stack(out)
    if block.cell == "hgrn":
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * p["norm"] * parts[2] * sigmoid(parts[2])
    return y @ p["w_out"]


@pytest.mark.parametrize("name", BLOCKS)
def test_the_published_equations(name):
    block = BLOCKS[name]
    graphdef, state = mixer_of(block)
    x_TD = np.random.default_rng(2).normal(size=(T, D)).astype(np.float32)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state).mix(x, Tokens()).y_BTD, compiler_options=QUICK)
    p = {name: value.astype(np.float64) for name, value in named(state).items()}
    check_close(run(state, x_TD[None])[0], published(block, p, x_TD.astype(np.float64)), dtype="float32", what="output")


def test_errors_name_the_field():
    with pytest.raises(ConfigError, match=r"^expand \* d_model \(7.5\) must be a positive whole number$"):
        GatedScan(expand=0.5).check(15)
    with pytest.raises(ConfigError, match=r"^cell \('gru'\) must be one of mingru, minlstm, hgrn$"):
        GatedScan("gru")
