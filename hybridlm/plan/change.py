# SPDX-License-Identifier: Apache-2.0
"""Other ways to run a config on the same devices: mesh, recomputation and microbatches. None changes what is learnt
beyond rounding."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hybridlm.config import Config
from hybridlm.errors import ConfigError
from hybridlm.plan.bounds import on_the_wire
from hybridlm.plan.costs import WIDTH
from hybridlm.plan.counted import Counted, count
from hybridlm.plan.kept import kept, recomputed
from hybridlm.plan.slices import Devices
from hybridlm.sharding import MeshConfig

REMATS = ("none", "kernels", "mixer", "full")
"""Policies that are tried."""
MOST_TENSOR = 16


@dataclass(frozen=True)
class Change:
    """What of a config is another's."""

    mesh: MeshConfig
    remat: str
    accumulate: int

    def set_in(self, config: Config) -> Config:
        """ConfigError where it cannot be."""
        return replace(
            config,
            mesh=self.mesh,
            model=replace(config.model, remat=self.remat),
            optim=replace(config.optim, accumulate=self.accumulate),
        )

    def words(self, config: Config) -> list[str]:
        """The options that make it of the config."""
        given = [f"--mesh.{name}={size}" for name, size in vars(self.mesh).items()
                 if size != getattr(config.mesh, name)]  # fmt: skip
        given += [f"--model.remat={self.remat}"] if self.remat != config.model.remat else []
        return given + ([f"--optim.accumulate={self.accumulate}"] if self.accumulate != config.optim.accumulate else [])


def current(config: Config) -> Change:
    """The config as it is."""
    return Change(config.mesh, config.model.remat, config.optim.accumulate)


def activations(config: Config, counted: Counted, devices: Devices, remat: str) -> int:
    """Bytes of a device that live from the forward to the backward of a microbatch under a policy, by shapes: inputs of
    sublayers, and what the policy keeps beside them, as if all of it were split like the residual stream."""
    seq_len = config.data.seq_len
    of_row = kept(replace(config.model, remat=remat), seq_len, devices.chip)
    depth, span = counted.depth, config.model.remat_span
    of_row = of_row if span == 1 else of_row * min(span, depth) // depth  # of one span at a time
    return counted.inputs + of_row * counted.tokens_of_device // seq_len


