# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a traced program by class of work: those of its matrix products, and of its kernels by what each says that
it costs."""

import math
from collections import defaultdict
from dataclasses import dataclass

import jax

from hybridlm.plan.classes import class_of
from hybridlm.plan.collectives import KERNEL_PRIMITIVES, equations, least_trips
from hybridlm.plan.kernels import kernel_cost
from pallas_kernels.cost import Array


@dataclass(frozen=True)
class Flops:
    """Of a device and a step."""

    by_class: dict[str, float]
    unknown: tuple[str, ...] = ()
    """Kernels that say nothing of their cost, counted as nothing, and loops of which nobody knows how often they run,
    counted as `least_trips`."""

    @property
    def all(self) -> float:
        return sum(self.by_class.values())


def flops(traced: jax.stages.Traced, n_devices: int) -> Flops:
    """What stands outside of `shard_map` is counted as if it were split evenly over the devices."""
    found: dict[str, float] = defaultdict(float)
    unknown = {}
    for eqn, runs, sizes, scope in equations(traced.jaxpr.jaxpr, 1, {}):
        name, share = eqn.primitive.name, math.prod(sizes.values()) / n_devices
        if name == "dot_general":
            count = of_dot(eqn)
        elif name == "conv_general_dilated":
            count = of_convolution(eqn)
        elif name in KERNEL_PRIMITIVES:
            arrays = ([Array(v.aval.shape, v.aval.dtype.itemsize) for v in of] for of in (eqn.invars, eqn.outvars))
            cost = kernel_cost(eqn.params["name"] or "", *arrays, gpu=name != "pallas_call")
            if cost is None:
                unknown[f"kernel {eqn.params['name']}"] = None
                continue
            count = cost.flops
        else:
            if name == "while":
                unknown[f"loop {scope}: taken as {least_trips(eqn.params['body_jaxpr'].jaxpr):,} trips"] = None
            continue
        found[class_of(f"{scope}/{name}")] += runs * count * share
    return Flops(dict(sorted(found.items(), key=lambda item: -item[1])), tuple(unknown))


def of_dot(eqn) -> float:
    """Multiplications and additions of a dot_general."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[dim] for dim in contracted)


def of_convolution(eqn) -> float:
    """Multiplications and additions of a conv_general_dilated, those with padding too."""
    kernel = eqn.invars[1].aval.shape
    features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / features
