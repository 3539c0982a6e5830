# SPDX-License-Identifier: Apache-2.0
"""Where the time of a traced run's steps went: by class of work and by place in the model, as text and HTML."""

import html
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybridlm.config import Config
from hybridlm.errors import ConfigError
from hybridlm.plan import xplane
from hybridlm.plan.costs import floors

EXCHANGES = "exchanges"
CLASSES = (
    (EXCHANGES, r"nccl|memcpyp2p|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective|permute"),
    ("kernels", r"mosaic|tpu_custom_call|_kernel$"),
    ("matrix products", r"gemm|nvjet|cublas|cutlass|xmma|convolution|\bdot\b|dot_general"),
    ("copies", r"memcpy|^copy|^wrapped_copy"),
    ("fills", r"memset|broadcast|iota"),
    ("slices and updates", r"slice|gather|scatter|pad"),
    ("reductions", r"reduce"),
    ("conversions", r"convert"),
)
"""Class -> what the names of its kernels look like; the first that fits counts. All else is element-wise."""
ELEMENTWISE = "element-wise"
FLOORS = {"matrix products": "arithmetic", "kernels": "arithmetic", ELEMENTWISE: "element-wise"}
PLACES = ("loss", "unembedding", "embedding", "optimizer", "norm")
"""Named scopes outside of sublayers."""
SUBLAYER = re.compile(r"/([^/]+\.[A-Z]\w*)/(?:shard_map/)?(\w+)")
UNKNOWN = "not known"
COMMAND_BUFFERS = "XLA_FLAGS=--xla_gpu_enable_command_buffer="


@dataclass
class Row:
    """A line of a table; times are of a step and a device."""

    ms: float = 0.0
    runs: float = 0.0
    by_pass: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Milliseconds forward, recomputed and backward."""


@dataclass
class Profile:
    """The tables, and what they are of."""

    title: str
    step_ms: float
    """From the first kernel to the last, over the number of steps."""
    work_ms: float
    """Of all kernels together: more than a step where they run beside each other."""
    busy_ms: float
    """In which a device runs something."""
    exposed_ms: float
    """Of that, in which it runs nothing but exchanges between devices."""
    by_class: dict[str, Row]
    by_place: dict[str, Row]
    floors: dict[str, float]
    """Milliseconds; see `costs.floors`."""


def class_of(kernel: str) -> str:
    """Of what class a kernel's work is, by its name."""
    return next((name for name, looks in CLASSES if re.search(looks, kernel, re.IGNORECASE)), ELEMENTWISE)


def place_of(op_name: str) -> str:
    """`M.Mamba2/scan`: sublayer and piece, or a scope outside of sublayers."""
    if found := SUBLAYER.search(op_name):
        return f"{found[1]}/{found[2]}"
    scopes = re.split(r"[/()]", op_name)
    return next((place for place in PLACES if place in scopes), "between sublayers" if op_name else UNKNOWN)


def pass_of(op_name: str) -> str:
    """Forward, recomputed or backward."""
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"


def profile(folder: Path, config: Config) -> Profile:
    """Of a run with a trace in its folder. ConfigError, one line, where there is none or no device is in it."""
    path = xplane.find(folder / "profile")
    if path is None:
        raise ConfigError(f"{folder} has no trace: train with --run.profile_steps FIRST LAST, as 20 21")
    events, kind = xplane.read(path)
    if not events:
        raise ConfigError(f"the trace {path} has no kernels of a GPU or TPU: CPUs are not traced")
    first, last = config.run.profile_steps or (1, 1)
    return tables(events, kind, config, n_steps=last - first + 1, title=f"{config.name}, steps {first} to {last}")


