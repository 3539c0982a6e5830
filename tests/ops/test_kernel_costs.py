# SPDX-License-Identifier: Apache-2.0
"""What ops say that their TPU kernels cost, against the kernels: matrix products in the traced kernel times the steps
of its grid, and the blocks that its index maps fetch. Nothing is run."""

import math
import pkgutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun

import pallas_kernels as pk
from hybridlm.plan.collectives import KERNEL_PRIMITIVES
from hybridlm.plan.kernels import GPU_COSTS
from pallas_kernels.cost import Array
from pallas_kernels.ops import OPS
from pallas_kernels.platform import assume_platform

BF16, F32 = jnp.bfloat16, jnp.float32
Shape = jax.ShapeDtypeStruct


def inside(jaxpr):
    """The equations of a program and those inside, kernels aside, with the number of times that they run."""
    for eqn in jaxpr.eqns:
        yield eqn, 1
        if eqn.primitive.name not in KERNEL_PRIMITIVES:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    yield from ((e, times * n) for e, n in inside(part))


def products(jaxpr) -> Counter:
    """FLOPs of matrix products by whether they stand in a branch: of several branches one runs."""
    found = Counter()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[dim] for dim in contracted)
            found["always"] += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif eqn.primitive.name == "cond":
            found["branch"] += sum(sum(products(b.jaxpr).values()) for b in eqn.params["branches"])
        else:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    found += Counter({k: times * v for k, v in products(part).items()})
    return found


def kernels(function, *shapes) -> dict:
    """The kernels of a gradient by name."""
    return {eqn.params["name"]: eqn for eqn in calls(function, *shapes)}


def calls(function, *shapes) -> list:
    """Of kernels, of a gradient."""
    with assume_platform("tpu", generation="v5p"):
        gradient = jax.grad(lambda *x: function(*x).astype(F32).sum(), argnums=tuple(range(len(shapes))))
        traced = jax.jit(gradient).trace(*shapes)
    return [eqn for eqn, _ in inside(traced.jaxpr.jaxpr) if eqn.primitive.name == "pallas_call"]


def said(op: str, eqn) -> float:
    arrays = [[Array(v.aval.shape, v.aval.dtype.itemsize) for v in of] for of in (eqn.invars, eqn.outvars)]
    return pkgutil.resolve_name(OPS[op].costs[eqn.params["name"]])(*arrays)


@pytest.mark.parametrize(("heads", "width", "groups", "state"), [(16, 64, 2, 128), (16, 128, 2, 128), (16, 64, 2, 256)])
def test_ssd(heads, width, groups, state):
    """Within a tenth. Forward, each product stands in two branches, of weak decay and of strong, of which one runs."""
    B, T = 1, 512
    x, BC = Shape((B, T, heads, width), BF16), Shape((B, T, groups, state), BF16)
    found = kernels(
        lambda *a: pk.ssd(*a, implementation="tpu"), x, Shape((B, T, heads), F32), Shape((heads,), F32), BC, BC
    )
    for name, branches in (("ssd_forward", 2), ("ssd_backward", 1)):
        counted = products(found[name].params["jaxpr"])
        steps = math.prod(found[name].params["grid_mapping"].grid)
        made = (counted["always"] + counted["branch"] / branches) * steps
        assert said("ssd", found[name]) == pytest.approx(made, rel=0.1), name


def test_layers_share_a_traced_kernel():
    """Kernels are most of what a step's tracing takes: a second layer of the same shapes traces none again."""
    B, T, heads = 1, 512, 16
    x, BC = Shape((B, T, heads, 64), BF16), Shape((B, T, 2, 128), BF16)
    one = lambda x, *a: pk.ssd(pk.causal_conv1d(x.reshape(B, T, -1), a[-1]).reshape(x.shape), *a[:-1])
    two = lambda x, *a: one(one(x, *a), *a)
    shapes = x, Shape((B, T, heads), F32), Shape((heads,), F32), BC, BC, Shape((heads * 64, 4), F32)
    found = calls(two, *shapes)
    for name in ("ssd_forward", "ssd_backward", "causal_conv1d_backward"):
        of_layers = [eqn.params["jaxpr"] for eqn in found if eqn.params["name"] == name]
        assert len(of_layers) == 2 and of_layers[0] is of_layers[1], name


def test_attention():
    """Every visible pair of blocks in whole; one of two branches runs: that with a mask or that without."""
    B, T, heads, width, block = 1, 4096, 8, 128, 1024
    q, kv = Shape((B, T, heads, width), BF16), Shape((B, T, 2, width), BF16)
    found = kernels(lambda *a: pk.attention(*a, implementation="tpu"), q, kv, kv)
    n = T // block
    shares = n * (n + 1) / 2 / n**2 / ((T + 1) / T / 2)  # pairs in visible blocks over visible pairs
    for name in ("attention_forward", "attention_backward"):
        steps = math.prod(found[name].params["grid_mapping"].grid)
        made = sum(products(found[name].params["jaxpr"]).values()) / 2 * steps
        assert said("attention", found[name]) * shares == pytest.approx(made, rel=0.02), name


