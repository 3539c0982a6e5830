# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels of ssd, interpreted, against the token-by-token recurrence in float64; compiled where libtpu is."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import assume_platform
from pallas_kernels.layouts import LAYOUTS
from pallas_kernels.ops.ssd import cases
from pallas_kernels.ops.ssd.tpu import copies as tpu_copies
from pallas_kernels.ops.ssd.tpu.api import legal_heads, ssd_tpu, supports
from pallas_kernels.oracle import bound, relative_rms
from tests.ops.support import QUICK, oracle, run_by_one_program

BASE = cases.Case("base", 1, 200, 2, 32, 1, 16, "packed", "mixed", "H", True, True, seed=3)


def case_of(**changes) -> cases.Case:
    return dataclasses.replace(BASE, **changes)


def run_kernel(inputs: dict, *, final: bool = True, **blocks) -> dict[str, np.ndarray]:
    """Outputs and gradients of the interpreted kernels by name."""
    return run_by_one_program("ssd", inputs, function=kernel_of(**blocks), return_final_state=final)


@functools.cache
def kernel_of(**blocks):
    return functools.partial(ssd_tpu, **{"interpret": True, **blocks})


def check(inputs: dict, *, final: bool = True, **blocks) -> dict[str, np.ndarray]:
    """Every output and gradient of the kernels within the tolerance table; returns them.

    As strict as the table gets: without the allowance for gradients that are small next to the others.
    """
    actual = run_kernel(inputs, final=final, **blocks)
    expected = oracle("ssd", inputs, return_final_state=final)
    assert actual.keys() == expected.keys()
    for name in actual:
        check_close(actual[name], expected[name], dtype=inputs["x"].dtype, what=f"ssd.{name}")
    return actual


def check_close(actual, expected, *, dtype, what: str):
    limit = bound(dtype, what)
    smallest = 1e-7 if dtype == jnp.float32 else 1e-5  # RMS that counts as nothing: where everything has decayed
    error = relative_rms(actual, expected, floor=smallest / limit)
    assert error <= limit, f"{what}: relative RMS {error:.2e} above {limit:.0e}"


CASES = (
    case_of(name="dense", layout="dense", decay="typical", initial=False, final=False, skip=None, tokens=256),
    case_of(name="one_token", tokens=1, batch=2, layout="dense"),
    case_of(name="groups", heads=4, groups=2, skip="HP", tokens=130, layout="one"),
    case_of(name="groups_all", heads=4, groups=4, tokens=40),
    case_of(name="scattered", batch=2, layout="scattered", skip="HP"),
    case_of(name="empty", batch=2, layout="empty", tokens=260),
    case_of(name="singles", layout="singles", decay="typical"),
    case_of(name="zero", layout="right", decay="zero"),
    case_of(name="weak", layout="edges", decay="weak"),
    case_of(name="strong", layout="left", decay="strong"),
    case_of(name="apart", heads=4, groups=2, batch=2, layout="scattered", apart=True),
)


def some(*names: str) -> list:
    """Of CASES those of some names, and the others for the slow tests."""
    return [pytest.param(c, id=c.name, marks=() if c.name in names else pytest.mark.slow) for c in CASES]


@pytest.mark.parametrize("case", some("one_token", "groups"))
def test_equals_the_recurrence(case):
    """Empty rows are the contract's, too."""
    check(cases.make_inputs(case), final=case.final)


@pytest.mark.parametrize("case", some("apart"))
def test_bfloat16(case):
    """A chunk a step, as everything of a step is written out: float32 and the contract have two."""
    check(cases.make_inputs(case, "bfloat16"), final=case.final, chunks_per_step=1)


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=() if case.name == "p64_n256" else pytest.mark.slow)
    for case in cases.WIDTH_CASES
])  # fmt: skip
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_widths(case, dtype):
    check(cases.make_inputs(case, dtype), final=case.final, chunks_per_step=1)


