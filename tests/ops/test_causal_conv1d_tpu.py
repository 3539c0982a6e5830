# SPDX-License-Identifier: Apache-2.0
"""The TPU kernel of causal_conv1d, interpreted, against direct taps in float64; compiled where libtpu is."""

import dataclasses
import functools

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
from pallas_kernels.ops.causal_conv1d import cases
from pallas_kernels.ops.causal_conv1d.context import causal_conv1d_context
from pallas_kernels.ops.causal_conv1d.tpu import api
from pallas_kernels.ops.causal_conv1d.tpu.api import causal_conv1d_tpu, supports
from pallas_kernels.ops.causal_conv1d.xla import causal_conv1d_xla
from pallas_kernels.oracle import bound, relative_rms
from tests.ops.support import QUICK, oracle, run_by_one_program

KERNEL = functools.partial(causal_conv1d_tpu, interpret=True)


def run_kernel(inputs: dict, **options) -> dict[str, np.ndarray]:
    """Outputs and gradients of the interpreted kernel by name."""
    return run_by_one_program("causal_conv1d", inputs, change=api.BLOCK_TOKENS, function=KERNEL, **options)


def check(case, dtype="float32", **options) -> None:
    """Every output and gradient of the kernel within the tolerance table."""
    inputs, options = cases.make_inputs(case, dtype), {**cases.make_settings(case), **options}
    actual = run_kernel(inputs, **options)
    expected = oracle("causal_conv1d", inputs, **options)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        limit = bound(dtype, f"causal_conv1d.{name}")
        assert relative_rms(value, expected[name]) <= limit, name


QUICK_CASES = ("one_token", "eight_taps", "packed", "left", "scattered", "two_taps")


@pytest.mark.parametrize("case", [
    pytest.param(case, id=case.name, marks=() if case.name in QUICK_CASES else pytest.mark.slow)
    for case in cases.TEST_CASES if case.taps > 1
])  # fmt: skip
def test_equals_direct_taps(case):
    check(case)


BLOCKS = cases.Case("blocks", 2, 600, 200, 4, "packed", initial=True, final=True)


