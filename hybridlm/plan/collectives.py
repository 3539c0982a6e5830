# SPDX-License-Identifier: Apache-2.0
"""What a program exchanges between devices: read from its traced form, which has what the layers ask for by name, and
from the compiled text, which has what the compiler made of that and of its own.

Bytes are of one device and a whole step: the result of a gather, the operand of everything else, times the trips of the
loops around it. They say what is asked for, not how long it takes.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
PRIMITIVES = {
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
}
"""Primitives of JAX, by their names in traced programs, and what they become."""
KERNEL_PRIMITIVES = ("pallas_call", "mpmd_map", "core_map")
"""Primitives that run Pallas kernels: of TPUs and Triton, and of Mosaic GPU in two versions of JAX."""


class Collective(NamedTuple):
    """An exchange of a program."""

    kind: str
    """One of KINDS."""
    axes: str
    """Mesh axes that it spans, joined by `*`; of compiled programs what their text says."""
    runs: int
    """Times a step."""
    bytes: int
    """Of one run, on one device."""
    what: str
    """Type and shape, and where it comes from."""
    source: str = ""
    """Where it comes from: named scopes and primitive."""
    group: tuple[int, ...] = ()
    """Devices of one of its groups, by their places in the mesh; of compiled programs."""


@dataclass(frozen=True)
class Totals:
    """Of one kind, or one kind over the same axes."""

    ops: int = 0
    """In the program."""
    runs: int = 0
    """A step."""
    bytes: int = 0
    """A step and device."""

    def plus(self, collective: Collective) -> "Totals":
        """With one more."""
        more = collective.runs * collective.bytes
        return Totals(self.ops + 1, self.runs + collective.runs, self.bytes + more)


def totals(collectives, *, by_axes: bool = True) -> dict[str, Totals]:
    """By `kind axes`, or by kind alone, largest bytes first."""
    found: dict[str, Totals] = {}
    for collective in collectives:
        key = f"{collective.kind} {collective.axes}" if by_axes else collective.kind
        found[key] = found.get(key, Totals()).plus(collective)
    return dict(sorted(found.items(), key=lambda item: -item[1].bytes))


# Traced programs ----------------------------------------------------------------------------------------------------


def of_traced(traced: jax.stages.Traced) -> list[Collective]:
    """The exchanges that the program writes out (those inside `shard_map`), by mesh axis."""
    return list(_of_jaxpr(traced.jaxpr.jaxpr, 1, {}))


def kernels_of_traced(traced: jax.stages.Traced) -> dict[str, int]:
    """Times a step that each Pallas kernel runs, by name."""
    found: dict[str, int] = {}
    for eqn, runs, _, _ in equations(traced.jaxpr.jaxpr, 1, {}):
        if eqn.primitive.name in KERNEL_PRIMITIVES:
            name = eqn.params["name"]
            found[name] = found.get(name, 0) + runs
    return dict(sorted(found.items()))


def _of_jaxpr(jaxpr, runs: int, sizes: dict[str, int]) -> Iterator[Collective]:
    for eqn, times, sizes_here, scope in equations(jaxpr, runs, sizes):
        kind = PRIMITIVES.get(eqn.primitive.name)
        if kind is None:
            continue
        names = eqn.params.get("axes", eqn.params.get("axis_name"))
        names = names if isinstance(names, tuple) else (names,)
        axes = [name for name in names if sizes_here.get(name, 1) > 1]
        moved = eqn.outvars if kind == "all-gather" else eqn.invars
        for var in moved if axes else ():
            aval = var.aval
            n_bytes = int(np.prod(aval.shape, dtype=np.int64)) * aval.dtype.itemsize
            source = f"{scope}/{eqn.primitive.name}"
            what = f"{aval.str_short(short_dtypes=True)} {eqn.source_info.name_stack}"
            yield Collective(kind, "*".join(axes), times, n_bytes, what, source)


def equations(jaxpr, runs: int, sizes: dict[str, int], scope: str = "") -> Iterator[tuple]:
    """(equation, times it runs, sizes of the mesh axes whose shards it works on, the named scopes that it stands in) of
    a program and those inside, kernels aside. Kernels whose results nothing reads are left out, as XLA leaves them out:
    JAX keeps them where what is recomputed was kept."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in KERNEL_PRIMITIVES and not eqn.effects and not _is_read(eqn, jaxpr):
            continue
        stands_in = f"{scope}/{eqn.source_info.name_stack}"
        yield eqn, runs, sizes, stands_in
        name = eqn.primitive.name
        if name in KERNEL_PRIMITIVES:
            continue
        here = sizes | _manual(eqn.params) if name == "shard_map" else sizes
        times = runs * eqn.params["length"] if name == "scan" else runs
        if name == "while":
            times = runs * least_trips(eqn.params["body_jaxpr"].jaxpr)
        inner = list(_inside(eqn.params.values()))
        if name == "cond":  # one of them runs: that with the most to exchange
            cost = lambda branch, here: sum(c.runs * c.bytes for c in _of_jaxpr(branch, 1, here))
            inner = [max(inner, key=functools.partial(cost, here=here))]
        for jaxpr_inside in inner:
            yield from equations(jaxpr_inside, times, here, stands_in)


def _is_read(eqn, jaxpr) -> bool:
    made = set(map(id, eqn.outvars))
    readers = (jaxpr.outvars, *(other.invars for other in jaxpr.eqns))
    return not eqn.outvars or any(id(var) in made for read in readers for var in read)


def parts(whole: Sequence[int], part: Sequence[int]) -> int:
    """How often a part of several rows goes into an array along a dim; 1 where they differ in several, or in none."""
    cut = [(n, m) for n, m in zip(whole, part, strict=False) if n != m]
    return cut[0][0] // cut[0][1] if len(cut) == 1 and len(whole) == len(part) and cut[0][1] > 1 else 1


def least_trips(body) -> int:
    """Of a loop that ends by what it computes: see `hlo.least_trips`. body: its jaxpr."""
    cuts = [eqn for eqn, *_ in equations(body, 1, {}) if eqn.primitive.name == "dynamic_slice"]
    return max([1, *(parts(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape) - 1 for eqn in cuts)])


def _manual(params: dict) -> dict[str, int]:
    """The mesh axes of a shard_map over which arrays inside are shards, with their sizes."""
    return {name: params["mesh"].shape[name] for name in params["newly_manual_axes"]}


def _inside(values) -> Iterator:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _inside(value)
        elif hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            yield value.jaxpr