def test_blocks_are_invisible():
    """Heads a block, chunks a step: part of a group, one group, two groups; an odd and an even number of chunks."""
    inputs = cases.make_inputs(case_of(name="blocks", heads=8, groups=2, state=64, tokens=300, width=64))
    expected = check(inputs)
    for heads, chunks in ((4, 1), (2, 3)):
        if heads not in legal_heads(8, 2, 64, 64):
            continue
        actual = run_kernel(inputs, heads_per_block=heads, chunks_per_step=chunks)
        for name in expected:
            check_close(actual[name], expected[name], dtype="float32", what=f"ssd.{name}")


def test_slots_are_invisible(monkeypatch):
    """Two or four blocks of each array in flight, over more steps than either, in several rows and head blocks."""
    inputs = cases.make_inputs(case_of(name="slots", batch=2, heads=4, tokens=640, width=64, decay="typical"))
    args = [inputs[name] for name in ("x", "dt", "A", "B", "C")]
    more = {name: inputs[name] for name in ("D", "segment_ids", "initial_state")}
    kernel = functools.partial(ssd_tpu, heads_per_block=2, chunks_per_step=1, interpret=True)
    results = []
    for limit in (0, tpu_copies.SLOT_BYTES):
        monkeypatch.setattr(tpu_copies, "SLOT_BYTES", limit)
        results.append(jax.jit(lambda *args: kernel(*args, **more), compiler_options=QUICK)(*args))
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
def test_a_group_over_several_blocks():
    inputs = cases.make_inputs(case_of(name="parts", heads=8, groups=1, tokens=140))
    check(inputs, heads_per_block=4, chunks_per_step=1)


def test_small_steps_survive_large_sums_in_one_chunk():
    """Steps of -80 add up to -4000 before steps of -1e-6 that must still be seen, in gradients too."""
    inputs = cases.make_inputs(case_of(name="tail", layout="dense", tokens=128, skip=None))
    token = np.arange(128)
    decay = np.where(token % 2 == 0, 80.0, 1e-6) * (token < 100) + 1e-2 * (token >= 100)
    inputs["dt"] = np.broadcast_to(decay[None, :, None] / -inputs["A"], (1, 128, 2)).astype(np.float32)
    check(inputs)


def test_gradient_of_A_where_almost_nothing_passes():
    """Only steps of -1e-6 and -80: the gradient of A is a millionth of the sums that a careless formula subtracts."""
    rng = np.random.default_rng(0)
    inputs = cases.make_inputs(case_of(name="stop", layout="dense", tokens=128, initial=False))
    inputs["A"] = np.full(2, -4.0, np.float32)
    inputs["dt"] = (np.where(rng.random((1, 128, 2)) < 0.5, 80.0, 1e-6) / 4.0).astype(np.float32)
    check(inputs)


@pytest.mark.parametrize(
    "log_decay", [*(pytest.param(x, marks=pytest.mark.slow) for x in (-3.0, -9.0, -15.0, -40.0)), -17.0]
)
def test_bfloat16_pairs_at_the_limit_of_the_factored_decay(log_decay):
    """Every token decays alike, around the limit up to which pairs within a group are factored."""
    inputs = cases.make_inputs(case_of(name="limit", layout="dense", tokens=128, skip=None), "bfloat16")
    inputs["dt"] = np.broadcast_to(log_decay / inputs["A"], (1, 128, 2)).astype(np.float32)
    check(inputs)