def tables(events: Sequence[xplane.Event], kind: str | None, config: Config, n_steps: int, title: str) -> Profile:
    """The tables of the events of n_steps steps."""
    n_devices = len({event.device for event in events})
    runs = n_steps * n_devices
    begin, end = min(e.start for e in events), max(e.start + e.duration for e in events)
    busy, alone = (
        _covered(found) / runs / 1e6
        for found in (events, [event for event in events if class_of(event.name) != EXCHANGES])
    )
    known = {name: 1e3 * seconds for name, seconds in floors(config, kind or "", n_devices).items()}
    return Profile(
        title=f"{title}, on {n_devices} x {kind or 'unknown device'}",
        step_ms=(end - begin) / n_steps / 1e6,
        work_ms=sum(event.duration for event in events) / runs / 1e6,
        busy_ms=busy,
        exposed_ms=busy - alone,
        by_class=_summed(events, lambda event: class_of(event.name), runs),
        by_place=_summed(events, lambda event: place_of(event.op_name), runs),
        floors=known,
    )


def _covered(events: Sequence[xplane.Event]) -> float:
    """Nanoseconds of all devices in which at least one of the events runs."""
    total, until, device = 0.0, 0.0, None
    for event in sorted(events, key=lambda event: (event.device, event.start)):
        if event.device != device:
            device, until = event.device, event.start
        end = event.start + event.duration
        total += max(0.0, end - max(event.start, until))
        until = max(until, end)
    return total


def _summed(events: Sequence[xplane.Event], key: Callable[[xplane.Event], str], runs: int) -> dict[str, Row]:
    rows: dict[str, Row] = defaultdict(Row)
    for event in events:
        row, ms = rows[key(event)], event.duration / runs / 1e6
        row.ms, row.runs = row.ms + ms, row.runs + 1 / runs
        row.by_pass[pass_of(event.op_name)] += ms
    return dict(sorted(rows.items(), key=lambda item: -item[1].ms))


def grids(found: Profile) -> list[list[list[str]]]:
    """The two tables as cells, heads first."""
    work, passes = found.work_ms, ("forward", "recomputed", "backward")
    classes = [["class", "ms", "share", "kernels a step", "floor, ms"]]
    for name, row in found.by_class.items():
        floor = found.floors.get(FLOORS.get(name, ""))
        of = " (both)" if FLOORS.get(name) == "arithmetic" else ""
        least = "" if not found.floors else "0" if floor is None else f"{floor:.1f}{of}"
        classes.append([name, f"{row.ms:.2f}", f"{row.ms / work:.1%}", f"{row.runs:.0f}", least])
    places = [["place", "ms", "share", *passes, "floor, ms"]]
    for name, row in found.by_place.items():
        least = f"{found.floors['optimizer']:.1f}" if name == "optimizer" and found.floors else ""
        places.append(
            [name, f"{row.ms:.2f}", f"{row.ms / work:.1%}", *(f"{row.by_pass.get(p, 0.0):.2f}" for p in passes), least]
        )
    return [classes, places]


def _head(found: Profile) -> list[str]:
    lines = [f"{found.title}: {found.step_ms:.1f} ms a step, busy {found.busy_ms / found.step_ms:.1%}"]
    if EXCHANGES in found.by_class:
        exchanged, share = found.by_class[EXCHANGES].ms, found.exposed_ms / found.step_ms
        lines.append(
            f"exchanges between devices: {exchanged:.1f} ms a step, {found.exposed_ms:.1f} of them ({share:.1%} of the "
            "step) with nothing else running"
        )
    unknown = found.by_place.get(UNKNOWN, Row()).ms / found.work_ms
    if unknown > 0.1:
        lines.append(
            f"{unknown:.0%} of the time is of kernels without a place: trace with {COMMAND_BUFFERS} to see them"
        )
    return lines


def as_text(found: Profile) -> str:
    """Both tables, columns aligned."""
    lines = _head(found)
    for grid in grids(found):
        widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
        lines.append("")
        lines += [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
            ).rstrip()
            for row in grid
        ]
    return "\n".join(lines)


def as_html(found: Profile) -> str:
    """Both tables as a page of its own."""
    style = (
        "body{font:14px sans-serif;margin:2em}td,th{padding:2px 12px;text-align:right}td:first-child{text-align:left}"
    )
    parts = [f"<!doctype html><meta charset=utf-8><title>{html.escape(found.title)}</title><style>{style}</style>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in _head(found)]
    for head, *rows in grids(found):
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        parts.append(f"<table><tr>{cells}</tr>{body}</table>")
    return "\n".join(parts) + "\n"
