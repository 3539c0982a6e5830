# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of selective_scan: interpreted against the recurrence in float64, compiled where libtpu is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform
from pallas_kernels.op import select
from pallas_kernels.ops import OPS
from pallas_kernels.ops.selective_scan import cases
from pallas_kernels.ops.selective_scan.tpu import api
from tests.ops.interpreter import interpreted
from tests.ops.support import check_against_oracle

DRAWN = (
    cases.Case("ragged", 2, 301, 192, 16, layout="packed", decay="mixed", initial=True, final=True, seed=1),
    cases.Case("blocks", 1, 140, 600, 8, skip=False, final=True, seed=2),
    cases.Case("grouped", 2, 97, 256, 20, 2, layout="scattered", decay="weak", initial=True, final=True, seed=3),
)
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def test_supports_names_argument_and_limit():
    def why(dtype="bfloat16", state=16, width=4, **changed):
        inputs = {**cases.make_inputs(cases.Case("refused", 1, 1, width, state), dtype), **changed}
        return api.supports(*(inputs[name] for name in ("x", "dt", "A", "B", "C")))

    assert why() is None and why("float32", state=64) is None
    assert why("float16") == "dtype of x_BTD (float16) is neither bfloat16 nor float32"
    assert why(dt=np.zeros((1, 1, 4))) == "dtype of dt_BTD (float64) is neither bfloat16 nor float32"
    assert why(B=np.zeros((1, 1, 16))) == "dtype of B_BTN (float64) is neither bfloat16 nor float32"
    assert why(A=np.zeros((4, 16))) == "dtype of A_DN (float64) is not float32"
    assert why(state=65) == "state size of A_DN (65) above 64"
    assert why(width=2**15 + 1, state=1) == "channels of x_BTD (32769) above 32768"


@pytest.mark.parametrize(("case", "dtype"), [
    pytest.param(case, dtype, marks=pytest.mark.slow)
    for case in (*cases.TEST_CASES, *DRAWN)
    for dtype in ("float32", "bfloat16")
], ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_kernels_interpreted_against_the_recurrence(case, dtype):
    with interpreted("selective_scan", "tpu"):
        settings = cases.make_settings(case)
        inputs = cases.make_inputs(case, dtype)
        check_against_oracle("selective_scan", inputs, dtype=dtype, implementation="tpu", **settings)


def compile_for(generation: str, case, dtype):
    """Compiles forward and backward with the TPU compiler; needs libtpu, no TPU."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    inputs = {name: array for name, array in cases.make_inputs(case, dtype).items() if array is not None}
    ids = inputs.pop("segment_ids", None)
    for name in ("B", "C"):
        inputs[name] = inputs[name].reshape(*inputs[name].shape[:2], -1, case.state)
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for name, a in inputs.items()}

    def loss(arrays):
        named = {name: arrays.get(name) for name in ("D", "initial_state")}
        args = [arrays[name] for name in ("x", "dt", "A", "B", "C")]
        y, last = api.selective_scan_tpu(*args, segment_ids=ids, return_final_state=True, **named)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(last**2)

    with jax.set_mesh(mesh):  # tells Pallas the device it compiles for
        return jax.jit(jax.grad(loss)).lower(shapes).compile()


@pytest.mark.libtpu
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize(("case", "dtype"), [
    pytest.param(cases.Case("uneven", 2, 300, 600, 16, layout="packed", initial=True), "bfloat16",
                 marks=pytest.mark.slow),
    pytest.param(cases.Case("plain", 1, 256, 2048, 16), "float32", marks=pytest.mark.slow),
], ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_compiles(generation, case, dtype):
    assert compile_for(generation, case, dtype).as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_auto_stays_with_xla(generation):
    """No TPU has run the kernels."""
    op, array = OPS["selective_scan"], jax.ShapeDtypeStruct
    maps = array((1, 256, 1, 16), "bfloat16")
    args = (array((1, 256, 512), "bfloat16"), array((1, 256, 512), "float32"), array((512, 16), "float32"), maps, maps)
    with assume_platform("tpu", generation=generation):
        assert select(op, "tpu", args, {}) is op.implementations["tpu"]
        assert select(op, "auto", args, {}) is op.implementations["xla"]