@pytest.mark.slow
def test_bfloat16_a_token_that_forgets_all_hides_what_was_before():
    """Behind a decay of -40 stands only what came after, however small beside what came before."""
    inputs = cases.make_inputs(case_of(name="forget", layout="dense", tokens=256, initial=False, skip=None), "bfloat16")
    step = np.full(256, 1e-6, np.float32)
    step[[60, 200]] = 40.0
    inputs["A"] = np.full(2, -1.0, np.float32)
    inputs["dt"] = np.broadcast_to(step[None, :, None], (1, 256, 2)).astype(np.float32)
    inputs["x"][:, [60, 200]] = 0
    inputs["x"][:, :60] *= 1e6
    actual = run_kernel(inputs)["out0"]
    expected = oracle("ssd", inputs, return_final_state=True)["out0"]
    check_close(actual[:, 61:], expected[:, 61:], dtype=jnp.bfloat16, what="ssd.out0")


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_padding_may_hold_anything(dtype):
    """Not even NaN at padded tokens reaches an output or a gradient."""
    case = case_of(name="padding", layout="interior", tokens=150, seed=5, skip="HP", groups=2)
    inputs = cases.make_inputs(case, dtype)
    padded = inputs["segment_ids"] == 0
    assert padded.any()
    expected = run_kernel(inputs, chunks_per_step=1)
    changed = dict(inputs)
    for name in ("x", "dt", "B", "C"):
        changed[name] = inputs[name].copy()
        changed[name][padded] = np.nan
    actual = run_kernel(changed, chunks_per_step=1)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])
    for name in ("out0", "dx", "ddt", "dB", "dC"):
        assert not np.any(actual[name][padded]), name


@pytest.mark.slow
def test_states_kept_in_float32_or_bfloat16_or_recomputed():
    inputs = cases.make_inputs(case_of(name="states", tokens=260, layout="dense", decay="typical"), "bfloat16")
    kept = {states: check(inputs, states=states) for states in ("float32", "bfloat16", "recompute")}
    for name in kept["bfloat16"]:
        np.testing.assert_array_equal(kept["recompute"][name], kept["bfloat16"][name])


@pytest.mark.slow
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 400),
    groups=st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
    sizes=st.sampled_from([(32, 16), (64, 32), (32, 128)]),
    layout=st.sampled_from(LAYOUTS),
    decay=st.sampled_from(cases.DECAYS),
    skip=st.sampled_from([None, "H", "HP"]),
    final=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_the_recurrence_on_drawn_shapes(tokens, groups, sizes, layout, decay, skip, final, seed):
    shape = (2, tokens, groups[0], sizes[0], groups[1], sizes[1])
    case = cases.Case("drawn", *shape, layout, decay, skip, final, final, seed)
    check(cases.make_inputs(case), final=final)


@pytest.mark.slow
def test_very_long():
    check(cases.make_inputs(case_of(name="very_long", tokens=70_000, heads=1, decay="typical")))


@pytest.mark.slow
def test_the_tpu_interpreter_agrees():
    """Pallas' TPU interpreter, which simulates the copies between memories and starts memory as NaN."""
    from jax.experimental.pallas import tpu as pltpu

    inputs = cases.make_inputs(case_of(name="interpreter", tokens=300))
    actual = run_kernel(inputs, interpret=pltpu.InterpretParams(uninitialized_memory="nan"))
    expected = run_kernel(inputs)
    for name in expected:
        check_close(actual[name], expected[name], dtype="float32", what=f"ssd.{name}")


def shapes(batch=1, tokens=256, heads=4, width=64, groups=1, state=128, dtype=jnp.bfloat16):
    array = jax.ShapeDtypeStruct
    group = array((batch, tokens, groups, state), dtype)
    step = array((batch, tokens, heads), jnp.float32)
    return array((batch, tokens, heads, width), dtype), step, array((heads,), jnp.float32), group, group


@pytest.mark.parametrize("changes, reason", [
    ({"width": 48}, r"head width of x \(48\)"),
    ({"state": 8}, r"state size of B \(8\)"),
    ({"dtype": jnp.float16}, r"x has dtype float16"),
    ({"heads": 509}, r"heads x width of one block"),
])  # fmt: skip
def test_what_it_cannot_serve_it_names(changes, reason):
    args = shapes(**{"heads": 4, **changes}) if "heads" not in changes else shapes(width=32, **changes)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(ssd_tpu, *args)
    assert supports(*shapes()) is None


