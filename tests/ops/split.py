# SPDX-License-Identifier: Apache-2.0
"""Ops whose tokens are split over devices: how they are run so, what they are held to, what the devices send."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from pallas_kernels import ops, oracle
from pallas_kernels.ops import OPS
from tests.ops.support import QUICK, loss_weights

# Dims of arrays by name and op that have a token axis, as second.
TOKENS = {
    "ssd": ("x", "dt", "B", "C", "decay", "segment_ids"),
    "selective_scan": ("x", "dt", "B", "C", "segment_ids"),
    "causal_conv1d": ("x", "segment_ids"),
    "attention": ("q", "k", "v", "gate", "segment_ids", "positions"),
}
RECURRENCES = tuple(name for name, op in OPS.items() if op.context and op.tokens and name not in TOKENS)
TOKENS |= {name: (*OPS[name].tokens, "segment_ids") for name in RECURRENCES}


def mesh_of(n: int):
    return jax.make_mesh((n,), ("context",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:n])


def split_over(op: str, n: int):
    """The op on whole arrays, run by n devices on their tokens."""

    def run(*args, **kwargs):
        names = OPS[op].positional
        arrays = {**dict(zip(names, args)), **kwargs}
        given = {k: v for k, v in arrays.items() if v is not None and isinstance(v, (jax.Array, np.ndarray))}
        options = {k: v for k, v in arrays.items() if k not in given}

        def local(given):
            named = {**options, **given}
            args = [named.pop(name, None) for name in names]
            return ops.function(op)(*args, **named, context_axis="context")

        specs = {k: P(None, "context") if k in TOKENS[op] else P() for k in given}
        out = P(None, "context")
        out = (out, *(P() for _ in OPS[op].states)) if options.get("return_final_state") else out
        return jax.shard_map(local, mesh=mesh_of(n), in_specs=(specs,), out_specs=out, check_vma=False)(given)

    return run


def check(op: str, inputs: dict, n: int, **options) -> None:
    """The op split over n devices within the tolerance table of its float64 reference."""
    dtype = inputs[OPS[op].positional[0]].dtype
    options |= {"compiler_options": QUICK, "weights": loss_weights(op, inputs, **options)}
    expected = oracle.oracle(op, inputs, **options)
    actual = oracle.evaluate(op, inputs, function=split_over(op, n), **options)
    largest = max(oracle.rms(value) for name, value in expected.items() if name.startswith("d"))
    for name, value in actual.items():
        floor = oracle.SMALL_GRADIENT * largest if name.startswith("d") else 0.0
        error, limit = oracle.relative_rms(value, expected[name], floor=floor), oracle.bound(dtype, f"{op}.{name}")
        assert error <= limit, f"{op}.{name} on {n} devices: relative RMS {error:.2e} above {limit:.0e}"


def ids_of(*rows) -> np.ndarray:
    """Rows of (id, length) runs."""
    return np.array([np.repeat(*zip(*row)) for row in rows], np.int32)


# Four rows of 64 tokens, shards of 32, 16 or 8.
EDGES = ids_of(
    [(1, 20), (2, 30), (3, 14)],  # documents over edges; shards inside one document
    [(1, 8), (2, 8), (1, 16), (2, 32)],  # starts exactly at edges, ids that come back
    [(1, 10), (0, 30), (1, 10), (0, 14)],  # shards of padding inside a document and at the end
    [(0, 17), (3, 1), (0, 15), (4, 1), (4, 23), (0, 3), (4, 4)],  # padding first, one-token document
)


def collectives(function, *args) -> list[tuple[str, int]]:
    """(operation, elements of its largest result) of the compiled program."""
    text = jax.jit(function, compiler_options=QUICK).lower(*args).compile().as_text()
    names = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast"
    found = re.findall(rf"= (.*?) ({names})(?:-start)?\(", text)
    sizes = lambda types: [
        int(np.prod([int(d) for d in dims.split(",") if d])) for dims in re.findall(r"\[([\d,]*)\]", types)
    ]
    return [(name, max(sizes(types))) for types, name in found]


def both(op: str, run, **options):
    """(forward, forward and backward) of a run on a dict of arrays."""

    def forward(arrays, ids):
        named = {**arrays, "segment_ids": ids}
        args = [named.pop(name, None) for name in OPS[op].positional]
        return run(*args, **named, **options)

    return forward, jax.grad(lambda arrays, ids: sum(jnp.sum(o**2) for o in jax.tree.leaves(forward(arrays, ids))))
