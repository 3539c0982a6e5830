# SPDX-License-Identifier: Apache-2.0
"""Pods by name, and what of a config is set for one: `hybrid_8b:v5p:8x8x16`, `hybrid_1b:2xv5e:16x16`."""

import re
from dataclasses import dataclass, replace

from hybridlm.config import Config
from hybridlm.errors import require
from hybridlm.sharding import MeshConfig


@dataclass(frozen=True)
class Topology:
    """Slices of TPU chips as Cloud TPU and libtpu name them."""

    name: str
    """Generation and chips along the axes of a slice, v5p:8x8x16."""
    slices: int = 1
    """How many of them, which a slower network joins."""

    @property
    def chips(self) -> int:
        """Of all slices. A chip of tpu7x is two devices, one of the others is one."""
        count = self.slices
        for size in self.name.partition(":")[2].split("x"):
            count *= int(size)
        return count

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * (2 if self.name.startswith("tpu7x:") else 1)

    def __str__(self):
        return self.name if self.slices == 1 else f"{self.slices}x{self.name}"


def read_topology(words: str) -> Topology:
    """`v5p:8x8x16`, or `2xv5e:16x16` for two slices. ConfigError for other words."""
    match = re.fullmatch(r"(?:([1-9]\d*)x)?((?:v\d+[a-z]*|tpu\d+[a-z]*):[1-9]\d*(?:x[1-9]\d*){1,2})", words)
    require(match is not None, f"topology ({words!r}) must be GENERATION:CHIPSxCHIPS as v5p:8x8x16, or 2xv5e:16x16")
    assert match is not None
    return Topology(match[2], int(match[1] or 1))


@dataclass(frozen=True)
class Pod:
    """What of a config is set for a pod: how devices share the work, which rows are a step, what is recomputed."""

    mesh: MeshConfig
    """The mesh over all of its devices."""
    batch_size: int
    """Rows of an optimizer step."""
    accumulate: int = 1
    """Microbatches that they are cut into."""
    remat: str | None = None
    """What the backward recomputes; None: as the config has it."""

    def set_in(self, config: Config) -> Config:
        """The config for this pod."""
        return replace(
            config,
            mesh=self.mesh,
            data=replace(config.data, batch_size=self.batch_size),
            optim=replace(config.optim, accumulate=self.accumulate),
            model=config.model if self.remat is None else replace(config.model, remat=self.remat),
        )