def moved(eqn) -> int:
    """Bytes that a kernel's pipeline copies: a block whenever its index is another than the step's before."""
    mapping, total = eqn.params["grid_mapping"], 0
    for block in mapping.block_mappings:
        size = math.prod(getattr(n, "block_size", n) if n is not None else 1 for n in block.block_shape)
        index = jaxpr_as_fun(block.index_map_jaxpr)
        before = None
        for step in np.ndindex(*mapping.grid):
            now = tuple(int(i) for i in index(*step))
            total += size * block.array_aval.dtype.itemsize if now != before else 0
            before = now
    return total


def test_bytes():
    """Operands once and results once is what the schedule of the SSD's backward moves, within a tenth: nothing is
    fetched twice."""
    B, T, heads = 1, 512, 16
    x, BC = Shape((B, T, heads, 64), BF16), Shape((B, T, 2, 128), BF16)
    f = lambda *a: pk.ssd(*a, implementation="tpu")
    eqn = kernels(f, x, Shape((B, T, heads), F32), Shape((heads,), F32), BC, BC)["ssd_backward"]
    arrays = sum(v.aval.size * v.aval.dtype.itemsize for v in (*eqn.invars, *eqn.outvars))
    assert moved(eqn) == pytest.approx(arrays, rel=0.1)


