# SPDX-License-Identifier: Apache-2.0
"""What traced and compiled programs exchange: counted by hand, and the one against the other."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_kernels
from hybridlm.plan import collectives, hlo
from hybridlm.plan.collectives import Totals, totals
from hybridlm.plan.live import peak
from hybridlm.plan.slices import slice_devices
from hybridlm.plan.work import work

TRIPS, N = 3, 4


@pytest.fixture(scope="module")
def program():
    """A loop that gathers rows over one axis and scatters sums over another, and one sum at the end."""
    mesh = jax.make_mesh((2, N), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def body(x, _):
        whole = lax.all_gather(x, "b", axis=0, tiled=True)  # f32[32, 16] of f32[8, 16]
        return lax.psum_scatter(jnp.sin(whole), "b", scatter_dimension=0, tiled=True), None

    def run(x):
        y = lax.scan(body, x, None, length=TRIPS)[0]
        first = lambda y: y.at[:1].set(lax.ppermute(y[:1], "b", [(0, 1)]))
        y = lax.cond(y[0, 0] > 0, lambda y: lax.psum(y, ("a", "b")), first, y)
        return y + lax.psum(y[:1], "a")

    with jax.set_mesh(mesh):
        sharded = jax.shard_map(run, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
        traced = jax.jit(sharded).trace(jax.ShapeDtypeStruct((64, 16), jnp.float32))
        yield traced, traced.lower().compile().as_text()


def test_traced(program):
    rows = 8 * 16 * 4
    assert totals(collectives.of_traced(program[0])) == {
        "all-gather b": Totals(1, TRIPS, TRIPS * N * rows),
        "reduce-scatter b": Totals(1, TRIPS, TRIPS * N * rows),
        "all-reduce a*b": Totals(1, 1, rows),
        "all-reduce a": Totals(1, 1, rows // 8),
    }


def test_compiled_agrees(program):
    """Loops count their trips; of a choice both branches are in the text."""
    traced = totals(collectives.of_traced(program[0]), by_axes=False)
    compiled = totals(hlo.collectives(hlo.parse(program[1])), by_axes=False)
    for kind in ("all-gather", "reduce-scatter"):
        assert (compiled[kind].runs, compiled[kind].bytes) == (traced[kind].runs, traced[kind].bytes)
    assert compiled["all-reduce"].bytes == traced["all-reduce"].bytes
    assert compiled["collective-permute"].runs == 1


@pytest.mark.parametrize("n_devices", [1, 4])
def test_a_kept_result_of_attention_is_not_made_again(n_devices):
    """Its kernel runs once forward and once backward, whoever applies the gate: it, or, where tokens are split over
    devices, what follows it."""
    B, T, H, K, width = 1, 512 * n_devices, 4, 2, 64
    mesh = jax.make_mesh((n_devices,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n_devices])
    tokens = P(None, "context")
    names = "attention_kept", "attention_out", "inputs"

    def attend(*arrays):
        axis = "context" if n_devices > 1 else None
        q, k, v, gate = arrays
        return pallas_kernels.attention(q, k, v, gate=gate, implementation="tpu", context_axis=axis)

    def layer(w, *arrays):
        arrays = [checkpoint_name(jnp.sin(array), "inputs") for array in arrays]
        y = jax.shard_map(attend, mesh=mesh, in_specs=tokens, out_specs=tokens, check_vma=False)(*arrays)
        return jnp.sum(jnp.square(checkpoint_name(y, "attention_out").reshape(B, T, -1) @ w))

    layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(*names))
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    heads = [like(B, T, n, width) for n in (H, K, K, H)]
    with jax.set_mesh(mesh), pallas_kernels.assume_platform("tpu", generation="v5p"):
        traced = jax.jit(jax.grad(layer, argnums=range(5))).trace(like(H * width, 8), *heads)
    assert collectives.kernels_of_traced(traced) == {"attention_backward": 1, "attention_forward": 1}


def test_kernels_by_name():
    from jax.experimental import pallas as pl

    def double(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...]

    def run(x):
        call = pl.pallas_call(double, out_shape=x, name="double", interpret=True)
        return lax.scan(lambda x, _: (call(x), None), call(x), None, length=TRIPS)[0]

    traced = jax.jit(run).trace(jax.ShapeDtypeStruct((8,), jnp.float32))
    assert collectives.kernels_of_traced(traced) == {"double": 1 + TRIPS} and collectives.of_traced(traced) == []


TPU = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[2240,4096]) -> bf16[512,4096] {
  %input = bf16[2240,4096]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[2240,4096]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[512,4096]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1)
}

%body (p: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %p = (s32[], bf16[16,128]{1,0}) parameter(0)
  %kernel.3 = bf16[64,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  %fusion.1 = bf16[512,4096]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %gather = bf16[64,128]{1,0} all-gather(%kernel.3), replica_groups=mesh['fsdp'=4,'tensor'=2] {'fsdp'}, dimensions={0}
  ROOT %scatter = bf16[16,128]{1,0} reduce-scatter(%gather), replica_groups=mesh['fsdp'=4,'tensor'=2] {'fsdp','tensor'}
}

%condition (p.1: (s32[], bf16[16,128])) -> pred[] {
  %p.1 = (s32[], bf16[16,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%p.1, %limit), direction=LT
}

ENTRY %main (x: bf16[16,128]) -> bf16[16,128] {
  %x = bf16[16,128]{1,0} parameter(0)
  ROOT %loop = (s32[], bf16[16,128]{1,0}) while(%x), condition=%condition, body=%body, metadata={op_name="step/while"}
}
"""