def smaller(config: Config, counted: Counted, devices: Devices) -> Iterator[Change]:
    """Changes that lower the memory of a device, the smallest first: a policy that keeps less, see `_policies`; a
    smaller microbatch; this and the policy that keeps least; then parameters or the residual stream are split
    further."""
    here, policies = current(config), _policies(config, counted, devices)
    rows = config.data.batch_size // config.optim.accumulate
    shards = math.prod(counted.mesh.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
    times = [2**n for n in range(1, 7) if rows % (2**n * shards) == 0]
    yield from (replace(here, remat=remat) for remat in policies)
    yield from (replace(here, accumulate=here.accumulate * n) for n in times)
    strongest = policies[-1] if policies else here.remat
    yield from (replace(here, remat=strongest, accumulate=here.accumulate * n) for n in times if policies)
    sizes = {axis: counted.mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor")}
    for wider, narrower in (("fsdp", "data"), ("tensor", "data"), ("tensor", "fsdp")):
        for n in (2, 4, 8):
            if sizes[narrower] % n == 0 and sizes[narrower] > 1:
                split = {wider: sizes[wider] * n, narrower: sizes[narrower] // n}
                mesh = replace(config.mesh, **({"data": sizes["data"], "fsdp": sizes["fsdp"]} | split))
                yield Change(mesh, strongest, here.accumulate)


def _policies(config: Config, counted: Counted, devices: Devices) -> list[str]:
    """Policies that keep less than the config's, that which keeps most first, but those that keep more than another and
    yet compute more again."""
    here = config.model.remat
    sizes = {remat: activations(config, counted, devices, remat) for remat in (here, *REMATS)}
    again = {remat: recomputed(replace(config.model, remat=remat), config.data.seq_len) for remat in REMATS}
    less = [remat for remat in REMATS if sizes[remat] < sizes[here]]
    worse = {a for a in less for b in less if sizes[b] <= sizes[a] and again[b] < again[a]}
    return sorted(set(less) - worse, key=lambda remat: -sizes[remat])


def meshes(config: Config, devices: Devices) -> list[MeshConfig]:
    """Those of `data`, `fsdp` and `tensor` over the devices, the other axes as they are."""
    others = {axis: max(size, 1) for axis, size in vars(config.mesh).items() if axis not in ("data", "fsdp", "tensor")}
    if config.mesh.slice == -1:
        others["slice"] = devices.count // devices.domain
    n, rest = devices.count, math.prod(others.values())
    pairs = [
        (data, tensor) for tensor in _powers(MOST_TENSOR) for data in _powers(n) if n % (data * tensor * rest) == 0
    ]
    return [MeshConfig(data=data, fsdp=n // (data * tensor * rest), tensor=tensor, **others) for data, tensor in pairs]


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]


@dataclass(frozen=True)
class Guess:
    """What is thought of a change before anything is traced, to choose which ones are compiled."""

    change: Change
    seconds: float
    """Model FLOPs and what is computed again, at the peak, and exchanges by hand over all links."""
    bytes: int
    """Of a device: what no step goes without, and what the policy keeps by shapes."""


def guesses(config: Config, devices: Devices) -> tuple[list[Guess], list[str]]:
    """(of all changes that can be and seem to fit, the fastest first; lines of the meshes that cannot be).

    ValueError for devices whose peaks are not known.
    """
    peak = devices.peaks
    if peak is None or peak.links_gbs is None:
        raise ValueError(f"devices ({devices.words}): no peaks are known of {devices.kind}")
    found, cannot, here = [], [], current(config)
    for mesh in meshes(config, devices):
        try:
            whole = count(Change(mesh, here.remat, 1).set_in(config), devices)
        except ConfigError as error:
            cannot.append(f"{' '.join(f'{axis} {n}' for axis, n in vars(mesh).items() if n > 1)}: {error}")
            continue
        shards = math.prod(whole.mesh.get(axis, 1) for axis in ("slice", "data", "fsdp", "expert"))
        for remat in dict.fromkeys((here.remat, *REMATS)):
            for n in sorted({here.accumulate, *_powers(16)}):
                if config.data.batch_size % (n * shards) == 0:
                    found.append(_guess(whole, config, Change(mesh, remat, n), devices))
    room = None if peak.gib is None else peak.gib * 2**30
    found = [one for one in found if room is None or one.bytes <= room]
    return sorted(found, key=lambda one: (one.seconds, len(one.change.words(config)))), cannot


def _guess(whole: Counted, config: Config, change: Change, devices: Devices) -> Guess:
    """whole: as counted on the mesh in one microbatch."""
    n, peak = change.accumulate, devices.peaks
    counted = replace(
        whole, microbatches=n, tokens_of_device=whole.tokens_of_device // n, inputs=whole.inputs // n,
        gradients=whole.gradients * (4 // WIDTH[config.model.compute_dtype] if n > 1 else 1),
    )  # fmt: skip
    again = recomputed(replace(config.model, remat=change.remat), config.data.seq_len)
    arithmetic = counted.model_flops * (1 + again) / (peak.tflops * 1e12)
    exchange = exchanged(change.set_in(config), counted) / (peak.links_gbs * 1e9)
    more = activations(config, counted, devices, change.remat) - counted.inputs
    return Guess(change, arithmetic + exchange, counted.least + more)


def exchanged(config: Config, counted: Counted) -> float:
    """Bytes that a device sends a step, by hand: parameters gathered forward, backward and where they are used again,
    their gradients scattered, all with every microbatch; tokens gathered and scattered over `tensor` by each sublayer;
    gradients of replicas summed once."""
    sizes = {axis: counted.mesh.get(axis, 1) for axis in ("slice", "data", "fsdp", "tensor")}
    width, again = WIDTH[config.model.compute_dtype], config.model.remat != "none"
    whole = width * counted.parameters / sizes["tensor"]
    gathers = (3 if again else 2) * on_the_wire("all-gather", whole, sizes["fsdp"])
    scatters = on_the_wire("reduce-scatter", whole, sizes["fsdp"])
    tokens = counted.tokens_of_device * sizes["tensor"]
    stream = on_the_wire("all-gather", width * tokens * config.model.d_model, sizes["tensor"])
    replicas = sizes["slice"] * sizes["data"]
    sums = on_the_wire("all-reduce", 4 * counted.parameters / (sizes["tensor"] * sizes["fsdp"]), replicas)
    of_micro = gathers + scatters + counted.depth * (5 if again else 4) * stream
    return counted.microbatches * of_micro + sums
