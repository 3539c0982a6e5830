# SPDX-License-Identifier: Apache-2.0
"""grouped_dot: blocks, ragged_dot and, interpreted, megablox against one product a group in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform, grouped_dot
from pallas_kernels.ops.grouped_dot import cases, xla
from tests.ops.support import check_against_oracle, run_by_one_program


@pytest.mark.quick
@pytest.mark.parametrize("case", cases.TEST_CASES, ids=lambda case: case.name)
def test_equals_one_product_a_group(case):
    check_against_oracle("grouped_dot", cases.make_inputs(case), implementation="xla")


@pytest.mark.parametrize("name", ["skewed", "part"])
def test_ragged_dot_equals_one_product_a_group(name):
    """What "xla" is on a TPU; here JAX multiplies with all groups and masks."""
    with assume_platform("tpu"):
        check_against_oracle("grouped_dot", cases.make_inputs(cases.CASES[name]), implementation="xla")


def test_several_blocks_a_group():
    case = cases.Case("blocks", 300, 8, 6, 4)
    assert xla._block_rows(np.zeros((300, 8)), np.zeros(4)) == 32
    check_against_oracle("grouped_dot", cases.make_inputs(case), implementation="xla")


def test_work_does_not_grow_with_the_number_of_groups():
    """Of 64 groups no row is multiplied with more than one: no array of groups times rows, forward or backward."""
    shapes = [
        jax.ShapeDtypeStruct(s, t) for s, t in (((512, 64), "float32"), ((64, 64, 64), "float32"), ((64,), "int32"))
    ]
    grad = jax.jit(jax.grad(lambda x, w, sizes: grouped_dot(x, w, sizes).sum(), argnums=(0, 1)))
    temporary = grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 3 * 4 * (2 * 512 * 64 + 64 * 64 * 64)  # the dense form holds 64 * 512 * 64 numbers


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_in_no_group_do_not_matter(implementation):
    inputs = cases.make_inputs(cases.CASES["part"])
    run = functools.partial(run_by_one_program, "grouped_dot", implementation=implementation)
    clean = run(inputs)
    n_rows = inputs["sizes"].sum()
    dirty = {**inputs, "x": np.where(np.arange(40)[:, None] < n_rows, inputs["x"], np.nan)}
    for name, value in run(dirty).items():
        np.testing.assert_array_equal(value, clean[name], err_msg=name)
    for name in ("out0", "dx"):
        assert not clean[name][n_rows:].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((40, 7), np.float32)}, ValueError, r"w_GKN has shape \[5, 8, 6\], expected \[any, 7, any\]"),
        ({"sizes": np.zeros(4, np.int32)}, ValueError, r"sizes_G has shape \[4\], expected \[5\]"),
        ({"sizes": np.zeros(5, np.float32)}, TypeError, "sizes_G has dtype float32"),
        ({"x": jnp.zeros((40, 8), jnp.bfloat16)}, TypeError, r"w_GKN has dtype float32, expected that of x_MK"),
    ],
)
def test_errors_name_argument_value_and_limit(change, error, message):
    with pytest.raises(error, match=message):
        grouped_dot(*({**cases.make_inputs(cases.CASES["skewed"]), **change}).values())


def test_widths_that_the_kernel_does_not_serve():
    inputs = cases.make_inputs(cases.CASES["skewed"])
    with assume_platform("tpu"), pytest.raises(NotImplementedError, match=r"inputs \(8\) and outputs \(6\)"):
        jax.eval_shape(functools.partial(grouped_dot, implementation="tpu"), *inputs.values())
