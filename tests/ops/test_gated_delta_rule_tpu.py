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
from pallas_kernels.ops.gated_delta_rule.tpu.products import (
    CHUNK,
    changing_rows,
    columns,
    in_their_rows,
    mates,
    product,
    solve,
    token_sums,
    unit_inverses,
)
from tests.ops import contract
from tests.ops.support import QUICK, check_against_oracle

SERVED = (*cases.TEST_CASES, *cases.WIDTH_CASES)
EXACT, TERMS = (0, 0, 0), (2, 2, 2)


def check(case, dtype, inputs=None, **options):
    kernel = functools.partial(api.gated_delta_rule_tpu, interpret=True, **options)
    settings = {**cases.make_settings(case), "scale": case.key**-0.5}
    # The reference has no function: what is compared is the kernel with the op of that name in float64.
    inputs = cases.make_inputs(case, dtype) if inputs is None else inputs
    call = lambda q, k, v, beta, g=None, **more: kernel(q, k, v, beta, g, **more)
    check_against_oracle("gated_delta_rule", inputs, dtype=dtype, function=call, **settings)


def test_supports_names_argument_and_limit():
    def why(scale=1.0, dtype="bfloat16", beta=jnp.float32, **changes):
        case = cases.Case("refused", 1, 16, 2, **{"width": 64, "groups": 1, "key": 64, "gate": "head", **changes})
        inputs = cases.make_inputs(case, dtype)
        inputs["beta"] = inputs["beta"].astype(beta)
        return api.supports(*(inputs[name] for name in ("q", "k", "v", "beta", "g")), scale=scale)

    assert why() is None and why(gate=None) is None and why(gate="channel") is None
    assert why(dtype="float32") is None and why(key=256) is None
    assert why(dtype="float16") == "dtype of v_BTHP (float16) is neither bfloat16 nor float32"
    assert why(beta=np.float64) == "dtype of beta_BTH (float64) is not float32"
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
    (actual,) = jax.jit(lambda a: unit_inverses([a], dtype == "float32"), compiler_options=QUICK)(below)
    substituted = np.eye(CHUNK, dtype=np.float32)
    for i in range(1, CHUNK):
        substituted[i] -= below[i, :i] @ substituted[:i]
    exact = {"atol": 4 * np.abs(substituted - expected).max()}  # as forward substitution in float32
    limits = exact if dtype == "float32" else {"atol": 2e-3, "rtol": 2**-8}
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, **limits)


