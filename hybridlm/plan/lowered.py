# SPDX-License-Identifier: Apache-2.0
"""The second stage of a plan: the step traced and lowered. Which kernels `auto` takes and why, what is exchanged by
name, and the FLOPs of its matrix products and kernels by class."""

import time
from dataclasses import dataclass

import jax

from hybridlm.lazy import no_collections
from hybridlm.plan import collectives
from hybridlm.plan.collectives import Collective, Totals
from hybridlm.plan.described import Described
from hybridlm.plan.traced import Flops, flops
from pallas_kernels.op import choices


@dataclass(frozen=True)
class Lowered:
    """Of a device and a step."""

    trace_seconds: float
    lower_seconds: float
    choices: list[str]
    """What `auto` chose for each op, and why."""
    kernels: dict[str, int]
    """Times that each Pallas kernel runs, by name."""
    exchanges: dict[str, Totals]
    """What the program asks for by name, by kind and mesh axes; the compiler adds its own."""
    between_slices: list[Collective]
    """Of them what crosses from slice to slice, which compiled programs for TPUs do not show."""
    flops: Flops
    """What is computed, recomputation and all, as if it were split evenly over the devices."""


def lower(run: Described) -> tuple[Lowered, jax.stages.Lowered]:
    """The stage, and what can be compiled."""
    began = time.perf_counter()
    with no_collections():
        with choices() as chosen:
            traced = run.trace()
        between = time.perf_counter()
        lowered = traced.lower()
    asked = collectives.of_traced(traced)
    found = Lowered(
        trace_seconds=between - began,
        lower_seconds=time.perf_counter() - between,
        choices=sorted(chosen),
        kernels=collectives.kernels_of_traced(traced),
        exchanges=collectives.totals(asked),
        between_slices=[c for c in asked if "slice" in c.axes.split("*")],
        flops=flops(traced, run.mesh.size),
    )
    return found, lowered
