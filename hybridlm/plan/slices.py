# SPDX-License-Identifier: Apache-2.0
"""Devices by the words that name them: TPU slices (`v5p:8x8x16`, `2xv5e:16x16`), GPUs (`h100:8`), this host's CPU
(`cpu:8`). Described here without any compiler, in the order and with the places that libtpu gives them."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from hybridlm.config.pods import read_topology
from hybridlm.errors import ConfigError, require
from hybridlm.plan.gpu import GPUS, gpu_devices
from pallas_kernels.platform import Peaks, Place, peaks

PLANES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
BOXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
"""Slices of less than a cube of 4 x 4 x 4."""


@dataclass(frozen=True)
class Generation:
    """Of TPUs."""

    kind: str
    """As JAX calls its devices."""
    largest: str
    """Slice."""
    per_chip: int = 1
    """Devices that JAX sees in a chip."""

    @property
    def three(self) -> bool:
        """Whether a slice has three dimensions."""
        return self.largest.count("x") == 2


GENERATIONS = {
    "v5e": Generation("TPU v5 lite", "16x16"),
    "v5p": Generation("TPU v5", "16x16x24"),
    "v6e": Generation("TPU v6 lite", "16x16"),
    "tpu7x": Generation("TPU7x", "16x16x36", per_chip=2),
}
"""As cloud.google.com/tpu/docs names them and their slices."""
GPUS_PER_HOST = 8
MOST_CPUS = 1024
HOST = (2, 2, 1)
"""Chips of a host along the axes of a slice."""
SLICES = r"^\d+x"
"""How many, in front of a name."""
OF_SLICE = 100_000
"""Ids of devices of several slices begin at multiples of it."""


@dataclass(frozen=True)
class Devices:
    """What the words name."""

    words: str
    kind: str
    """As JAX calls a device."""
    count: int
    """JAX devices."""
    hosts: int
    chips: int
    backend: str
    """cpu, gpu or tpu."""

    @property
    def peaks(self) -> Peaks | None:
        """Of one device; None where nothing is known, as of CPUs."""
        return peaks(self.kind) if self.backend != "cpu" else None

    @property
    def chip(self) -> str:
        """Its name among the words: "v5p", "h100", "cpu"."""
        return re.sub(SLICES, "", self.words.partition(":")[0])

    @property
    def domain(self) -> int:
        """Devices that are joined by more than the network: those of a slice, of a host of GPUs."""
        if self.backend == "gpu":
            return GPUS_PER_HOST
        return self.count // (read_topology(self.words).slices if self.backend == "tpu" else 1)

    def described(self) -> list:
        """The devices in JAX's order; nothing can be compiled for them."""
        if self.backend == "cpu":
            return _cpus(self.count)
        if self.backend == "gpu":
            return [Place(i, i // GPUS_PER_HOST, "gpu", self.kind) for i in range(self.count)]
        return _of_slices(self.words)

    def compilable(self) -> list:
        """The devices as a compiler describes them. ConfigError, one line, where it is not installed."""
        if self.backend == "cpu":
            return _cpus(self.count)
        if self.backend == "gpu":
            return gpu_devices(self.words.partition(":")[0], self.hosts, self.count // self.hosts)
        return slice_devices(self.words)


def read_devices(words: str) -> Devices:
    """ConfigError, one line with what there is, for words that name nothing."""
    family, colon, rest = words.partition(":")
    if family in ("cpu", *GPUS):
        require(
            bool(colon) and re.fullmatch(r"[1-9]\d{0,5}", rest) is not None,
            f"topology ({words!r}) must be {family} and a number of devices, as {family}:8",
        )
        count = int(rest)
        if family == "cpu":
            require(count <= MOST_CPUS, f"topology ({words!r}): at most {MOST_CPUS:,} CPU devices")
            return Devices(words, "cpu", count, 1, count, "cpu")
        require(
            count <= GPUS_PER_HOST or count % GPUS_PER_HOST == 0,
            f"topology ({words!r}): hosts have {GPUS_PER_HOST} GPUs, give up to {GPUS_PER_HOST} or a multiple of it",
        )
        return Devices(words, GPUS[family].kind, count, -(-count // GPUS_PER_HOST), count, "gpu")
    name = re.sub(SLICES, "", family)
    known = ", ".join(GENERATIONS)
    require(
        name in GENERATIONS,
        f"topology ({words!r}): no devices named {name!r}: there are {known} with chips along the axes of a slice, as "
        f"v5p:8x8x16 or 2xv5e:16x16, and {', '.join(GPUS)} and cpu with a number, as h100:8",
    )
    try:
        topology = read_topology(words)
    except ConfigError:
        raise ConfigError(f"topology ({words!r}): {_there_are(name)}") from None
    sides = topology.name.partition(":")[2]
    require(_exists(GENERATIONS[name], sides), f"topology ({words!r}): {_there_are(name)}")
    hosts = topology.chips // math.prod(HOST)
    generation = GENERATIONS[name]
    return Devices(words, generation.kind, topology.chips * generation.per_chip, hosts, topology.chips, "tpu")


def slice_devices(words: str) -> list:
    """Devices of described TPU slices as libtpu describes them, in JAX's order. words: "v5p:8x8x16", "2xv5e:16x16".

    ConfigError for words that name none, and where libtpu is not installed.
    """
    read_devices(words)
    topology = read_topology(words)
    require(
        find_spec("libtpu") is not None,
        f"topology ({words!r}) needs the TPU compiler, libtpu, to lower and compile: pip install libtpu, or ask for "
        "--stage counted",
    )
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        with _as_if_alone():
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **several)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()
        raise ConfigError(f"topology ({words!r}): {reason[0] if reason else type(error).__name__}") from error
    return list(described.devices)


@contextlib.contextmanager
def _as_if_alone() -> Iterator[None]:
    """Within, libtpu is told what it would look for on a TPU's host, and complain of where it is none."""
    said = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    added = [name for name in said if name not in os.environ]
    os.environ.update({name: said[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _exists(generation: Generation, sides: str) -> bool:
    if not generation.three:
        return sides in PLANES
    sizes = [int(side) for side in sides.split("x")]
    cubes = len(sizes) == 3 and all(size % 4 == 0 for size in sizes) and sizes == sorted(sizes)
    return sides in BOXES or (cubes and math.prod(sizes) <= _chips(generation.largest))


def _there_are(name: str) -> str:
    generation = GENERATIONS[name]
    if not generation.three:
        return f"slices of {name} are {', '.join(PLANES)}"
    most = _chips(generation.largest)
    return (
        f"slices of {name} are {', '.join(BOXES)}, and multiples of 4, smallest first, as 4x4x8, up to "
        f"{generation.largest} ({most:,} chips)"
    )


def _chips(sides: str) -> int:
    return math.prod(int(side) for side in sides.split("x"))


def _cpus(count: int) -> list:
    devices = jax.devices("cpu")
    require(
        count <= len(devices),
        f"topology ('cpu:{count}'): JAX has {len(devices)} CPU devices here: set JAX_NUM_CPU_DEVICES={count}",
    )
    return devices[:count]


def _of_slices(words: str) -> list[Place]:
    """Host after host, the first axis fastest among hosts and inside them; ids count the first axis fastest, too."""
    topology = read_topology(words)
    generation = GENERATIONS[topology.name.partition(":")[0]]
    sides = [int(side) for side in topology.name.partition(":")[2].split("x")]
    sides += [1] * (3 - len(sides))
    hosts = [side // host for side, host in zip(sides, HOST, strict=True)]
    made = []
    for n, z, y, x in itertools.product(range(topology.slices), *(range(side) for side in reversed(sides))):
        host = x // HOST[0] + hosts[0] * (y // HOST[1] + hosts[1] * (z // HOST[2]))
        for core in range(generation.per_chip):
            within = core + generation.per_chip * (x + sides[0] * (y + sides[1] * z))
            number = within + (OF_SLICE * (n + 1) if topology.slices > 1 else 0)
            made.append(Place(number, n * math.prod(hosts) + host, "tpu", generation.kind, (x, y, z), core, n))
    return sorted(made, key=lambda place: (place.process_index, place.id))