def test_heads_of_a_block_fill_lanes():
    assert legal_heads(32, 1, 64, 128) == [2, 4, 8, 16, 32]
    assert legal_heads(80, 8, 64, 128) == [2, 10, 20, 40, 80]
    assert legal_heads(4, 4, 64, 16) == [4]


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compile_for(generation: str, args, ids):
    """Compiles forward and backward with the TPU compiler; needs libtpu, no TPU."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = [jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=sharding) for arg in args]

    def loss(*arrays):
        named = {"D": arrays[5], "segment_ids": ids, "initial_state": arrays[6], "return_final_state": True}
        y, last = ssd_tpu(*arrays[:5], **named)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(last**2)

    with jax.set_mesh(mesh):  # tells Pallas the device it compiles for
        return jax.jit(jax.grad(loss, range(7))).lower(*args).compile()


def compile_args(**sizes):
    x, *rest = shapes(**sizes)
    n_batch, _, n_heads, width = x.shape
    state = jax.ShapeDtypeStruct((n_batch, n_heads, width, rest[-1].shape[-1]), jnp.float32)
    return x, *rest, jax.ShapeDtypeStruct((n_heads,), jnp.float32), state


@pytest.mark.libtpu
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("sizes", [
    {"tokens": 300},
    {"tokens": 1, "heads": 1, "width": 32, "state": 16},
    {"tokens": 100, "heads": 3, "width": 32, "state": 16, "groups": 3, "dtype": jnp.float32},
], ids=["uneven", "one_token", "less_than_a_chunk"])  # fmt: skip
def test_compiles(generation, sizes):
    compile_for(generation, compile_args(**sizes), ids=np.ones((1, sizes["tokens"]), np.int32))


@pytest.mark.libtpu
@pytest.mark.parametrize("checked", [False, True])
def test_rows_and_heads_split_over_devices(checked):
    """On a 2 x 2 slice each chip runs the kernels on its rows and heads; nothing but gradients of A and D is summed."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v5e"]).devices
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"))
    rows, heads = P("data", None, "tensor"), P("tensor")
    specs = (rows, rows, heads, rows, rows, heads, P("data", "tensor"))
    args = [
        jax.ShapeDtypeStruct(arg.shape, arg.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
        for arg, spec in zip(compile_args(batch=2, heads=8, groups=2, tokens=256), specs, strict=True)
    ]

    def local(x, dt, A, B, C, D, state):
        return pallas_kernels.ssd(x, dt, A, B, C, D=D, initial_state=state)

    def loss(*arrays):
        split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=checked)
        return jnp.sum(split(*arrays).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh), assume_platform("tpu"):
        text = jax.jit(jax.grad(loss, range(7))).lower(*args).compile().as_text()
    assert text.count("tpu_custom_call") >= 2  # by auto, forward and backward
    assert not re.search(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    sizes = [
        np.prod([int(d) for d in dims.split(",") if d]) for dims in re.findall(r"\[([\d,]*)\][^=]* all-reduce", text)
    ]
    assert all(size <= 8 for size in sizes)


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("sizes", [
    {"heads": 32},
    {"dtype": jnp.float32},
    {"heads": 32, "groups": 8, "width": 64, "state": 64},
    {"heads": 24, "width": 64, "state": 256},
    {"heads": 16, "width": 128},
    {"heads": 4, "width": 32, "state": 16, "groups": 4},
    {"heads": 64, "width": 32, "state": 32, "groups": 1, "batch": 2},
], ids=str)  # fmt: skip
def test_compiles_at_every_width(generation, sizes):
    n_tokens = 256
    args = compile_args(tokens=n_tokens, **sizes)
    compile_for(generation, args, ids=np.ones((sizes.get("batch", 1), n_tokens), np.int32))
