# SPDX-License-Identifier: Apache-2.0
"""Work of compiled programs: FLOPs and bytes times the trips of loops, against programs whose counts are known and
against XLA's own analysis where there are no loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.plan import hlo
from hybridlm.plan.classes import EXPERTS, OTHER, class_of, sublayer_of
from hybridlm.plan.dots import _positions
from hybridlm.plan.traced import flops
from hybridlm.plan.work import work
from pallas_kernels import grouped_dot


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def counted(program):
    return work(hlo.parse(program.as_text()))


def test_loops_count_their_trips():
    def step(x, w):
        def outer(x, w_i):
            with jax.named_scope("M.Mamba2/project"):
                x = jnp.tanh(x @ w_i)

            def inner(x, _):
                with jax.named_scope("-.MLP/mlp_in"):
                    return jnp.sin(x @ w_i), None

            return jax.lax.scan(inner, x, None, length=5)[0], None

        return jax.lax.scan(outer, x, w)[0]

    found = counted(compiled(step, (16, 64), (3, 64, 64)))
    product = 2 * 16 * 64 * 64
    assert found.by_class["projections"].flops == 3 * product
    assert found.by_class["MLP"].flops == 3 * 5 * product
    assert not found.unknown


def test_flops_are_xlas_where_there_are_no_loops():
    def f(a, b, c):
        y = jnp.einsum("bij,bjk->bik", a, b)
        return jnp.einsum("bik,kl->il", y, c)

    program = compiled(f, (4, 8, 32), (4, 32, 16), (16, 24))
    said = program.cost_analysis()
    said = said[0] if isinstance(said, list) else said
    assert counted(program).all.flops == pytest.approx(said["flops"], rel=0.02)


def test_an_update_in_place_moves_the_update():
    """A stack of 64 rows filled in a loop is written once, not 64 times; read in a loop, it is read once."""

    def f(x):
        stack = jax.lax.scan(lambda c, _: (c * 1.5, jnp.sin(c)), x, None, length=64)[1]
        return jax.lax.scan(lambda c, row: (c + jnp.cos(row), None), x, stack)[0]

    row = 4 * 1024
    moved = counted(compiled(f, (1024,))).all.bytes
    assert 2 * 64 * row <= moved <= 12 * 64 * row  # 64 rows written and read; all of it every trip were 8,192 rows


def test_a_fused_scatter_moves_its_rows():
    """Rows of a table are read, added to and written; the table stays where it is."""
    text = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (table: f32[4096,64], rows: s32[8,1], x: f32[8,64]) -> f32[4096,64] {
  %table = f32[4096,64]{1,0} parameter(0)
  %rows = s32[8,1]{1,0} parameter(1)
  %x = f32[8,64]{1,0} parameter(2)
  ROOT %put = f32[4096,64]{1,0} scatter(%table, %rows, %x), update_window_dims={1}, to_apply=%add
}

ENTRY %main (table: f32[4096,64], rows: s32[8,1], x: f32[8,64]) -> f32[4096,64] {
  %table = f32[4096,64]{1,0} parameter(0)
  %rows = s32[8,1]{1,0} parameter(1)
  %x = f32[8,64]{1,0} parameter(2)
  ROOT %put = f32[4096,64]{1,0} fusion(%table, %rows, %x), kind=kInput, calls=%fused
}
"""
    part = 4 * 8 * 64
    assert work(hlo.parse(text)).all.bytes == 3 * part + 4 * 8  # read, written, what is added, and where


@pytest.mark.parametrize("args", [(8, 8, 3, 1, 1, 1, 1), (5, 16, 4, 1, 3, 2, 1), (16, 31, 16, 1, 15, 1, 1)])
def test_positions(args):
    """Every pair of output and window place, by hand."""
    n_in, n_out, size, stride, low, spread, kernel = args
    padded = {i * spread for i in range(n_in)}
    by_hand = sum(o * stride - low + k * kernel in padded for o in range(n_out) for k in range(size))
    assert _positions(*args) == by_hand


def test_a_product_as_a_convolution():
    """Batches as windows over padding, as TPUs write them: what falls on padding is not counted."""
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: bf16[6,16,128], b: bf16[64,16,128]) -> bf16[6,64,31] {
  %a = bf16[6,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[64,16,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[6,64,31]{2,1,0} convolution(%a, %b), window={size=16 pad=15_15}, dim_labels=b0f_o0i->bf0
}
"""
    found = work(hlo.parse(text)).all
    assert found.flops == 2 * 6 * 64 * 128 * 16 * 16  # each of 16 inputs meets each of 16 places once
    assert found.bytes == 2 * (6 * 16 * 128 + 6 * 64 * 31)  # b is on the chip


def test_of_branches_the_lightest_counts():
    def f(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    assert counted(compiled(f, (64, 64), (64, 64))).all.flops == 0


def test_classes():
    base = "jit(train_step)/gradients/transpose(jvp())/while/body/checkpoint/jit(call)"
    assert class_of(f"{base}/M.Mamba2/project/shard_map/dot_general") == "projections"
    assert class_of(f"{base}/E.MoE/shared/mlp_in/dot_general") == EXPERTS
    assert class_of("jit(train_step)/gradients/jvp(loss)/reduce_sum") == "loss"
    assert class_of(f"{base}/add") == OTHER  # a primitive's name is no scope
    assert sublayer_of(f"{base}/M.Mamba2/scan/shard_map/ssd_forward/pallas_call") == "M.Mamba2/scan"
    assert sublayer_of("state['params']['embedding']") == "params"


def test_groups_of_devices():
    def group(text):
        line = f"%r = f32[8]{{0}} all-reduce(%x), {text}, to_apply=%sum"
        return hlo._group(hlo.Instruction("r", "f32[8]", "all-reduce", line.split("= f32[8]{0} ")[1]))

    assert group("replica_groups={{0,2},{1,3}}") == (0, 2)
    assert group("replica_groups=[2,4]<=[8]") == (0, 1, 2, 3)
    assert group("replica_groups=[4,2]<=[2,4]T(1,0)") == (0, 4)
    assert group("replica_groups=mesh['a'=2,'b'=4] {'a'}") == (0, 4)
    assert np.array_equal(group("replica_groups=mesh['a'=2,'b'=4] {'b'}"), range(4))


def test_a_loop_over_rows_that_experts_have():
    """Its length is known when it runs; taken is what all rows need, in blocks: the mean, as if no block were half
    empty. Traced and compiled programs agree with the products of all rows."""
    rows, k, n, groups = 512, 32, 48, 4
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((rows, k), (groups, k, n))]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    traced = jax.jit(lambda x, w, sizes: grouped_dot(x, w, sizes, implementation="xla")).trace(*shapes, sizes)
    found = counted(traced.lower().compile())
    exact = 2 * rows * k * n
    assert found.all.flops == exact and flops(traced, 1).all == exact
    assert len(found.unknown) == 1 and "taken as 16 trips" in next(iter(found.unknown))
    assert next(iter(flops(traced, 1).unknown)).endswith("taken as 16 trips")
