# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels of causal_conv1d: interpreted anywhere, the real ones on a Hopper GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.layouts import make_segment_ids
from pallas_kernels.ops.causal_conv1d import cases
from pallas_kernels.ops.causal_conv1d.documents import count_taps
from pallas_kernels.oracle import compare
from pallas_kernels.platform import assume_platform
from tests.ops.interpreter import interpreted, needs_gpu_interpreter
from tests.ops.support import check_against_oracle

gpu = pytest.importorskip("pallas_kernels.ops.causal_conv1d.gpu.api", reason="this JAX has no Pallas Mosaic GPU")

NARROW_CASES = tuple(dataclasses.replace(case, width=8) for case in cases.TEST_CASES)
SCATTERED = next(case for case in NARROW_CASES if case.name == "scattered")
PARTS = cases.Case("parts", 2, 150, 264, 4, "packed", initial=True, final=True)  # of rows
OVERHANG = cases.Case("overhang", 1, 26, 8, 4, initial=True)  # a short last block


def check_interpreted(case, dtype):
    inputs, settings = cases.make_inputs(case, dtype), cases.make_settings(case)
    with interpreted("causal_conv1d", "gpu", multiprocessors=2):
        check_against_oracle("causal_conv1d", inputs, dtype=dtype, implementation="gpu", **settings)


@needs_gpu_interpreter
@pytest.mark.quick
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(PARTS, "float32"), (OVERHANG, "float32"), (SCATTERED, "bfloat16")],
    ids=lambda value: getattr(value, "name", value),
)
def test_kernels_interpreted(case, dtype):
    check_interpreted(case, dtype)


@needs_gpu_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", NARROW_CASES, ids=lambda case: case.name)
def test_kernels_interpreted_on_all_cases(case, dtype):
    check_interpreted(case, dtype)


@pytest.mark.parametrize("layout", ["packed", "edges", "singles", "right", "empty"])
@pytest.mark.parametrize("n_before", [1, 7])
def test_taps_counted_are_those_of_the_document(layout, n_before):
    """Without padding inside a document: the tokens since its start, at most W; what is before a row counts as its."""
    ids = make_segment_ids(layout, 3, 40, seed=2)
    counted = np.asarray(count_taps(jnp.asarray(ids), n_before))
    for row, found in zip(ids, counted, strict=True):
        since = n_before
        for token, value in enumerate(row):
            same = token == 0 or value == row[token - 1]
            since = (since + 1 if same else 1) if value else 0
            assert found[token] == min(since, n_before + 1)


def plan_of(batch, tokens, width, taps=4, sizes=gpu.BACKWARD):
    array = jax.ShapeDtypeStruct
    x, w = array((batch, tokens, width), jnp.bfloat16), array((width, taps), jnp.float32)
    return gpu.make_plan(sizes, "silu", x, w, None, None, None)


@pytest.mark.parametrize("shape", [(8, 2048, 4352), (1, 65536, 4352), (64, 256, 320), (1, 1, 8), (3, 1000, 5000)])
def test_parts_cover_every_token_once(shape):
    plan = plan_of(*shape)
    covered = plan.parts * plan.part_blocks * plan.block
    assert covered >= shape[1] > covered - plan.part_blocks * plan.block


@pytest.mark.parametrize("multiprocessors", [132, 114, 78])  # H100 SXM, H100 PCIe, H20
def test_parts_fill_the_device(multiprocessors):
    with assume_platform("gpu", multiprocessors=multiprocessors):
        rounds = plan_of(8, 2048, 4352).parts * 8 * 17 / (multiprocessors * gpu.BACKWARD[0][2])
    assert rounds / np.ceil(rounds) > 0.85


@pytest.mark.parametrize(("shape", "taps", "dtype", "reason"), [
    ((1, 8, 12), 4, jnp.bfloat16, r"bytes of a token of x \(24\) no multiple of 16"),
    ((1, 8, 8), 9, jnp.bfloat16, r"taps of w \(9\) above 8"),
    ((1, 8, 8), 4, jnp.float64, "x has dtype float64"),
])  # fmt: skip
def test_what_it_cannot_serve_it_names(shape, taps, dtype, reason):
    x, w = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((shape[2], taps), jnp.float32)
    with pytest.raises(NotImplementedError, match=reason):
        gpu.causal_conv1d_gpu(x, w)


HOPPER_CASES = (
    *NARROW_CASES,
    cases.Case("parts", 2, 1500, 520, 4, "packed", initial=True, final=True),
    cases.Case("eight", 2, 700, 264, 8, "edges", initial=True, final=True),
    cases.Case("five", 3, 333, 776, 5, "scattered", initial=True, final=True),
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", HOPPER_CASES, ids=lambda case: case.name)
@pytest.mark.hopper
def test_kernels_against_direct_taps(case, dtype):
    inputs, settings = cases.make_inputs(case, dtype), cases.make_settings(case)
    errors = compare("causal_conv1d", inputs, dtype=dtype, implementation="gpu", **settings)
    bad = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not bad, bad
