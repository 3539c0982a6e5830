# SPDX-License-Identifier: Apache-2.0
"""What a program is lowered for: a platform, and perhaps which device of it."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax

from hybridlm.errors import require
from pallas_kernels import platform

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
"""As JAX's exports name them -> as ops do."""
BEFORE_KERNELS = "8.0"
"""Compute capability that a program for any CUDA device is traced for: no kernel is written for it."""
TPUS = {"v4i": "TPU v4 lite", "7x": "TPU7x"}
"""Generation -> what JAX calls the device, where that is not TPU and the generation."""
CORES = {"v4": 2, "v5p": 2}
"""Generation -> cores of a device, where that is not 1."""
_tracing_for = jax.make_user_context("")


@dataclass(frozen=True)
class Target:
    """A platform for which programs are lowered."""

    name: str
    """As typed: cpu, cuda, cuda:9.0, tpu, tpu:v5e."""

    @property
    def platform(self) -> str:
        """As `jax.export` names it."""
        return self.name.partition(":")[0]

    @property
    def device(self) -> str | None:
        """Compute capability or TPU generation; None: any."""
        return self.name.partition(":")[2] or None

    @contextlib.contextmanager
    def assumed(self) -> Iterator[None]:
        """Within, calls are traced for it, those too that were traced for another platform before."""
        kind = PLATFORMS[self.platform]
        capability = (self.device or BEFORE_KERNELS) if kind == "gpu" else None
        generation = self.device if kind == "tpu" else None
        assumed = platform.assume_platform(kind, generation=generation, capability=capability)
        with assumed, _tracing_for(self.name), _at(generation):
            yield


def _at(generation: str | None) -> contextlib.AbstractContextManager:
    """Within, JAX lowers kernels for such a TPU, which need not be there. None: nothing changes."""
    if generation is None:
        return contextlib.nullcontext()
    kind, cores = TPUS.get(generation, f"TPU {generation}"), CORES.get(generation, 1)
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def targets(names: Sequence[str]) -> list[Target]:
    """Of words, each once. ConfigError for a platform or device that is not known."""
    require(not isinstance(names, str) and len(names) > 0, f"platforms ({names!r}) must be a list of names")
    for name in names:
        kind, colon, device = name.partition(":")
        known = kind in PLATFORMS
        require(
            known, f"platforms ({name}) not one of {', '.join(PLATFORMS)}, perhaps with a device: cuda:9.0, tpu:v5e"
        )
        fits = not colon or (kind == "cuda" and re.fullmatch(r"\d{1,2}\.\d", device) is not None)
        fits = fits or (kind == "tpu" and device in platform.GENERATIONS)
        expected = {
            "cpu": "no device behind cpu", "cuda": "a compute capability, as cuda:9.0",
            "tpu": f"a generation: {', '.join(platform.GENERATIONS)}",
        }  # fmt: skip
        require(fits, f"platforms ({name}): expected {expected.get(kind)}")
    return [Target(name) for name in dict.fromkeys(names)]
