# SPDX-License-Identifier: Apache-2.0
"""What calls are compiled for and what it can do: the only reader of the platform. Asked while a call is traced."""

import contextlib
import dataclasses
import functools
import os
import typing
from collections.abc import Iterable

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
GENERATIONS = ("v2", "v3", "v4", "v4i", "v5e", "v5p", "v6e", "7x")  # of TPUs, as JAX names them

HOW_TO_NAME_IT = "name it by assume_platform('tpu', generation='v5e') or set a mesh of its devices (jax.set_mesh)"
H100_MULTIPROCESSORS = 132  # of the SXM part, for which kernels are compiled where no GPU is at hand


class Peaks(typing.NamedTuple):
    """Of one JAX device, as data sheets have it; None: not looked up, and nothing is planned for such a device."""

    tflops: float
    """Dense bfloat16 TFLOP/s."""
    gbs: float
    """GB/s of its memory."""
    gib: float | None = None
    """GiB of its memory."""
    links_gbs: float | None = None
    """GB/s that it sends, one way, over all its links to devices of its slice (ICI) or host (NVLink)."""
    links: int | None = None
    """Those links: two along each dimension of a torus; 1 where a switch joins all with all."""
    network_gbs: float | None = None
    """GB/s that it sends, one way, to other slices or hosts."""


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x: "bidirectional ICI bandwidth per chip" counts both ways and
# is halved here; "DCN bandwidth per chip", or per pod over its chips, in bits. A TPU7x chip shows as two devices, each
# with half of its 2,307 TFLOP/s, 7,380 GB/s, 192 GiB and links. GPUs: NVIDIA's data sheets, the SXM part with the most
# memory unless named, GiB as the driver reports them, and a 400 Gbit/s adapter for each as in a DGX.
_V5E = Peaks(197.0, 819.0, 16.0, 200.0, 4, 3.125)
_V5P = Peaks(459.0, 2765.0, 95.0, 600.0, 6, 6.25)
_V6E = Peaks(918.0, 1640.0, 32.0, 400.0, 4, 12.5)
_7X = Peaks(1153.5, 3690.0, 96.0, 300.0, 6, 6.25)
PEAKS = {
    "TPU v4": Peaks(275.0, 1228.0),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5p": _V5P,
    "TPU v5": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _7X,
    "TPU v7x": _7X,
    "A100": Peaks(312.0, 2039.0),
    "H100 PCIe": Peaks(756.0, 2039.0),
    "H100 NVL": Peaks(835.0, 3938.0),
    "H100": Peaks(989.4, 3350.0, 79.1, 450.0, 1, 50.0),
    "GH200": Peaks(989.4, 4000.0),
    "H200 NVL": Peaks(835.0, 4800.0),
    "H200": Peaks(989.4, 4800.0, 139.8, 450.0, 1, 50.0),
    "GB200": Peaks(2500.0, 8000.0),
    "GB300": Peaks(2500.0, 8000.0),
    "B200": Peaks(2250.0, 8000.0),
    "B300": Peaks(2250.0, 8000.0),
    "L40S": Peaks(362.0, 864.0),
    "L4": Peaks(121.0, 300.0),
}
"""By words of a device's kind."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A device that is only described, as meshes and shardings see one; nothing can be compiled for it."""

    id: int
    process_index: int
    platform: str
    device_kind: str
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    slice_index: int = 0

    @property
    def client(self) -> "Nobody":
        """JAX asks whether a sharding with a kind of memory is of devices at hand."""
        return Nobody()


class Nobody:
    """The process of devices that no process has."""

    def process_index(self) -> int:
        """No number of a process."""
        return -1


class TpuChip(typing.NamedTuple):
    """What kernels ask of a TPU."""

    generation: str  # "v5e", "v5p", "v6e", ...
    cores: int  # that share a kernel's parallel grid: 2 on v4 and v5p
    matrix_unit: int  # columns of a matrix unit: 128, or 256 from v6e on


@dataclasses.dataclass(frozen=True)
class _Assumed:
    platform: str
    generation: str | None = None
    capability: str | None = None
    multiprocessors: int | None = None


_assumed: list[_Assumed] = []


@contextlib.contextmanager
def assume_platform(
    name: str,
    *,
    generation: str | None = None,
    capability: str | None = None,
    multiprocessors: int | None = None,
):
    """Within, calls are traced for another platform than the one at hand, e.g. to compile for a TPU that is not there.

    Args:
      name: "cpu", "gpu" or "tpu".
      generation: of a TPU, "v5e", "v5p", "v6e", ...; kernels take their block sizes from it. Not needed where a mesh
        of such devices is set (`jax.set_mesh`).
      capability: compute capability of an NVIDIA GPU, e.g. "9.0"; None is that of the GPU at hand, or any.
      multiprocessors: of that GPU; None is those of the GPU at hand, or an H100's 132.

    A function that `jax.jit` has traced already is not traced again for another platform. Raises ValueError for
    unknown names and for facts of another platform.
    """
    if name not in PLATFORMS:
        raise ValueError(f"name ({name!r}) not one of {', '.join(PLATFORMS)}")
    if generation is not None and (name != "tpu" or generation not in GENERATIONS):
        raise ValueError(f"generation ({generation!r}) of a {name!r}, expected of a tpu: {', '.join(GENERATIONS)}")
    for what, value in (("capability", capability), ("multiprocessors", multiprocessors)):
        if value is not None and name != "gpu":
            raise ValueError(f"{what} ({value!r}) of a {name!r}: expected of a gpu alone")
    _assumed.append(_Assumed(name, generation, capability, multiprocessors))
    try:
        yield
    finally:
        _assumed.pop()


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what `assume_platform` says, else the platform of the default device."""
    return _assumed[-1].platform if _assumed else default_device_platform()


def default_device_platform() -> str:
    """Platform of the default device, whatever is assumed: "cpu", "gpu" or "tpu"."""
    flags: typing.Any = jax.config  # whose values its type does not name
    device = flags.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    name = name.split(":")[0].lower()
    return "gpu" if name in ("cuda", "rocm") else name


def platform_of(device: jax.Device) -> str:
    """ "cpu", "gpu" or "tpu": of a device, at hand or described."""
    return "gpu" if device.platform in ("cuda", "rocm") else device.platform


def device_name() -> str:
    """The default device's kind, as JAX names it."""
    return _device().device_kind


