# SPDX-License-Identifier: Apache-2.0
"""The train step of a config on a described slice: traced, lowered and compiled with no device at hand."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from hybridlm.config import Config
from hybridlm.config.mesh import check_config
from hybridlm.sharding import make_mesh
from hybridlm.train.step import Program, make_program
from pallas_kernels import platform

BATCH = ("tokens", "targets", "segment_ids", "positions")
"""Arrays of a batch, each int32 [B, T]."""


@dataclass(frozen=True)
class Described:
    """A run's programs on devices that may be only described; use within `described`."""

    config: Config
    mesh: Mesh
    program: Program

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a batch."""
        shape = (self.config.data.batch_size, self.config.data.seq_len)
        like = jax.ShapeDtypeStruct(shape, "int32", sharding=self.program.batch_sharding)
        return dict.fromkeys(BATCH, like)

    def trace(self) -> jax.stages.Traced:
        """The train step, traced."""
        step: Any = self.program.train_step
        return step.trace(self.program.state_like, self.batch())


@contextlib.contextmanager
def described(config: Config, devices: list) -> Iterator[Described]:
    """The run on these devices: within, its programs can be traced, lowered and compiled for them.

    ConfigError where the mesh does not fit the devices, or the config the mesh.
    """
    mesh = make_mesh(config.mesh, devices)
    check_config(config, mesh)
    with jax.set_mesh(mesh), platform.assume_platform(platform.platform_of(devices[0])):
        yield Described(config, mesh, make_program(config, mesh))