@pytest.mark.parametrize("terms", [EXACT, TERMS])
def test_gradients_of_products_columns_and_solutions(terms):
    """What has a gradient of its own, against JAX's gradient of the same thing said plainly, in float32; products of
    two bfloat16 terms to 16 bits."""
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.standard_normal((CHUNK, CHUNK)), jnp.float32) / CHUNK for _ in range(2))
    strict = jnp.tril(a, -1)
    highest = functools.partial(jnp.matmul, precision="highest")
    eye = jnp.eye(CHUNK, dtype=jnp.float32)

    def solved(below, right):
        inverse = jax.lax.stop_gradient(jnp.linalg.inv(eye + below))
        return solve(inverse, below, right, terms)

    pairs = [
        (lambda a, b: product(a, b, ((1,), (0,)), terms), highest),
        (lambda a, b: product(a, b, ((1,), (1,)), terms), lambda a, b: highest(a, b.T)),
        (lambda a, b: product(a, b, ((0,), (0,)), terms), lambda a, b: highest(a.T, b)),
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
            np.testing.assert_allclose(one, other, atol=5e-5 * float(jnp.abs(other).max()))


def test_moves_of_tokens():
    """What moves rows, against indices; their transposes are those of permutations and selections."""
    rows = np.arange(3 * CHUNK, dtype=np.float32).reshape(CHUNK, 3)
    token = np.arange(CHUNK)
    for width in (1, 2, 4, 8, 32, 64):
        right = token[token & width != 0] if width >= 8 else token
        moved, pull = jax.vjp(jax.jit(lambda array, width=width: mates(array, width)), rows)
        np.testing.assert_array_equal(moved, rows[token ^ width])
        np.testing.assert_array_equal(pull(moved)[0], rows)
        kept, pull = jax.vjp(lambda array, width=width: changing_rows(array, width), rows)
        np.testing.assert_array_equal(kept, rows[right])
        expected = np.where(np.isin(token, right)[:, None], rows, 0)
        np.testing.assert_array_equal(pull(kept)[0], expected)
        placed, pull = jax.vjp(lambda array, width=width: in_their_rows(array, width), kept)
        np.testing.assert_array_equal(placed, expected)
        np.testing.assert_array_equal(pull(placed)[0], kept)


@pytest.mark.parametrize(("case", "dtype"), [
    (cases.Case("documents", 2, 140, 1, 16, 1, 8, decay="mixed", layout="packed"), "bfloat16"),
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


REPEATED = [(gate, beta, noise) for gate in cases.GATES for beta in (1.0, 2.0) for noise in (0.0, 0.05)]
REPEATED.remove(("head", 1.0, 0.0))  # nothing that decays is kept: that gradient is zero but for rounding


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "beta", "noise"), REPEATED)
def test_keys_that_repeat(gate, beta, noise):
    """All keys the same, or all but: what is left of a value is the difference of large terms, and with a beta of 2 a
    key whose length is off by a little makes the state grow."""
    case = cases.Case("alike", 1, 200, 1, 32, 1, 64, gate=gate, decay="weak", initial=False)
    rng, inputs = np.random.default_rng(4), cases.make_inputs(case, "bfloat16")
    keys = rng.standard_normal((1, 1, 1, 64)) + noise * rng.standard_normal((1, 200, 1, 64))
    inputs |= {"k": keys.astype(jnp.bfloat16), "beta": np.full((1, 200, 1), beta, np.float32)}
    check(case, "bfloat16", inputs)


@pytest.mark.slow
def test_the_strongest_decays_forget_and_give_no_nan():
    """-inf and -1e30 among weak decays: nothing overflows, and what lies behind is as if it began there."""
    case = cases.Case("strongest", 1, 150, 1, 32, 1, 32, decay="weak")
    inputs = cases.make_inputs(case, "float32")
    given = {name: inputs[name] for name in ("q", "k", "v", "beta", "g", "initial_state")}
    given["g"][:, [3, 70, 129]] = [[[-1e30]], [[-200.0]], [[-np.inf]]]

    @jax.jit
    def both(arrays):
        run = lambda arrays: api.gated_delta_rule_tpu(
            *(arrays[name] for name in ("q", "k", "v", "beta", "g")), normalize=True, scale=1.0,
            initial_state=arrays["initial_state"], return_final_state=True, interpret=True,
        )  # fmt: skip
        out, pull = jax.vjp(run, arrays)
        return out, pull(jax.tree.map(jnp.ones_like, out))[0]

    (y, last), grads = both(given)
    assert all(np.isfinite(array).all() for array in (y, last, *grads.values()))
    assert not grads["v"][:, 3:129].any() or np.abs(grads["v"][:, 129:]).min() > 0
    cut = {name: array if name == "initial_state" else array[:, 129:] for name, array in given.items()}
    alone = OPS["gated_delta_rule"].implementations["xla"].load()(
        *(jnp.asarray(cut[name]) for name in ("q", "k", "v", "beta", "g")), normalize=True, scale=1.0,
        initial_state=jnp.zeros_like(cut["initial_state"]), return_final_state=True,
    )  # fmt: skip
    np.testing.assert_allclose(y[:, 129:], alone[0], atol=1e-5)
    np.testing.assert_allclose(last, alone[1], atol=1e-5)


class ByChannel(contract.Subject):
    """The kernels where each key channel decays by itself."""

    case = cases.Case("tpu_channel", 2, 150, 4, 16, 2, 8, chunk=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", [*contract.ESSENTIAL, contract.check_padding_cut_out, contract.check_one_token, contract.check_dtypes],
    ids=lambda check: check.__name__,
)  # fmt: skip
def test_contract_by_channel(check):
    check(ByChannel("gated_delta_rule", "tpu"))


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
    pytest.param(cases.Case("channel", 2, 300, 2, 64, 1, 128, layout="packed"), "bfloat16", marks=pytest.mark.slow),
    pytest.param(cases.Case("channel_exact", 1, 200, 2, 64, 2, 64), "float32", marks=pytest.mark.slow),
    pytest.param(cases.Case("channel_wide", 1, 200, 4, 256, 2, 256), "bfloat16", marks=pytest.mark.slow),
    pytest.param(cases.Case("wide", 1, 200, 8, 256, 4, 256, gate="head"), "bfloat16", marks=pytest.mark.slow),
    pytest.param(cases.Case("four", 1, 256, 4, 128, 4, 128, gate="head"), "bfloat16", marks=pytest.mark.slow),
    pytest.param(cases.Case("exact", 1, 256, 8, 256, 1, 256, gate="head"), "float32", marks=pytest.mark.slow),
], ids=lambda value: getattr(value, "name", value))  # fmt: skip
def test_compiles(generation, case, dtype):
    compiled = compile_for(generation, case, dtype)
    assert compiled.as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize("generation", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("gate", [(), (32,)])
def test_auto_takes_them(generation, gate):
    """By head and by key channel: faster than xla by the compiler's estimates; other generations stay with xla."""
    op, array = OPS["gated_delta_rule"], jax.ShapeDtypeStruct
    q, v = (array((1, 2048, 4, width), "bfloat16") for width in (32, 64))
    beta, g = (array((1, 2048, 4, *more), "float32") for more in ((), gate))
    for name, expected in ((generation, "tpu"), ("v4", "xla")):
        with assume_platform("tpu", generation=name):
            chosen = select(op, "auto", (q, q, v, beta, g), {"scale": 1.0, "normalize": True})
        assert chosen is op.implementations[expected]
