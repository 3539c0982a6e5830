# SPDX-License-Identifier: Apache-2.0
"""What `mamba3` does otherwise than on a GPU: angles added up in blocks, and on a TPU pairs of channels in halves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import make_segment_ids
from pallas_kernels.op import select
from pallas_kernels.ops.mamba3 import OP, cases, parts
from pallas_kernels.ops.mamba3.reference import mamba3_reference
from pallas_kernels.ops.mamba3.xla import BLOCK, added, added_in_blocks
from pallas_kernels.platform import assume_platform
from pallas_kernels.segments import document_starts
from tests.ops.interpreter import interpreted
from tests.ops.support import check_against_oracle
from tests.tolerances import check_close


@pytest.mark.parametrize("add", [pytest.param(added, marks=pytest.mark.slow), added_in_blocks])
def test_turns_add_up(add):
    """From each start, in more blocks than one and the last of them not whole, whatever a turn's size; what a turn
    hands on to all behind it, backwards."""
    n_tokens, rng = 2 * BLOCK + 40, np.random.default_rng(0)
    turns = rng.standard_normal((2, n_tokens, 1, 4)) * np.asarray([0.01, 0.3, 3, 30])
    starts = np.asarray(document_starts(jnp.asarray(make_segment_ids("scattered", 2, n_tokens, seed=1))))
    run = np.cumsum(starts, axis=1)
    assert any(len(set(row[BLOCK - 1 : BLOCK + 1])) == 1 for row in run)  # one of them goes on into another block
    sees = (run[:, :, None] == run[:, None]) & np.tri(n_tokens, dtype=bool)
    weights = rng.standard_normal(turns.shape)
    turns, weights = turns.astype(np.float32), weights.astype(np.float32)
    sums = np.einsum("bij,bjhs->bihs", sees, turns.astype(np.float64))
    found, back = jax.vjp(jax.jit(lambda turns: add(turns, jnp.asarray(starts))), jnp.asarray(turns))
    for size, limit in enumerate((1e-5, 1e-5, 1e-4, 1e-3)):  # float32 has no more digits of large ones
        assert off_by(found[..., size], sums[..., size]) < limit
    grad = np.einsum("bij,bihs->bjhs", sees, weights.astype(np.float64))
    check_close(back(jnp.asarray(weights))[0], grad, dtype="float32", what="turns")


@pytest.mark.parametrize("add", [pytest.param(added, marks=pytest.mark.slow), added_in_blocks])
def test_long_rows_lose_no_digits(add):
    """Turns that are all the same are rounded the same way, at each sum."""
    turns, starts = jnp.full((1, 16_384, 1, 1), 0.1, jnp.float32), jnp.zeros((1, 16_384), bool)
    assert off_by(jax.jit(add)(turns, starts), np.cumsum(np.asarray(turns), axis=1, dtype=np.float64)) < 1e-4


def off_by(found, angles) -> float:
    """The largest distance on the circle."""
    return np.abs(np.exp(1j * np.asarray(found, np.float64)) - np.exp(1j * angles)).max()


@pytest.mark.parametrize(("key", "angles"), [pytest.param(8, 2, marks=pytest.mark.slow), (9, 3)])
def test_channels_in_halves(key, angles):
    """States, and what is made of them, keep the caller's order; any number of channels is not turned."""
    case = cases.Case("halves", 1, 5, 2, 4, 1, key, angles, rank=2)
    inputs = {name: value for name, value in cases.make_inputs(case).items() if value is not None}
    tokens = [jnp.asarray(inputs.pop(name)) for name in OP.positional]
    options = dict.fromkeys(("D", "norm_weight")) | {name: jnp.asarray(value) for name, value in inputs.items()}
    options |= {"rotary_pairs": "adjacent", "return_final_state": True, "norm_eps": 1e-5}
    scans = (functools.partial(scan, **options) for scan in (parts.in_halves(mamba3_reference), mamba3_reference))
    for found, expected in zip(*(jax.jit(scan)(*tokens) for scan in scans), strict=True):
        check_close(found, expected, dtype="float32", what="y")


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    cases.Case("adjacent", 1, 150, 2, 64, 1, 64, 8, layout="packed", chunk=None),
    cases.Case("ranks", 1, 70, 2, 64, 1, 64, 8, rank=4, norm=True, layout="scattered", chunk=None),
], ids=lambda case: case.name)  # fmt: skip
def test_interpreted(case):
    with interpreted("mamba3", "tpu"):
        inputs, settings = cases.make_inputs(case), cases.make_settings(case)
        check_against_oracle("mamba3", inputs, implementation="tpu", **settings)


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_auto_takes_the_kernels(generation):
    inputs = cases.make_inputs(cases.CASES["tiny"], "bfloat16")
    args = tuple(inputs.pop(name) for name in OP.positional)
    with assume_platform("tpu", generation=generation):
        assert select(OP, "auto", args, inputs) is OP.implementations["tpu"]
