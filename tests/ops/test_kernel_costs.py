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
from pallas_kernels.cost import Array
from pallas_kernels.ops import OPS
from pallas_kernels.platform import assume_platform

BF16, F32 = jnp.bfloat16, jnp.float32
Shape = jax.ShapeDtypeStruct


def inside(jaxpr):
    """The equations of a program and those inside, kernels aside, with the number of times that they run."""
    for eqn in jaxpr.eqns:
        yield eqn, 1
        if eqn.primitive.name != "pallas_call":
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
    with assume_platform("tpu", generation="v5p"):
        gradient = jax.grad(lambda *x: function(*x).astype(F32).sum(), argnums=tuple(range(len(shapes))))
        traced = jax.jit(gradient).trace(*shapes)
    return {e.params["name"]: e for e, _ in inside(traced.jaxpr.jaxpr) if e.primitive.name == "pallas_call"}


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


def test_every_named_kernel_is_there():
    for op in OPS.values():
        for kernel, count in op.costs.items():
            assert kernel.startswith(op.name) and count.startswith(f"pallas_kernels.ops.{op.name}.")
