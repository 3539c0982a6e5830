# SPDX-License-Identifier: Apache-2.0
"""What a jax.profiler trace says of the devices: each kernel's time, and which operation of the program it belongs to.

`jax.profiler.ProfileData` gives the events. Where an operation comes from in the code (`op_name`) stands only in the
programs that the trace holds, of which it gives nothing: they are read here from the wire format of protocol buffers.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

METADATA_PLANE = "/host:metadata"
HLO = "Hlo Proto"
"""Name of the statistic that holds a program."""


class Event(NamedTuple):
    """A kernel on a device."""

    device: int
    name: str
    """Of the kernel."""
    op_name: str
    """Of the operation: scopes of the code with slashes; "" where it is not known, as of library calls in a command
    buffer."""
    start: float
    """Nanoseconds."""
    duration: float
    """Nanoseconds."""


def find(folder: Path) -> Path | None:
    """The newest trace under a folder; None where there is none."""
    found = sorted(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def read(path: Path) -> tuple[list[Event], str | None]:
    """The kernels of all devices, and what a device calls itself (None: it does not)."""
    names = op_names(path.read_bytes())
    with warnings.catch_warnings():  # Python's, of types that jaxlib makes
        warnings.simplefilter("ignore", DeprecationWarning)
        return _events(jax.profiler.ProfileData.from_file(str(path)), names)


def _events(data, names: dict[str, dict[str, str]]) -> tuple[list[Event], str | None]:
    events, kind = [], None
    planes = [plane for plane in data.planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for device, plane in enumerate(planes):
        kind = dict(plane.stats).get("gpu_device_name", dict(plane.stats).get("device_type_string", kind))
        for line in plane.lines:
            if not (line.name.startswith("Stream") or line.name == "XLA Ops"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                program = names.get(f"{stats.get('hlo_module')}({stats.get('program_id')})", {})
                op = program.get(_plain(str(stats.get("hlo_op", "")))) or program.get(_plain(event.name), "")
                events.append(Event(device, event.name, op, event.start_ns, event.duration_ns))
    return events, kind


def op_names(trace: bytes) -> dict[str, dict[str, str]]:
    """Of each program in a trace, by its name and number, where its instructions come from, by their kernels' names."""
    names: dict[str, dict[str, str]] = {}
    for plane in _all(trace, 1):
        if _text(plane, 2) != METADATA_PLANE:
            continue
        stat_names = {_number(entry, 1): _text(_first(entry, 2), 2) for entry in _all(plane, 5)}
        for entry in _all(plane, 4):
            program = _first(entry, 2)
            for stat in _all(program, 5):
                if stat_names.get(_number(stat, 1)) == HLO:
                    names[_text(program, 2)] = _of_program(_first(_first(stat, 6), 1))
    return names


def _of_program(module: bytes) -> dict[str, str]:
    instructions = (one for computation in _all(module, 3) for one in _all(computation, 2))
    return {_plain(_text(one, 1)): _text(_first(one, 7), 2) for one in instructions}


def _plain(name: str) -> str:
    """Kernels have underscores where instructions have dots and dashes."""
    return name.replace(".", "_").replace("-", "_")


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: bytes of those with a length, numbers of varints, others as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
        else:
            size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            yield number, message[at : at + size]
            at += size
            continue
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _all(message: bytes, number: int) -> list:
    return [value for found, value in _fields(message) if found == number]


def _first(message: bytes, number: int, default=b""):
    return next((value for found, value in _fields(message) if found == number), default)


def _text(message: bytes, number: int) -> str:
    return _first(message, number).decode("utf-8", "replace")


def _number(message: bytes, number: int) -> int:
    return _first(message, number, 0)
