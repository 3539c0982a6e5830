# SPDX-License-Identifier: Apache-2.0
"""The train state split over replicas: each device keeps and updates a share of what all of them compute with.

Devices along `data` compute with the same weights. Where the state is split they keep a share of the parameters and of
the optimizer's moments each: sums of gradients are scattered, not added up everywhere, a device updates its share, and
weights are put together once a step, in the type of the computation. As much is exchanged as by adding sums up (Shoeybi
et al. 2019, Megatron-LM, its distributed optimizer; Rajbhandari et al. 2020, ZeRO, its first two stages).

Matrices are split along the first dim that their products contract, tables over the vocabulary by rows: along outer
dims, so that shares lie in memory as the whole does, beside whatever else splits them. All else is small, and whole.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridlm.config import Config
from hybridlm.errors import require
from hybridlm.layers.params import ParamInfo, contracted_axes
from hybridlm.optim.rules import is_elementwise
from hybridlm.sharding import param_shardings
from pallas_kernels.platform import platform_of

REPLICAS = "data"
"""The mesh axis along which weights are the same."""
PLATFORMS = {"gpu"}
"""Platforms on which `optim.split_over_data` is so where it is None, within one process."""


def splits_state(config: Config, mesh: Mesh) -> bool:
    """`optim.split_over_data` as it is, or as the devices of the mesh have it where it is None; never of one replica.

    ConfigError where it is asked for and cannot be.
    """
    asked = config.optim.split_over_data
    if asked is False or mesh.shape.get(REPLICAS, 1) == 1:
        return False
    why = why_not(config, mesh)
    require(not asked or why is None, f"optim.split_over_data (True): {why}")
    devices = mesh.devices.flat
    here = platform_of(devices[0]) in PLATFORMS and len({device.process_index for device in devices}) == 1
    return why is None and (here if asked is None else asked)


def why_not(config: Config, mesh: Mesh) -> str | None:
    """Why the state cannot be split over replicas; None where it can."""
    rule = config.optim.rule
    if not is_elementwise(rule):
        return f"optim.rule ({type(rule).__name__}) does not update every number by itself"
    if config.lora.on:
        return "adapters (lora) are small: each device has all of them"
    if mesh.shape.get("slice", 1) > 1:
        return f"mesh.slice ({mesh.shape['slice']}) must be 1: slices sum gradients by themselves"
    return None


def share_dim(leaf: ParamInfo, at: NamedSharding) -> int | None:
    """The dim of a parameter along which replicas have shares; None: it is whole. at: how it is split without them."""
    if leaf.kind not in ("matrix", "embedding") or leaf.exact:
        return None
    dim = contracted_axes(leaf)[0] if leaf.kind == "matrix" else int(leaf.stacked)
    shares = math.prod(at.mesh.shape[axis] for axis in (*_axes(at, dim), REPLICAS))
    return None if leaf.shape[dim] % shares else dim


def share_shardings(info, mesh: Mesh):
    """`param_shardings` with parameters split over replicas, too."""

    def sharding(leaf: ParamInfo, at: NamedSharding) -> NamedSharding:
        dim = share_dim(leaf, at)
        if dim is None:
            return at
        entries = [_axes(at, i) or None for i in range(len(leaf.shape))]
        entries[dim] = (*_axes(at, dim), REPLICAS)
        return NamedSharding(mesh, P(*entries))

    return jax.tree.map(sharding, info, param_shardings(info, mesh))


def _axes(at: NamedSharding, dim: int) -> tuple[str, ...]:
    """The mesh axes that split a dim."""
    entry = at.spec[dim] if dim < len(at.spec) else None
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
