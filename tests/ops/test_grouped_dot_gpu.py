# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels of grouped_dot: their lists of work against plain loops, and, interpreted, the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform, grouped_dot
from pallas_kernels.ops.grouped_dot import cases
from tests.ops.interpreter import interpreted, needs_gpu_interpreter
from tests.ops.support import check_against_oracle, run

gpu = pytest.importorskip("pallas_kernels.ops.grouped_dot.gpu.api", reason="this JAX has no Pallas Mosaic GPU")

N_TILES = 16  # those of 6 x 300 rows, and one
VISITS = jax.jit(lambda sizes: gpu._visits(sizes, N_TILES))
SIZES = {
    "edges": [128, 64, 0, 65, 63, 9],  # groups end where tiles do, in the middle of one, and beside it
    "small": [1, 0, 0, 2, 205],
    "none": [0, 0, 0],
}


def inputs_of(sizes, behind: int, width=128, outputs=128):
    """`behind` rows are in no group, and no numbers."""
    case = cases.Case("sizes", sum(sizes) + behind, width, outputs, len(sizes))
    inputs = cases.make_inputs(case, "bfloat16") | {"sizes": np.array(sizes, np.int32)}
    inputs["x"][sum(sizes) :] = np.nan
    return inputs


@pytest.mark.parametrize("seed", range(30))
def test_a_tile_visits_the_groups_that_have_rows_in_it(seed):
    sizes = np.random.default_rng(seed).choice([0, 1, 2, 127, 128, 129, 300], 6)
    tiles, groups = map(np.asarray, VISITS(sizes.astype(np.int32)))
    assert sorted(tiles[:, 0]) == list(range(N_TILES))
    assert list(tiles[:, 2]) == sorted(tiles[:, 2], reverse=True)
    ends = np.cumsum(sizes)
    for tile, first, count in tiles:
        begin, end = tile * gpu.ROWS, (tile + 1) * gpu.ROWS
        wanted = [g for g in range(6) if max(begin, ends[g] - sizes[g]) < min(end, ends[g])]
        visited = groups[first : first + count]
        assert list(visited[:, 0]) == wanted
        assert [tuple(row) for row in visited[:, 1:]] == [(ends[g] - sizes[g], ends[g]) for g in wanted]


def test_largest_groups_come_first():
    """Copies begin at multiples of 8 rows, which the interpreter does not ask for."""
    found = np.asarray(gpu._largest_first(jnp.array([3, 0, 9, 30, 0, 3], jnp.int32)))
    wanted = [[3, 8, 12, 42], [2, 0, 3, 12], [0, 0, 0, 3], [5, 40, 42, 45], [1, 3, 3, 3], [4, 42, 42, 42]]
    np.testing.assert_array_equal(found, wanted)


@needs_gpu_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("behind", [0, 70])
@pytest.mark.parametrize("name", SIZES)
def test_kernels_interpreted(name, behind):
    """Rows in no group give zeros and get zero gradients, whatever stands in them."""
    inputs = inputs_of(SIZES[name], max(behind, not sum(SIZES[name])))
    n_rows = sum(SIZES[name])
    with interpreted("grouped_dot", "gpu"):
        found = run("grouped_dot", inputs, implementation="gpu")
    assert not found["out0"][n_rows:].any() and not found["dx"][n_rows:].any()
    clean = inputs | {"x": np.where(np.arange(len(inputs["x"]))[:, None] < n_rows, inputs["x"], 0)}
    with interpreted("grouped_dot", "gpu"):
        check_against_oracle("grouped_dot", clean, dtype="bfloat16", implementation="gpu")


@needs_gpu_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(("width", "outputs"), [(256, 128), (128, 384), (128, 512)])
def test_widths_interpreted(width, outputs):
    with interpreted("grouped_dot", "gpu"):
        inputs = inputs_of([70, 0, 130], 0, width, outputs)
        check_against_oracle("grouped_dot", inputs, dtype="bfloat16", implementation="gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((99, 128), "float32"), "w": jnp.zeros((3, 128, 128), "float32")}, "dtype float32, not bfloat"),
        ({"w": jnp.zeros((3, 128, 192), "bfloat16")}, r"outputs \(192\) of w_GKN are not multiples of 128"),
    ],
)
@pytest.mark.newer
def test_calls_that_the_kernels_do_not_serve(change, message):
    inputs = inputs_of([40, 50, 9], 0) | change
    with assume_platform("gpu", capability="9.0"), pytest.raises(NotImplementedError, match=message):
        grouped_dot(*inputs.values(), implementation="gpu")


def test_few_rows_a_group_are_left_to_xla():
    assert gpu.slower(*inputs_of([8, 8], 0).values()).startswith("8 rows a group")
    assert gpu.slower(*inputs_of([99, 8], 0).values()) is None
