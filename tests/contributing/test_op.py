# SPDX-License-Identifier: Apache-2.0
"""An op of one file: what would be a folder of pallas_kernels/ops. docs/contributing/op.md quotes it."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench
from pallas_kernels.checks import check_float, check_segment_ids, check_shape
from pallas_kernels.layouts import make_segment_ids
from pallas_kernels.op import Implementation, Op, call
from pallas_kernels.ops import OPS
from pallas_kernels.segments import document_numbers
from pallas_kernels.varying import vary_alike
from tests.ops import contract

# __init__.py

OP = Op(
    name="fading_sum",
    cases=__name__,
    positional=("x", "decay"),
    integers=("segment_ids",),
    rows=("x",),
    tokens=("x",),
    has_segments=True,
    padding_may_be_nan=True,
    implementations={
        "reference": Implementation(f"{__name__}:fading_sum_reference", forward_mode=True),
        "xla": Implementation(f"{__name__}:fading_sum_xla", forward_mode=True),
    },
)


# api.py


def fading_sum(x_BTD, decay_D, *, segment_ids=None, implementation="auto"):
    """y_t = decay y_{t-1} + x_t, per channel, starting anew in each document.

    Args:
      x_BTD: inputs, floating point.
      decay_D: what a token keeps of the sum before it, in [0, 1].
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      implementation: "auto", "reference" or "xla".

    Returns:
      y_BTD in the dtype of x. Raises ValueError or TypeError for arguments that do not fit together.
    """
    check_shape("x_BTD", x_BTD, (None,) * 3, "batch, tokens, channels")
    check_shape("decay_D", decay_D, x_BTD.shape[2:], "channels of x_BTD")
    check_float("x_BTD", x_BTD)
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, x_BTD.shape[:2], "batch, tokens of x_BTD")
    return call(OP, implementation, (x_BTD, decay_D), {"segment_ids": segment_ids})


# reference.py


def fading_sum_reference(x_BTD, decay_D, *, segment_ids=None):
    """Token by token, each step as the docstring of `fading_sum` says it."""
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    ids_BT = jnp.ones(x_BTD.shape[:2], jnp.int32) if segment_ids is None else segment_ids

    def step(carry, token):
        sum_BD, last_B = carry
        x_BD, id_B = token
        real_B1, new_B1 = (id_B != 0)[:, None], (id_B != last_B)[:, None]
        after_BD = jnp.where(new_B1, 0, decay_D[None] * sum_BD) + x_BD
        sum_BD = jnp.where(real_B1, after_BD, sum_BD)
        return (sum_BD, jnp.where(id_B != 0, id_B, last_B)), jnp.where(real_B1, after_BD, 0)

    start = (jnp.zeros((x_BTD.shape[0], x_BTD.shape[2]), dtype), ids_BT[:, 0])
    tokens = (x_BTD.swapaxes(0, 1).astype(dtype), ids_BT.T)
    _, y_TBD = jax.lax.scan(step, *vary_alike((start, tokens)))  # in checked shard_maps, too
    return y_TBD.swapaxes(0, 1).astype(x_BTD.dtype)


# xla.py


def fading_sum_xla(x_BTD, decay_D, *, segment_ids=None):
    """An associative scan over (decay, sum): any backend, memory linear in T."""
    dtype = jnp.promote_types(x_BTD.dtype, jnp.float32)
    decay_BTD, in_BTD = jnp.broadcast_to(decay_D.astype(dtype), x_BTD.shape), x_BTD.astype(dtype)
    if segment_ids is not None:
        number_BT = document_numbers(segment_ids)
        before_BT = jnp.pad(number_BT[:, :-1], ((0, 0), (1, 0)))
        real_BT1 = (segment_ids != 0)[..., None]
        decay_BTD = jnp.where(real_BT1, jnp.where((number_BT != before_BT)[..., None], 0, decay_BTD), 1)
        in_BTD = jnp.where(real_BT1, in_BTD, 0)
    _, y_BTD = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay_BTD, in_BTD), axis=1)
    y_BTD = y_BTD if segment_ids is None else jnp.where(real_BT1, y_BTD, 0)
    return y_BTD.astype(x_BTD.dtype)


# cases.py


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `layout` is a name of pallas_kernels.layouts."""

    name: str
    batch: int
    tokens: int
    width: int
    layout: str = "dense"
    seed: int = 0


TEST_CASES = (
    Case("dense", 2, 33, 6),
    Case("one_token", 2, 1, 6),
    Case("packed", 2, 64, 6, "packed"),
    Case("scattered", 2, 70, 6, "scattered"),  # padding anywhere
)
BENCH_CASES = (Case("b8_t2048_d4096", 8, 2048, 4096), Case("tiny", 2, 64, 64, "packed"))
CONTRACT = dict.fromkeys(OP.implementations, Case("small", 2, 24, 6))  # the smallest that shows all of the contract
CASES = {case.name: case for case in (*TEST_CASES, *BENCH_CASES)}


def make_inputs(case, dtype="float32"):
    """Arguments by name, NumPy arrays."""
    rng = np.random.default_rng(case.seed)
    return {
        "x": rng.standard_normal((case.batch, case.tokens, case.width)).astype(jnp.dtype(dtype)),
        "decay": rng.uniform(0.5, 1.0, case.width).astype(np.float32),
        "segment_ids": make_segment_ids(case.layout, case.batch, case.tokens, seed=case.seed),
    }


def make_settings(case):
    """The other arguments: none."""
    return {}


def count_flops(case):
    """A product and a sum for each number."""
    return 2 * case.batch * case.tokens * case.width


# The folder and the word in pallas_kernels/ops/__init__.py, for the length of a test


@pytest.fixture(autouse=True)
def named_in_ops(monkeypatch):
    monkeypatch.setitem(OPS, OP.name, OP)
    monkeypatch.setitem(sys.modules, f"pallas_kernels.ops.{OP.name}.api", sys.modules[__name__])


@pytest.mark.parametrize("implementation", OP.implementations)
@pytest.mark.parametrize("check", (*contract.ESSENTIAL, *contract.REST, *contract.PLAIN), ids=lambda c: c.__name__)
def test_it_keeps_the_contract_of_all_ops(implementation, check):
    check(contract.Subject("fading_sum", implementation))


def test_the_benchmark_checks_and_times_it(capsys):
    assert bench.main(["fading_sum", "--impl", "xla,reference", "--check", "--dtype", "float32"]) == 0
    assert bench.main(["fading_sum", "--impl", "xla", "--seconds", "0.01"]) == 0
    assert "scattered" in (said := capsys.readouterr().out) and "TFLOP/s" in said


def test_the_door_is_that_of_all_ops():
    x_BTD, decay_D = jnp.ones((8, 4, 3)), jnp.full(3, 0.5)
    np.testing.assert_allclose(fading_sum(x_BTD, decay_D)[0, :, 0], [1, 1.5, 1.75, 1.875])
    with pytest.raises(NotImplementedError, match="'tpu'"):
        fading_sum(x_BTD, decay_D, implementation="tpu")
    mesh = jax.sharding.Mesh(jax.devices()[:8], ("data",))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    split = jax.shard_map(fading_sum, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    np.testing.assert_allclose(split(x_BTD, decay_D), fading_sum(x_BTD, decay_D), rtol=1e-6)