def test_text_of_a_tpu():
    """Fused scatters, mesh axes as groups, kernels, and a loop whose trips its condition alone says."""
    parsed = hlo.parse(TPU)
    found = {(c.kind, c.axes): (c.runs, c.bytes) for c in hlo.collectives(parsed)}
    assert found == {
        ("reduce-scatter", "groups of 4"): (5, 2240 * 4096 * 2),
        ("all-gather", "fsdp"): (5, 64 * 128 * 2),
        ("reduce-scatter", "fsdp*tensor"): (5, 8 * 16 * 128 * 2),
    }
    assert hlo.kernels(parsed) == {"kernel": 5} and parsed.unknown == []
    assert hlo.largest(parsed, 1)[0][:2] == (512 * 4096 * 2, "bf16[512,4096]")
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing")


SPARSECORE = """HloModule jit_step, is_scheduled=true

%called.1 (param: bf16[16,128]) -> bf16[64,128] {
  %param = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%param), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%called.2 (param.2: bf16[64,128]) -> bf16[64,128] {
  %param.2 = bf16[64,128]{0,1:T(8,128)(2,1)} parameter(0)
  ROOT %copy.2 = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%param.2)
}, execution_thread="sparsecore"

%body (p: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
  %p = (s32[], bf16[16,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x.1 = bf16[16,128]{1,0} get-tuple-element(%p), index=1
  %g.call-start = ((), (), (s32[4]{0:S(8)})) custom-call-start(), called_computations={%called.1}
  %g.call-update = ((bf16[16,128]{1,0}), bf16[64,128]{1,0}, (s32[4]{0:S(8)})) custom-call-update(%g.call-start, %x.1)
  %g.call-done = bf16[64,128]{1,0} custom-call-done(%g.call-update)
  %c.call-start = ((bf16[64,128]{1,0}), bf16[64,128]{1,0}, u32[]{:S(8)}) call-start(%g.call-done), to_apply=%called.2
  %c.call-done = bf16[64,128]{1,0} call-done(%c.call-start)
  %y = bf16[16,128]{1,0} slice(%c.call-done), slice={[0:16], [0:128]}
  ROOT %t = (s32[], bf16[16,128]{1,0}) tuple(%i, %y)
}

%condition (p.1: (s32[], bf16[16,128])) -> pred[] {
  %p.1 = (s32[], bf16[16,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%p.1, %limit), direction=LT
}

ENTRY %main (n: s32[], x: bf16[16,128]) -> (s32[], bf16[16,128]) {
  %n = s32[] parameter(0)
  %x = bf16[16,128]{1,0} parameter(1)
  %start = (s32[], bf16[16,128]{1,0}) tuple(%n, %x)
  ROOT %loop = (s32[], bf16[16,128]{1,0}) while(%start), condition=%condition, body=%body
}
"""
"""As libtpu writes it for TPU7x, whose SparseCores take exchanges and copies; some attributes are left out."""


