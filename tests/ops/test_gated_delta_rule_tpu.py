# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of gated_delta_rule: a chunk's sums and inverse against NumPy, the kernels interpreted against the
recurrence in float64, compiled where libtpu is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform
from pallas_kernels.op import select
from pallas_kernels.ops import OPS
from pallas_kernels.ops.gated_delta_rule import cases
from pallas_kernels.ops.gated_delta_rule.tpu import api
from pallas_kernels.ops.gated_delta_rule.tpu.chunk import CHUNK, columns, product, solve, token_sums, unit_inverses
from tests.ops.support import QUICK, check_against_oracle

SERVED = [case for case in (*cases.TEST_CASES, *cases.WIDTH_CASES) if case.gate != "channel"]


def check(case, dtype, **options):
    kernel = functools.partial(api.gated_delta_rule_tpu, interpret=True, **options)
    settings = {**cases.make_settings(case), "scale": case.key**-0.5}
    # The reference has no function: what is compared is the kernel with the op of that name in float64.
    inputs = cases.make_inputs(case, dtype)
    call = lambda q, k, v, beta, g=None, **more: kernel(q, k, v, beta, g, **more)
    check_against_oracle("gated_delta_rule", inputs, dtype=dtype, function=call, **settings)


def test_supports_names_argument_and_limit():
    def why(scale=1.0, dtype="bfloat16", beta=jnp.float32, **changes):
        case = cases.Case("refused", 1, 16, 2, **{"width": 64, "groups": 1, "key": 64, "gate": "head", **changes})
        inputs = cases.make_inputs(case, dtype)
        inputs["beta"] = inputs["beta"].astype(beta)
        return api.supports(*(inputs[name] for name in ("q", "k", "v", "beta", "g")), scale=scale)

    assert why() is None and why(gate=None) is None and why(dtype="float32") is None and why(key=256) is None
    assert why(dtype="float16") == "dtype of v_BTHP (float16) is neither bfloat16 nor float32"
    assert why(beta=np.float64) == "dtype of beta_BTH (float64) is not float32"
    assert why(gate="channel") == "g has shape [1, 16, 2, 64], the kernels decay by head, not by key channel"
    assert why(key=264) == "key width of k_BTGN (264) above 256"
    assert why(width=257) == "head width of v_BTHP (257) above 256"


def test_slower_names_argument_and_limit():
    array = lambda tokens, dtype: jax.ShapeDtypeStruct((1, tokens, 2, 64), dtype)
    assert api.slower(None, None, array(128, jnp.bfloat16), scale=1.0) is None
    assert "T (127) below 128" in api.slower(None, None, array(127, jnp.bfloat16), scale=1.0)
    assert "float32" in api.slower(None, None, array(128, jnp.float32), scale=1.0)


@pytest.mark.parametrize(("heads", "groups", "legal"), [(6, 2, [1, 3, 6]), (8, 8, [1, 2, 4, 8]), (4, 1, [1, 2, 4])])
def test_blocks_hold_whole_groups_or_parts_of_one(heads, groups, legal):
    for wanted in range(1, heads + 1):
        if wanted in legal:
            assert api.heads_a_block(1, heads, groups, wanted) == wanted
        else:
            with pytest.raises(ValueError, match=rf"heads_per_block \({wanted}\) not one of"):
                api.heads_a_block(1, heads, groups, wanted)
    assert api.heads_a_block(1, heads, groups, None) == max(n for n in legal if n <= api.BLOCK_HEADS)
    with assume_platform("tpu", generation="v5p"):  # two cores, and one row
        assert heads // api.heads_a_block(1, heads, groups, None) >= 2


@pytest.mark.parametrize("behind", [False, True])
def test_sums_of_decays_lose_nothing_behind_large_ones(behind):
    """Of steps from 1e-6 to 100: each sum, and each gradient, is that of its own terms to float32 accuracy."""
    rng = np.random.default_rng(0)
    steps = -np.exp(rng.uniform(np.log(1e-6), np.log(100), (CHUNK, 8))).astype(np.float32)
    given = np.exp(rng.uniform(np.log(1e-6), np.log(100), (CHUNK, 8))).astype(np.float32)
    sums, pull = jax.vjp(lambda array: token_sums(array, behind), jnp.asarray(steps))
    ones = np.triu(np.ones((CHUNK, CHUNK)), 1) if behind else np.tril(np.ones((CHUNK, CHUNK)))
    np.testing.assert_allclose(sums, ones @ steps.astype(np.float64), rtol=2e-6)
    np.testing.assert_allclose(pull(jnp.asarray(given))[0], ones.T @ given.astype(np.float64), rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_a_triangle_of_keys_alike_is_inverted_to_rounding(beta, dtype):
    """Of keys that are all but alike: powers of the triangle have entries of millions, the inverse of 2 at most."""
    rng = np.random.default_rng(0)
    keys = 1 + 0.05 * rng.standard_normal((CHUNK, CHUNK))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    below = np.tril(beta * keys @ keys.T, -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(CHUNK) + below.astype(np.float64))
    assert np.abs(expected).max() < 2.5
    (actual,) = jax.jit(lambda a: unit_inverses([a], jnp.dtype(dtype)), compiler_options=QUICK)(below)
    substituted = np.eye(CHUNK, dtype=np.float32)
    for i in range(1, CHUNK):
        substituted[i] -= below[i, :i] @ substituted[:i]
    exact = {"atol": 4 * np.abs(substituted - expected).max()}  # as forward substitution in float32
    limits = exact if dtype == "float32" else {"atol": 2e-3, "rtol": 2**-8}
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, **limits)


