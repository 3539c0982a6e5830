# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels of gated_delta_rule: gates by chunk and interpreted kernels anywhere, the real ones on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.layouts import LAYOUTS, make_segment_ids
from pallas_kernels.op import select
from pallas_kernels.ops import OPS
from pallas_kernels.ops.gated_delta_rule import cases
from pallas_kernels.oracle import compare
from pallas_kernels.platform import assume_platform
from tests.ops.interpreter import interpreted, needs_gpu_interpreter
from tests.ops.support import check_against_oracle

gpu = pytest.importorskip("pallas_kernels.ops.gated_delta_rule.gpu.api", reason="this JAX has no Pallas Mosaic GPU")
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
inverse = pytest.importorskip("pallas_kernels.ops.gated_delta_rule.gpu.inverse")

SERVED = (*cases.TEST_CASES, *cases.WIDTH_CASES)
by_name = pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)


def check_interpreted(inputs, case):
    with interpreted("gated_delta_rule", "gpu"):
        settings = cases.make_settings(case)
        check_against_oracle("gated_delta_rule", inputs, dtype="bfloat16", implementation="gpu", **settings)


def test_supports_names_argument_and_limit():
    def why(scale=1.0, dtype="bfloat16", **changes):
        case = cases.Case("refused", 1, 16, 2, 64, 1, **{"key": 64, "gate": "head", **changes})
        inputs = cases.make_inputs(case, dtype)
        return gpu.supports(*(inputs[name] for name in ("q", "k", "v", "beta", "g")), scale=scale)

    assert why() is None and why(gate=None) is None and why(gate="channel") is None
    assert why(dtype="float32") == "dtype of q_BTGN (float32) is not bfloat16"
    assert why(key=192) == "key width of k_BTGN (192) above 128"


@pytest.mark.newer
@pytest.mark.parametrize(("name", "updates"), [("gated_delta_rule", {}), ("gated_delta_product", {"updates": 2})])
@pytest.mark.parametrize(
    ("changes", "choice"), [({}, "gpu"), ({"gate": None}, "gpu"), ({"gate": "channel"}, "gpu"), ({"key": 192}, "xla")]
)
def test_auto_takes_what_is_proven_on_the_card(name, updates, changes, choice):
    op = OPS[name]
    case = op.cases_module().Case("auto", 1, 16, 2, 64, 1, **{"key": 64, "gate": "head", **updates, **changes})
    inputs = op.cases_module().make_inputs(case, "bfloat16")
    with assume_platform("gpu", capability="9.0"):
        chosen = select(op, "auto", tuple(inputs[name] for name in op.positional), {"scale": 1.0})
    assert chosen is op.implementations[choice]


@pytest.mark.slow
@needs_gpu_interpreter
@pytest.mark.parametrize("name", ["no_gate", "scattered"])
def test_several_updates_a_token(name):
    """Of which the first never decay: in bfloat16 alone their keys' gradient is off by 1.1%."""
    op = OPS["gated_delta_product"]
    case = op.cases_module().CASES[name]
    with interpreted(op.name, "gpu"):
        inputs, settings = op.cases_module().make_inputs(case, "bfloat16"), op.cases_module().make_settings(case)
        check_against_oracle(op.name, inputs, dtype="bfloat16", implementation="gpu", **settings)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dense"])
def test_marks_tell_padding_and_where_documents_begin(layout):
    """Against a walk over the tokens."""
    batch, tokens = 2, 150
    ids = make_segment_ids(layout, batch, tokens, seed=5)
    marks = np.asarray(gpu._marks(jnp.asarray(ids)))
    padded = np.pad(ids != 0, ((0, 0), (0, -tokens % gpu.TILE))).reshape(batch, -1, gpu.TILE)
    np.testing.assert_array_equal(abs(marks), np.where(padded.all(-1, keepdims=True), 2, padded))
    first = (marks < 0).reshape(batch, -1)
    for row in range(batch):
        last = 0
        for t in range(tokens):
            assert first[row, t] == (ids[row, t] != 0 and last != 0 and ids[row, t] != last)
            last = ids[row, t] or last
        assert not first[row, tokens:].any()


@needs_gpu_interpreter
@pytest.mark.slow
@by_name
def test_kernels_interpreted_on_all_cases(case):
    if case.name != "long":  # minutes
        check_interpreted(cases.make_inputs(case, "bfloat16"), case)


@needs_gpu_interpreter
@pytest.mark.quick
@pytest.mark.parametrize(("gate", "heads", "tokens"), [("head", 2, 130), ("channel", 1, 70)])
def test_kernels_interpreted_where_a_head_has_two_warpgroups(gate, heads, tokens):
    case = cases.Case("parts", 1, tokens, heads, 128, 1, 128, gate=gate, decay="mixed", layout="packed")
    inputs = cases.make_inputs(case, "bfloat16")
    inputs["g"][0, 37] = -np.inf  # forgets everything
    check_interpreted(inputs, case)


def invert(below):
    """`unit_inverse` of a triangle, in a kernel of its own."""
    tile = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=gpu.forward.BF16_TRANSFORMS)

    def body(below_g, out_g):
        def scoped(target, scratch):
            given = plgpu.load(below_g, layout=gpu.forward.WGMMA, optimized=False)
            inverse.unit_inverse(given, target, [scratch.at[n] for n in range(inverse.SCRATCH)])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(target, out_g)
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(scoped, tile((gpu.TILE, gpu.TILE)), tile((inverse.SCRATCH, gpu.TILE, gpu.TILE)))

    shape = jax.ShapeDtypeStruct((gpu.TILE, gpu.TILE), jnp.bfloat16)
    return plgpu.kernel(body, out_type=shape, compiler_params=gpu.forward.LANE_PARAMS)(jnp.asarray(below, jnp.float32))


def check_inverse(beta: float):
    """Of keys that are all but alike: powers of the triangle have entries of millions, the inverse of 2 at most."""
    rng = np.random.default_rng(0)
    keys = 1 + 0.05 * rng.standard_normal((gpu.TILE, gpu.TILE))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    below = np.tril(beta * keys @ keys.T, -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(gpu.TILE) + below.astype(np.float64))
    assert np.abs(expected).max() < 2.5
    np.testing.assert_allclose(np.asarray(invert(below), np.float64), expected, atol=2e-3, rtol=2**-8)


@needs_gpu_interpreter
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_a_triangle_of_keys_alike_is_inverted_to_rounding(beta):
    with interpreted("gated_delta_rule", "gpu"):
        check_inverse(beta)


@pytest.mark.hopper
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_triangles_on_the_device(beta):
    check_inverse(beta)


@pytest.mark.hopper
@by_name
def test_kernels_against_the_recurrence(case):
    inputs, settings = cases.make_inputs(case, "bfloat16"), cases.make_settings(case)
    errors = compare("gated_delta_rule", inputs, dtype="bfloat16", implementation="gpu", **settings)
    bad = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not bad, bad