@pytest.mark.parametrize("changes", [
    {"block": 64, "tokens": 150},  # whose strips are written out: two, not eight
    pytest.param({}, marks=pytest.mark.slow),
    {"dtype": "bfloat16", "tokens": 512, "layout": "dense", "width": 128},
    pytest.param({"taps": 8, "layout": "scattered", "batch": 1}, marks=pytest.mark.slow),
    pytest.param({"layout": "right", "taps": 2, "activation": None, "bias": False, "initial": False, "final": False},
                 marks=pytest.mark.slow),
    pytest.param({"width": 4700, "tokens": 257, "layout": "dense", "batch": 1}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_several_blocks(changes, monkeypatch):
    changes = dict(changes)
    dtype = changes.pop("dtype", "float32")
    monkeypatch.setattr(api, "BLOCK_TOKENS", changes.pop("block", api.BLOCK_TOKENS))
    check(dataclasses.replace(BLOCKS, **changes), dtype)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    tokens=st.integers(1, 600),
    width=st.integers(1, 300),
    taps=st.integers(2, 8),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from([None, "silu"]),
    bias=st.booleans(),
    state=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_equals_direct_taps_on_drawn_shapes(tokens, width, taps, layout, activation, bias, state, seed):
    check(cases.Case("drawn", 2, tokens, width, taps, layout, activation, bias, state, state, seed))


def test_padding_may_hold_anything():
    """Not even NaN at padded tokens reaches an output or a gradient."""
    inputs = cases.make_inputs(dataclasses.replace(BLOCKS, layout="interior", tokens=60, width=6))
    padded = inputs["segment_ids"] == 0
    assert padded.any()
    options = {"activation": "silu", "return_final_state": True}
    clean = run_kernel(inputs, **options)
    dirty = run_kernel({**inputs, "x": np.where(padded[:, :, None], np.nan, inputs["x"])}, **options)
    for name, value in clean.items():
        np.testing.assert_array_equal(dirty[name], value, err_msg=name)
    for name in ("out0", "dx"):
        assert not clean[name][padded].any(), name


@pytest.mark.parametrize(("shapes", "reason"), [
    (((1, 8, 128), (128, 9)), r"taps of w \(9\) not within 2 to 8"),
    (((1, 8, 128), (128, 1)), r"taps of w \(1\) not within 2 to 8"),
])  # fmt: skip
def test_what_it_cannot_serve_it_names(shapes, reason):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(causal_conv1d_tpu, *args)
    assert "float16" in supports(jax.ShapeDtypeStruct((1, 8, 128), jnp.float16), args[1])


TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def compile_for(generation: str, batch, tokens, width, taps, dtype, *, documents, state):
    """Compiles forward and backward with the TPU compiler; needs libtpu, no TPU."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, P())
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    args = [array((batch, tokens, width), dtype), array((width, taps), jnp.float32), array((width,), jnp.float32)]
    args += [array((batch, taps - 1, width), dtype)] * state
    ids = jnp.ones((batch, tokens), jnp.int32) if documents else None

    @jax.shard_map(mesh=mesh, in_specs=(P("one"), P(), P(), P("one")), out_specs=P("one"))
    def convolve(x, w, b, initial):
        named = {"segment_ids": ids, "initial_state": initial, "activation": "silu", "implementation": "tpu"}
        return pallas_kernels.causal_conv1d(x, w, b, **named, gaps=False)

    def loss(x, w, b, initial=None):
        return jnp.sum(convolve(x, w, b, initial).astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh), assume_platform("tpu"):  # the mesh tells Pallas the device it compiles for
        return jax.jit(jax.grad(loss, range(len(args)))).lower(*args).compile()


@pytest.mark.libtpu
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_compiles(generation):
    compiled = compile_for(generation, 2, 600, 320, 4, jnp.bfloat16, documents=True, state=True)
    assert compiled.as_text().count("tpu_custom_call") == 1


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("generation", TOPOLOGIES)
@pytest.mark.parametrize("sizes", [
    (8, 2048, 4352, 4, jnp.bfloat16), (1, 512, 4608, 8, jnp.float32), (3, 1, 40, 2, jnp.bfloat16),
    (1, 70_000, 128, 3, jnp.bfloat16),
], ids=str)  # fmt: skip
def test_compiles_at_every_size(generation, sizes):
    compile_for(generation, *sizes, documents=False, state=False)


@pytest.mark.parametrize("checked", [False, True])
def test_tokens_split_over_devices(checked):
    """`causal_conv1d_context` with documents across shares: of the kernel; in a shard_map that checks, which the
    interpreter does not bear, of XLA."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("context",))
    tokens, whole = P(None, "context"), P()
    kernel = causal_conv1d_xla if checked else KERNEL

    def split(x, w, b, segment_ids, initial_state):
        options = {"segment_ids": segment_ids, "initial_state": initial_state, "activation": "silu"}
        options |= {"return_final_state": False, "gaps": True}
        return causal_conv1d_context(kernel, (x, w, b), context_axis="context", **options)

    specs = tuple(tokens if name in ("x", "segment_ids") else whole for name in NAMES)
    split = jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=checked)
    for actual, expected in zip(_evaluate(split), _evaluate(_whole), strict=True):
        assert relative_rms(actual, expected) <= bound("float32")


NAMES = ("x", "w", "b", "segment_ids", "initial_state")


def _whole(x, w, b, segment_ids, initial_state):
    options = {"segment_ids": segment_ids, "initial_state": initial_state, "activation": "silu"}
    return pallas_kernels.causal_conv1d(x, w, b, **options, implementation="xla")


@functools.cache
def _evaluate(convolve) -> list:
    """Outputs and gradients of a row in two documents."""
    inputs = cases.make_inputs(cases.Case("split", 2, 64, 8, 4, "packed", initial=True))

    def both(*arrays):
        out, pull = jax.vjp(lambda x, w, b, initial: convolve(x, w, b, arrays[3], initial), *arrays[:3], arrays[4])
        return out, pull(jnp.cos(out))

    return jax.tree.leaves(jax.jit(both, compiler_options=QUICK)(*(inputs[name] for name in NAMES)))