def test_gradients_of_products_columns_and_solutions():
    """What has a gradient of its own, against JAX's gradient of the same thing said plainly, in float32."""
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.standard_normal((CHUNK, CHUNK)), jnp.float32) / CHUNK for _ in range(2))
    f32, strict = jnp.dtype("float32"), jnp.tril(a, -1)
    highest = functools.partial(jnp.matmul, precision="highest")
    eye = jnp.eye(CHUNK, dtype=jnp.float32)

    def solved(below, right):
        inverse = jax.lax.stop_gradient(jnp.linalg.inv(eye + below))
        return solve(inverse, below, right, f32)

    pairs = [
        (lambda a, b: product(a, b, ((1,), (0,)), f32), highest),
        (lambda a, b: product(a, b, ((1,), (1,)), f32), lambda a, b: highest(a, b.T)),
        (lambda a, b: product(a, b, ((0,), (0,)), f32), lambda a, b: highest(a.T, b)),
        (lambda a, b: columns(a)[3] * columns(a)[70] + b, lambda a, b: a[:, 3:4] * a[:, 70:71] + b),
        (solved, lambda below, right: highest(jnp.linalg.inv(eye + below), right)),
    ]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(a, b):
        weigh = lambda function: jax.grad(
            lambda a, b: jnp.vdot(function(a, b), jnp.cos(jnp.arange(CHUNK))[:, None] + b.T), (0, 1)
        )
        return [(weigh(own)(a, b), weigh(plain)(a, b)) for own, plain in pairs]

    for actual, expected in both(strict, b):
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(("case", "dtype"), [
    (cases.Case("documents", 2, 300, 2, 16, 1, 8, gate="head", decay="mixed", layout="packed"), "bfloat16"),
    (cases.Case("plain", 1, 140, 2, 130, 2, 8, gate=None, initial=False, final=False), "float32"),
    *[pytest.param(case, dtype, marks=pytest.mark.slow) for case in SERVED for dtype in ("float32", "bfloat16")],
], ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_kernels_interpreted_against_the_recurrence(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("heads", [1, 2])
def test_groups_that_several_blocks_share(heads):
    """Gradients of q and k are summed over the blocks of a group's heads."""
    check(
        cases.Case("shared", 1, 20, 4, 8, 1, 8, gate="head", initial=False, final=False),
        "float32",
        heads_per_block=heads,
    )


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compile_for(generation: str, case, dtype, **options):
    """Compiles forward and backward with the TPU compiler; needs libtpu, no TPU."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    inputs = {name: array for name, array in cases.make_inputs(case, dtype).items() if array is not None}
    ids = inputs.pop("segment_ids", None)
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for name, a in inputs.items()}

    def loss(arrays):
        args = [arrays.get(name) for name in ("q", "k", "v", "beta", "g")]
        named = {"initial_state": arrays.get("initial_state"), "segment_ids": ids, "return_final_state": True}
        y, last = api.gated_delta_rule_tpu(*args, normalize=True, scale=0.1, **named, **options)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(last**2)

    with jax.set_mesh(mesh):  # tells Pallas the device it compiles for
        return jax.jit(jax.grad(loss)).lower(shapes).compile()


@pytest.mark.libtpu
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize(("case", "dtype"), [
    (cases.Case("uneven", 2, 300, 2, 64, 1, 128, gate="head", layout="packed"), "bfloat16"),
    (cases.Case("ungated", 1, 1, 1, 32, 1, 16, gate=None, initial=False), "float32"),
    pytest.param(cases.Case("wide", 1, 200, 8, 256, 4, 256, gate="head"), "bfloat16", marks=pytest.mark.slow),
    pytest.param(cases.Case("four", 1, 256, 4, 128, 4, 128, gate="head"), "bfloat16", marks=pytest.mark.slow),
    pytest.param(cases.Case("exact", 1, 256, 8, 256, 1, 256, gate="head"), "float32", marks=pytest.mark.slow),
], ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_compiles(generation, case, dtype):
    compiled = compile_for(generation, case, dtype)
    assert compiled.as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
def test_auto_stays_with_xla(generation):
    """Faster by the compiler's estimates, but not near enough where keys repeat and nothing decays."""
    op, array = OPS["gated_delta_rule"], jax.ShapeDtypeStruct
    q, v = (array((1, 2048, 4, width), "bfloat16") for width in (32, 64))
    beta = array((1, 2048, 4), "float32")
    with assume_platform("tpu", generation=generation):
        chosen = select(op, "auto", (q, q, v, beta, beta), {"scale": 1.0, "normalize": True})
    assert chosen is op.implementations["xla"]