def wgmmas(jaxpr, times: int = 1):
    """FLOPs of a warpgroup's products in a kernel for Hopper: (FLOPs, how many loops of unknown length are around it,
    whether the first factor lies in registers). The second is in shared memory, tiled: its last four dims are those of
    one tile."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "wgmma_ref":
            rows, columns = eqn.invars[0].aval.shape
            depth = math.prod(eqn.invars[2].aval.shape[-4:]) // columns
            yield 2 * rows * columns * depth * times, 0, not hasattr(eqn.invars[1].aval, "inner_aval")
        n = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for part in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                looped = eqn.primitive.name == "while"
                yield from ((flops, loops + looped, own) for flops, loops, own in wgmmas(part, times * n))


def gpu_kernels(function, *shapes) -> list:
    """The kernels for Hopper of a gradient, in order."""
    with assume_platform("gpu", capability="9.0", multiprocessors=132):
        gradient = jax.grad(lambda *x: function(*x).astype(F32).sum(), argnums=tuple(range(len(shapes))))
        traced = jax.jit(gradient).trace(*shapes)
    every = (e for e, _ in inside(traced.jaxpr.jaxpr))
    return [e for e in every if e.primitive.name in KERNEL_PRIMITIVES and e.params["name"] in GPU_COSTS]


def gpu_said(eqn) -> float:
    arrays = [[Array(v.aval.shape, v.aval.dtype.itemsize) for v in of] for of in (eqn.invars, eqn.outvars)]
    return pkgutil.resolve_name(GPU_COSTS[eqn.params["name"]])(*arrays)


@pytest.mark.newer
@pytest.mark.parametrize(("heads", "groups", "state"), [(16, 1, 128), (6, 2, 64)])
def test_ssd_on_hopper(heads, groups, state):
    """What the kernels for Hopper say against their products. Of walks those of the loop over tiles: each head of a
    block has a warpgroup that works with registers, scores are made once from shared memory; what finds the states that
    pieces start from says as much as of all tokens. Of gradients all: a block has the first tile of a span or its
    second, so that half of what stands in the kernel runs."""
    B, T = 1, 4096
    x, BC = Shape((B, T, heads, 64), BF16), Shape((B, T, groups, state), BF16)
    f = lambda *a: pk.ssd(*a, implementation="gpu")
    found = gpu_kernels(f, x, Shape((B, T, heads), F32), Shape((heads,), F32), BC, BC)
    assert {e.params["name"] for e in found} == {"ssd_walk", "ssd_reverse_walk", "ssd_gradients"}
    for eqn in found:
        name, grid = eqn.params["name"], eqn.params["meshes"][0].grid
        products = [p for jaxpr in eqn.params["jaxprs"] for p in wgmmas(getattr(jaxpr, "jaxpr", jaxpr))]
        if name.endswith("walk"):
            of_step = sum(flops * (heads // grid[2] if own else 1) for flops, loops, own in products if loops)
            made = T // 64 * grid[0] * grid[2] * of_step
            assert T // 64 % grid[1] == 0 or eqn.outvars[0].aval.shape != x.shape
        else:
            made = math.prod(grid) * sum(flops for flops, *_ in products) / 2
        assert gpu_said(eqn) == pytest.approx(made, rel=0.02), name


@pytest.mark.newer
def test_grouped_dot_on_hopper():
    """A product a row in the forward and for each gradient, and the visits of a tile one after the other."""
    M, K, N, G = 512, 128, 256, 4
    sizes = np.full(G, M // G, np.int32)
    f = lambda x, w: pk.grouped_dot(x, w, sizes, implementation="gpu")
    found = gpu_kernels(f, Shape((M, K), BF16), Shape((G, K, N), BF16))
    assert sorted(e.params["name"] for e in found) == ["grouped_dot_matrices", *["grouped_dot_rows"] * 2]
    assert all(gpu_said(eqn) == 2 * M * K * N for eqn in found)


@pytest.mark.newer
def test_attention_on_hopper():
    """As on a TPU, whose arrays have heads before tokens."""
    B, T, heads, width = 1, 1024, 8, 64
    q, kv = Shape((B, T, heads, width), BF16), Shape((B, T, 2, width), BF16)
    found = gpu_kernels(lambda *a: pk.attention(*a, implementation="gpu"), q, kv, kv)
    assert [e.params["name"] for e in found] == ["attention_forward", "attention_backward"]
    apart = [Array((B, heads, T, width), 2), *[Array((B, 2, T, width), 2)] * 2]
    for eqn in found:
        assert gpu_said(eqn) == pkgutil.resolve_name(OPS["attention"].costs[eqn.params["name"]])(apart, apart[:1])


@pytest.mark.newer
def test_convolution_on_hopper():
    """Two operations a tap, and three times as many for the gradient."""
    x, w = Shape((2, 512, 256), BF16), Shape((256, 4), F32)
    found = gpu_kernels(lambda *a: pk.causal_conv1d(*a, implementation="gpu"), x, w)
    said = {e.params["name"]: gpu_said(e) / (2 * 512 * 256 * 4) for e in found}
    assert said == {"causal_conv1d_forward": 2, "causal_conv1d_backward": 6}


@pytest.mark.newer
@pytest.mark.parametrize(("gate", "kernels"), [((), 3), ((64,), 4)])
def test_delta_rule_on_hopper(gate, kernels):
    """All products, of one warpgroup of the state and one slice of key channels: of two, products read cuts of tiles,
    whose size a traced kernel does not tell. Nor does it that of tiles which share memory with others, as those of the
    inverse do by channel: there it is taken from the walk, which has the same."""
    B, T, H, P = 1, 256, 2, 64
    q, beta = Shape((B, T, H, P), BF16), Shape((B, T, H), F32)
    found = gpu_kernels(
        lambda *a: pk.gated_delta_rule(*a, implementation="gpu"), q, q, q, beta, Shape((B, T, H, *gate), F32)
    )
    assert len(found) == kernels
    for eqn in found:
        name, chunks = eqn.params["name"], B * H * T // 64
        products = [p for jaxpr in eqn.params["jaxprs"] for p in wgmmas(getattr(jaxpr, "jaxpr", jaxpr))]
        made = sum(flops for flops, *_ in products) * (B * H if name.endswith("walk") else chunks)
        if name.endswith("chunks"):  # two products of a level, six times
            made = chunks * (6 * 2 + 12) * 2 * 64**3
        assert gpu_said(eqn) == pytest.approx(made, rel=0.02), name


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gate", [(), (128,)])
def test_delta_rule(gate, dtype):
    """All products, those of several terms and of half of a chunk's tokens among them."""
    B, T, H, G, P = 1, 256, 4, 2, 256
    q, v, beta = Shape((B, T, G, 128), dtype), Shape((B, T, H, P), dtype), Shape((B, T, H), F32)
    f = lambda *a: pk.gated_delta_rule(*a, implementation="tpu")
    found = kernels(f, q, q, v, beta, Shape((B, T, H, *gate), F32))
    assert len(found) == 2
    for name, eqn in found.items():
        made = sum(products(eqn.params["jaxpr"]).values()) * math.prod(eqn.params["grid_mapping"].grid)
        assert said("gated_delta_rule", eqn) == pytest.approx(made, rel=0.02), name


SCAN = Shape((2, 512, 128), BF16), Shape((2, 512, 128), F32), Shape((128, 16), F32), *[Shape((2, 512, 16), BF16)] * 2


@pytest.mark.newer
def test_selective_scan_on_hopper():
    """Six operations a state, and three times as many for the gradient."""
    found = gpu_kernels(lambda *a: pk.selective_scan(*a, implementation="gpu"), *SCAN)
    said = {e.params["name"]: gpu_said(e) / (2 * 512 * 128 * 16) for e in found}
    assert said == {"selective_scan_walk": 6, "selective_scan_gradients": 18}


def test_selective_scan():
    """Likewise."""
    found = kernels(lambda *a: pk.selective_scan(*a, implementation="tpu"), *SCAN)
    counts = {name: said("selective_scan", eqn) / (2 * 512 * 128 * 16) for name, eqn in found.items()}
    assert counts == {"selective_scan_forward": 6, "selective_scan_backward": 18}


def test_every_named_kernel_is_there():
    for op in OPS.values():
        for kernel, count in (*op.costs.items(), *op.gpu_costs.items()):
            assert kernel.startswith(op.name) and count.startswith(f"pallas_kernels.ops.{op.name}.")