def compiled_by(device: jax.Device) -> tuple:
    """Platform, and all else of a device at hand that decides whether a program compiled for it can be run: its kind
    and number, the version of what compiles and runs, and for a CPU what it can do."""
    facts = (getattr(device, "compute_capability", None), getattr(device, "core_count", None))
    version, can = device.client.platform_version, ""
    if platform_of(device) == "cpu":
        with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            can = next((line for line in file if line.startswith(("flags", "Features"))), "")
    return (platform_of(device), device.device_kind, device.id, version, *facts, can)


def memory() -> int | None:
    """Bytes that the default device can give to arrays, a CPU's those of its host; None where it does not say."""
    return memory_of([_device()])


def memory_of(devices: Iterable[jax.Device]) -> int | None:
    """Bytes that devices at hand can give to arrays in all, as one of each of their hosts says; None where it does not,
    or they are described."""
    devices = list(devices)
    here = [device for device in devices if device.process_index == jax.process_index()]
    if not here or not hasattr(here[0], "memory_stats"):
        return None
    if platform_of(here[0]) == "cpu":
        return _host_memory() * len({device.process_index for device in devices})
    try:
        limit = (here[0].memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device of a topology
        return None
    return None if limit is None else limit * len(devices)


class InUse(typing.NamedTuple):
    """Bytes of a device's memory that arrays have."""

    now: int
    peak: int
    """The most since this process began."""


def memory_in_use() -> InUse | None:
    """Of the default device, as it says; None where it does not, as CPUs do not."""
    said = _device().memory_stats() or {}
    return InUse(said["bytes_in_use"], said["peak_bytes_in_use"]) if "peak_bytes_in_use" in said else None


@functools.cache
def _host_memory() -> int:
    """Bytes of this host's memory, or what its control group may have of it."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(f"/sys/fs/cgroup/{name}", encoding="ascii") as file:
            sizes.append(int(file.read()))
    return min(sizes)


def peaks(kind: str | None = None) -> Peaks | None:
    """Of a device kind (None: the default device's); None where it is not in the table. The longest name that fits."""
    words = f" {(device_name() if kind is None else kind).replace('-', ' ')} "
    fitting = [name for name in PEAKS if f" {name} " in words]
    return PEAKS[max(fitting, key=len)] if fitting else None


def peaks_of(device: jax.Device) -> Peaks | None:
    """`peaks` of a device, at hand or described."""
    return peaks(device.device_kind)


def tpu_generation() -> str | None:
    """ "v5e", "v5p", "v6e", ...: what is assumed, else that of the mesh's devices or the default one; None: unknown."""
    if _assumed and _assumed[-1].generation:
        return _assumed[-1].generation
    from jax.experimental.pallas import tpu as pltpu

    return str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else None


def torus_side(n_devices: int) -> int:
    """Devices along the last dimension, the longest, of a TPU slice of n_devices, a power of two.

    Slices of v5e and v6e are planes, others have three dimensions; their sides differ by a factor of two at most. A
    chip of TPU7x is two devices, the innermost.
    """
    generation = tpu_generation()
    dims, per_chip = 2 if generation in ("v2", "v3", "v5e", "v6e") else 3, 2 if generation == "7x" else 1
    doublings = (n_devices // per_chip).bit_length() - 1
    return per_chip * 2 ** -(-doublings // dims)


def tpu_chip() -> TpuChip | None:
    """The TPU that a kernel is compiled for; None where it is interpreted on another platform.

    Raises ValueError where that is a TPU of which nothing is known: neither assumed, nor a mesh's, nor there.
    """
    from jax.experimental.pallas import tpu as pltpu

    if _assumed and (generation := _assumed[-1].generation):
        chip = next(version for version in pltpu.ChipVersion if str(version) == generation)
        info = pltpu.get_tpu_info_for_chip(chip, 2 if chip.supports_megacore else 1)
    elif pltpu.is_tpu_device():
        info = pltpu.get_tpu_info()
    elif platform() == "tpu":
        raise ValueError(f"generation of the TPU unknown: {HOW_TO_NAME_IT}")
    else:
        return None
    return TpuChip(str(info.chip_version), info.num_cores, info.mxu_column_size)


def gpu_capability() -> str | None:
    """Compute capability, "9.0" for Hopper: what is assumed, else the default device's; None where it is no GPU."""
    if _assumed and _assumed[-1].capability:
        return _assumed[-1].capability
    capability = getattr(_device(), "compute_capability", None)
    return None if capability is None else str(capability)


def multiprocessors() -> int:
    """Of the GPU that a kernel is compiled for: what is assumed, else the default device's, else an H100's."""
    if _assumed and _assumed[-1].multiprocessors:
        return _assumed[-1].multiprocessors
    return _device().core_count if default_device_platform() == "gpu" else H100_MULTIPROCESSORS


def _device():
    """The default device."""
    device = jax.config.jax_default_device
    return device if hasattr(device, "device_kind") else jax.local_devices(backend=device)[0]
