# SPDX-License-Identifier: Apache-2.0
"""Mamba-3's mixer against numbers of the published block, one input a head and several, both activations of A."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.config import ConfigError, Mamba3
from hybridlm.layers.block import Make, Tokens
from pallas_kernels import vectors
from tests.model.model_support import QUICK

FOLDER = Path(__file__).parent.parent / "golden_ops"
FILES = {
    "mamba3_block-siso-heavytail": (),
    "mamba3_block-siso-softplus-norm": (pytest.mark.slow,),
    "mamba3_block-mimo4-heavytail": (),
}


def from_published(a: dict, o: dict) -> dict[str, np.ndarray]:
    """Our parameters from the published ones, or the gradients of ours from theirs: [z x B C dt A trap angles] rows."""
    H, P, N, G, S, R = (o[name] for name in "HPNGSR")
    sizes = np.cumsum([2 * H * P, 2 * R * G * N, 3 * H])
    zx, BC, dt, angles = np.split(a["in_proj"].T, sizes, axis=1)
    d, ranks = len(zx), (R,) if o["mimo"] else ()
    ours = {
        "in_zx": zx.reshape(d, 2, H, P), "in_BC": BC.reshape(d, 2, *ranks, G, N), "in_dt": dt.reshape(d, 3, H),
        "in_angles": angles, "dt_bias": a["dt_bias"], "D": a["D"], "B_norm.weight": a["B_norm"],
        "C_norm.weight": a["C_norm"], "B_bias": a["B_bias"].reshape(H, *ranks, N),
        "C_bias": a["C_bias"].reshape(H, *ranks, N), "out": a["out_proj"].T.reshape(H, P, d),
    }  # fmt: skip
    assert angles.shape[1] == S
    renamed = {"mimo_x": "mimo_v", "mimo_z": "mimo_z", "mimo_o": "mimo_o"}
    ours |= {to: a[name] for name, to in renamed.items() if name in a}
    return ours | ({"norm": a["norm_weight"].reshape(H, P)} if "norm_weight" in a else {})


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in FILES.items()])
def test_the_published_block(name):
    """Outputs, and gradients of the input and of every parameter."""
    data = np.load(FOLDER / f"{name}.npz")
    o = json.loads(str(data["meta"]))["options"]
    given = {key[3:]: data[key] for key in data.files if key.startswith("in_")}
    grads = {key[5:]: data[key] for key in data.files if key.startswith("grad_")}
    block = Mamba3(
        d_state=o["N"], d_head=o["P"], expand=o["H"] * o["P"] / 16, n_groups=o["G"], rank=o["R"] if o["mimo"] else None,
        rope_fraction=2 * o["S"] / o["N"], A_activation=o["A_activation"], A_floor=o["A_floor"],
        out_norm=o["outproj_norm"], chunk=8,
    )  # fmt: skip
    mixer = nnx.eval_shape(lambda: block.build(16, Make(nnx.Rngs(0), dtype="float32")))
    graphdef, shapes = nnx.split(mixer)
    ours = from_published(given, o)
    flat = {path: shape for path, shape in nnx.to_flat_state(shapes)}
    values = {path: ours.pop(".".join(map(str, path))) for path in flat}
    assert not ours

    def loss(values, u):
        state = nnx.from_flat_state([(path, leaf.replace(values[path])) for path, leaf in flat.items()])
        y = nnx.merge(graphdef, state).mix(u, Tokens()).y_BTD
        return (y * data["w_out"]).sum(), y

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=QUICK)
    (_, y), (d_ours, du) = run(values, given["u"])
    of_out, of_grad = vectors.tolerances("mamba3_block", "float32")
    assert np.abs(y - data["out_out"]).max() <= of_out * np.abs(data["out_out"]).max()
    expected = from_published(grads, o) | {"u": grads["u"]}
    found = {".".join(map(str, path)): grad for path, grad in d_ours.items()} | {"u": du}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.abs(found[key] - value).max() <= of_grad * np.abs(value).max(), key


def test_errors_name_the_field():
    with pytest.raises(ConfigError, match=r"^rope_fraction \(0.5\) of d_state \(2\) turns no pair$"):
        Mamba3(d_state=2)
    with pytest.raises(ConfigError, match=r"^expand \* d_model \(30\) not divisible by d_head \(64\)$"):
        Mamba3().check(15)
    with pytest.raises(ConfigError, match=r"^heads \(2\) not divisible by n_groups \(4\)$"):
        Mamba3(n_groups=4).check(64)
