# SPDX-License-Identifier: Apache-2.0
"""The scans and the convolution against numbers of published float64 reference runs (named in each file's `meta`)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv1d, selective_scan, ssd
from pallas_kernels.compat import enable_x64
from tests.ops.support import QUICK
from tests.tolerances import check_close

pytestmark = pytest.mark.quick
FOLDER = Path(__file__).parent.parent / "golden_ops"
IMPLEMENTATIONS = ("reference", "xla")


def load(path):
    data = np.load(path)
    parts = {prefix: {k[len(prefix) :]: data[k] for k in data.files if k.startswith(prefix)}
             for prefix in ("in_", "out_", "w_", "grad_")}  # fmt: skip
    return parts, json.loads(str(data["meta"]))["options"]


def end_state_with_its_document(parts):
    """The file's convolution state is the row's last inputs of whatever document, ours only those of the last one."""
    ids = parts["in_"]["segment_ids"]
    n_before = parts["out_"]["final_state"].shape[1]
    foreign = ids[:, -n_before:] != ids[:, -1:]
    assert foreign.any()
    parts["out_"]["final_state"][foreign] = 0
    parts["grad_"]["x"][:, -n_before:][foreign] -= parts["w_"]["final_state"][foreign]


def call_ssd(a, fixed, options, implementation):
    dt = a["dt"]
    if options.get("dt_softplus"):
        dt = jax.nn.softplus(dt + a["dt_bias"][None, None])
    y, state = ssd(a["x"], dt, a["A"], a["B"], a["C"], D=a["D"], segment_ids=fixed.get("segment_ids"),
                   initial_state=a.get("initial_state"), return_final_state=True, chunk=16,
                   implementation=implementation)  # fmt: skip
    return {"y": y * jax.nn.silu(a["z"]) if "z" in a else y, "final_state": state}


def call_selective_scan(a, fixed, options, implementation):
    dt = a["delta"]
    if options["delta_softplus"]:
        dt = jax.nn.softplus(dt + a["delta_bias"][None, None])
    y, state = selective_scan(a["u"], dt, a["A"], a["B"], a["C"], D=a.get("D"), segment_ids=fixed.get("segment_ids"),
                              initial_state=a.get("initial_state"), return_final_state=True, chunk=16,
                              implementation=implementation)  # fmt: skip
    return {"y": y * jax.nn.silu(a["z"]) if "z" in a else y, "final_state": state}


def call_causal_conv1d(a, fixed, options, implementation):
    y, state = causal_conv1d(a["x"], a["weight"], a["bias"], activation=options["activation"],
                             segment_ids=fixed.get("segment_ids"), initial_state=a.get("initial_state"),
                             return_final_state=True, implementation=implementation)  # fmt: skip
    return {"y": y, "final_state": state}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.npz")), ids=lambda path: path.stem)
def test_golden(path, implementation):
    parts, options = load(path)
    if path.stem == "causal_conv1d-t17-segments":
        end_state_with_its_document(parts)
    functions = {"ssd": call_ssd, "selective_scan": call_selective_scan, "causal_conv1d": call_causal_conv1d}
    function = functions[path.stem.split("-")[0]]
    # The files count documents from 0, which is padding here.
    fixed = {k: v.astype(np.int32) + 1 for k, v in parts["in_"].items() if v.dtype.kind == "i"}
    arrays = {k: v for k, v in parts["in_"].items() if v.dtype.kind == "f"}
    with enable_x64(implementation == "reference"):
        wide = np.float64 if implementation == "reference" else np.float32
        arrays, fixed = jax.tree.map(lambda v: jnp.asarray(v, wide), arrays), jax.tree.map(jnp.asarray, fixed)
        out, grads = run(function, arrays, fixed, options, implementation, parts["w_"])
    for name, expected in parts["out_"].items():
        check_close(out[name], expected, dtype="float32", what=f"{path.stem} {name}")
    for name, expected in parts["grad_"].items():
        check_close(grads[name], expected, dtype="float32", what=f"{path.stem} d{name}")


def run(function, arrays, fixed, options, implementation, weights):
    def loss(arrays):
        out = function(arrays, fixed, options, implementation)
        return sum(jnp.sum(out[name] * weight) for name, weight in weights.items()), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)(arrays)
    return jax.tree.map(np.asarray, (out, grads))


def test_every_golden_file_is_here():
    assert len(list(FOLDER.glob("ssd-*.npz"))) == 6
    assert len(list(FOLDER.glob("selective_scan-*.npz"))) == 5
    assert len(list(FOLDER.glob("causal_conv1d-*.npz"))) == 5