def test_what_runs_on_sparsecores():
    """An exchange behind `custom-call-start` runs with every trip; what is gathered is made, moved and held once."""
    parsed = hlo.parse(SPARSECORE)
    part, whole = 16 * 128 * 2, 64 * 128 * 2
    (found,) = hlo.collectives(parsed)
    assert (found.kind, found.axes, found.runs, found.bytes) == ("all-gather", "groups of 4", 5, whole)
    assert work(parsed).all.bytes == 5 * (2 * whole + 2 * part)  # the copy and the slice; exchanges count apart
    assert peak(parsed).bytes == 4 + part + 2 * whole  # what is given, what is gathered and its copy
    assert [large.bytes for large in hlo.largest(parsed, 1)] == [whole]


STARTS = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: f32[8,4], y: bf16[2,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %y = bf16[2,4]{1,0} parameter(1)
  %sum = ((f32[8,4]{1,0}), f32[8,4]{1,0}) all-reduce-start(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %swap = ((f32[8,4]{1,0}, bf16[2,4]{1,0}), (f32[8,4]{1,0}, bf16[2,4]{1,0})) collective-permute-start(%x, %y)
  %old = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%y), replica_groups={{0,1,2,3}}, dimensions={0}
  %new = ((bf16[2,4]{1,0}), bf16[8,4]{1,0}) all-gather-start(%y), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %done = f32[8,4]{1,0} all-reduce-done(%sum)
}
"""
"""As the compiler of GPUs writes exchanges that begin and end apart."""


def test_what_begins_and_ends_apart_counts_its_results():
    found = [(one.kind, one.bytes) for one in hlo.collectives(hlo.parse(STARTS))]
    assert found == [("all-reduce", 128), ("collective-permute", 128 + 16), ("all-gather", 64), ("all-gather", 64)]


IN_PLACE = """HloModule jit_step, is_scheduled=true

%layout (input: f32[64,128]) -> f32[64,128] {
  %input = f32[64,128]{1,0} parameter(0)
  ROOT %copy = f32[64,128]{0,1} copy(%input)
}

%update (stack: f32[64,128], row: f32[1,128], at: s32[]) -> f32[64,128] {
  %stack = f32[64,128]{1,0} parameter(0)
  %row = f32[1,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %other = f32[64,128]{0,1} fusion(%stack), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%layout
  ROOT %put = f32[64,128]{0,1} dynamic-update-slice(%other, %row, %at, %at)
}

ENTRY %main (stack: f32[64,128], row: f32[1,128], at: s32[]) -> f32[64,128] {
  %stack = f32[64,128]{1,0} parameter(0)
  %row = f32[1,128]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %put = f32[64,128]{0,1} fusion(%stack, %row, %at), kind=kLoop, calls=%update
}
"""


def test_an_update_in_another_layout_is_in_place():
    """Where the compiler says that the array stays where it was, nothing new is held."""
    assert peak(hlo.parse(IN_PLACE)).bytes == 4 * (64 * 128 + 128 + 1)
    copied = IN_PLACE.replace(" output_to_operand_aliasing={{}: (0, {})},", "")
    assert peak(hlo.parse(copied)).bytes == 4 * (2 * 64 * 128 + 128 + 1)


@pytest.mark.libtpu
def test_unknown_slices_are_one_line():
    from hybridlm.errors import ConfigError

    assert len(slice_devices("v5e:2x2")) == 4
    with pytest.raises(ConfigError, match=r"^topology \('v5e:3x5'\): [^\n]+$"):
        slice_devices("v5e:3x5")
