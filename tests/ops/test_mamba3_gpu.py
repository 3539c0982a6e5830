# SPDX-License-Identifier: Apache-2.0
"""How mamba3 becomes a call of ssd, whose kernels test_ssd_gpu.py is about; with XLA in their place, in float32."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.ops.mamba3 import OP, cases, parts
from pallas_kernels.ops.mamba3.gpu import api
from pallas_kernels.ops.ssd.api import ssd
from pallas_kernels.platform import assume_platform
from tests.ops.support import check_against_oracle, served_by


@pytest.mark.parametrize(
    "name",
    [pytest.param(case.name, marks=[pytest.mark.slow] * (case.name != "mimo_norm")) for case in cases.TEST_CASES],
)
def test_it_is_a_call_of_ssd(name, monkeypatch):
    """Outputs, states and gradients, in float32."""
    case = cases.CASES[name]
    monkeypatch.setattr(api, "ssd_gpu", by_xla)
    with served_by(api.mamba3_gpu, only="mamba3"):
        check_against_oracle("mamba3", cases.make_inputs(case), **cases.make_settings(case))


def by_xla(x, dt, A, B, C, *, turn, turns, segment_ids, **options):
    """What mamba3 asks of ssd's kernels: maps turned, and nothing read of one's own token."""
    B, C = (parts.rotate(array, turn, "adjacent" if turns.step == 2 else "half") for array in (B, C))
    y, state = ssd(x, dt, A, B, C, segment_ids=segment_ids, implementation="xla", **options)
    if segment_ids is not None:
        dt = jnp.where(segment_ids[..., None] != 0, dt, 0)
    B, C, weighed = (a.reshape(a.shape[0], -1, turns.alone, *a.shape[2:]) for a in (B, C, dt[..., None] * x))
    reads = jnp.tril(jnp.ones((turns.alone, turns.alone)))[None, None, None]
    own = jnp.einsum("bthrs,btshp->btrhp", jnp.einsum("btrhn,btshn->bthrs", C, B) * reads, weighed)
    return y - own.reshape(y.shape), state


@pytest.mark.newer
def test_supports_names_argument_and_limit():
    inputs = cases.make_inputs(cases.CASES["mimo"], "bfloat16")
    given = {name: array for name, array in inputs.items() if array is not None}
    args = [given.pop(name) for name in OP.positional]
    check = functools.partial(api.supports, **given)
    with assume_platform("gpu", capability="9.0"):
        assert check(*args) is None
        wide = jax.ShapeDtypeStruct((*args[1].shape[:-1], 512), jnp.bfloat16)
        assert "state size" in check(args[0], wide, *args[2:])
        single = jax.ShapeDtypeStruct(args[2].shape, jnp.float32)
        assert "float32" in check(*args[:2], single, *args[3:])
        three = jax.ShapeDtypeStruct((*args[0].shape[:2], 3, *args[0].shape[3:]), jnp.bfloat16)
        assert "ranks of q_BTGN (3) not a divisor of 64" in check(three, *args[1:])
