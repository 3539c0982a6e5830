# SPDX-License-Identifier: Apache-2.0
"""A run as a page in its folder: curves, speed, events, samples, config."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hybridlm import page as html
from hybridlm import storage
from hybridlm.config import Config
from hybridlm.errors import cut
from hybridlm.page import as_svg
from hybridlm.study.curves import AXES, train_curve, val_curve
from hybridlm.study.figures import Line, Panel, draw
from hybridlm.study.probed import of_run
from hybridlm.study.reading import Run, read_run
from hybridlm.study.survey import COLUMNS, cells
from hybridlm.train.progress import clock

NAME = "report.html"
SAMPLE_BYTES = 100_000
"""Most of a sample that the page takes."""
BESIDE = {
    "tokens_per_second": "tokens a second",
    "mfu": "MFU",
    "data_wait": "share of time waiting for data",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
}
"""What is drawn beside the losses, where it was recorded."""
OF_A_SET = "bits_per_byte/"
"""Before the name of a held-out set, where there are several."""
MANY = ("train", "val", "probe", "inspect", "save")
"""Kinds of records that are no events of their own row."""
EVENTS = 200
"""Most rows of events: the last ones."""


def write_report(folder: Path, like: Config | None = None, ours: bool = False) -> Path:
    """Writes report.html into a run's folder, whole or not at all; its path. like, ours: see read_run.

    ConfigError, RunError or OSError, one line, where the run cannot be read or the page not be written.
    """
    target = folder / NAME
    storage.write_bytes(target, as_page(read_run(folder, like, ours)).encode("utf-8", "backslashreplace"))
    return target


def as_page(run: Run) -> str:
    """The page of a run."""
    name = str(run.config.get("name", run.path.name))
    return html.page(
        f"{name}: {run.state.word}" if run.state.word != "running" else name,
        html.paragraph(f"{run.path}" + (f", {run.state.why}" if run.state.why else ""), note=True),
        html.table(COLUMNS[1:], [cells(run, name)[1:]], numbers=range(1, len(COLUMNS) - 1)),
        html.heading("Curves"),
        html.figure(
            as_svg(draw(_panels(run))), "Dotted: it went back to this step." if run.of_kind("rollback") else ""
        ),
        *of_run(run),
        html.heading("Events"),
        *_events(run),
        *_samples(run.path),
        html.heading("Config"),
        *_started(run),
        html.config_part(run.config),
    )


def _panels(run: Run) -> list[Panel]:
    """Loss in bits per byte, as in loss.png; speed; what the optimizer did."""
    train = train_curve(run)
    val = val_curve(run, train)
    back = sorted({record["step"] for record in run.of_kind("rollback")})
    losses = [
        Line(*train.over("step", "bits_per_byte"), "training"),
        Line(*val.over("step", "bits_per_byte"), "validation", 1, dots=True),
    ]
    sets = [name for name in val.values if name.startswith(OF_A_SET)]
    losses += [
        Line(*val.over("step", name), name.removeprefix(OF_A_SET), n, dots=True) for n, name in enumerate(sets, start=2)
    ]
    panels = [Panel(AXES["step"], "bits per byte", losses, marks=back)]
    for n, (name, words) in enumerate(BESIDE.items(), start=2):
        if name in train.values:
            panels.append(Panel(AXES["step"], words, [Line(*train.over("step", name), n=n)], marks=back))
    return panels


def _events(run: Run) -> list[html.Markup]:
    """What happened, in order; saves are counted."""
    events = [record for record in run.records if record["kind"] not in MANY]
    saves = run.of_kind("save")
    parts = []
    if saves:
        seconds = [r["seconds"] for r in saves if isinstance(r.get("seconds"), int | float)]
        middle = f", {np.median(seconds):.2f} s each" if seconds else ""
        parts.append(html.paragraph(f"checkpoints written: {len(saves)}{middle}; kept: {_steps(run.checkpoints)}"))
    if len(events) > EVENTS:
        parts.append(html.paragraph(f"the last {EVENTS} of {len(events)}", note=True))
    rows = [[record["step"], record["kind"], _told(record)] for record in events[-EVENTS:]]
    parts.append(html.table(("step", "event", ""), rows, numbers=(0,)))
    return parts


def _steps(steps: list[int]) -> str:
    return f"steps {', '.join(map(str, steps))}" if steps else "none"


def _told(record: Mapping) -> str:
    """An event in words."""
    match record["kind"]:
        case "start":
            return f"{record.get('time', '')} on {record.get('host', '?')}: {record.get('devices', '?')}"
        case "config":
            changed = record.get("changed")
            pairs = changed.items() if isinstance(changed, Mapping) else ()
            return "; ".join(f"{key} {_pair(values)}" for key, values in pairs)
        case "end":
            seconds = record.get("seconds")
            return f"after {clock(seconds)}" if isinstance(seconds, int | float) else ""
    return ", ".join(f"{name} {_value(value)}" for name, value in record.items() if name not in ("kind", "step"))


def _pair(values) -> str:
    return (
        f"{_value(values[0])} -> {_value(values[1])}" if isinstance(values, list) and len(values) == 2 else str(values)
    )


def _value(value) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return cut(text, 300)


def _samples(folder: Path) -> list[html.Markup]:
    """The text that the model wrote after the last step, whatever bytes that is."""
    path = folder / "sample.txt"
    try:
        size = storage.size(path)
        content = storage.read_range(path, 0, min(size, SAMPLE_BYTES))
    except OSError:
        return []
    parts = [html.heading("Sample"), html.preformatted(bytes(content).decode("utf-8", "replace"))]
    if size > SAMPLE_BYTES:
        parts.append(html.paragraph(f"the first {SAMPLE_BYTES} of {size} bytes", note=True))
    return parts


def _started(run: Run) -> list[html.Markup]:
    """How it was started last: the command and what it ran on."""
    starts = run.of_kind("start")
    if not starts:
        return []
    last = starts[-1]
    rows = [(name, last[name]) for name in ("command", "host", "devices", "commit") if last.get(name)]
    for name in ("mesh", "versions"):
        if isinstance(last.get(name), Mapping) and last[name]:
            rows.append((name, ", ".join(f"{key} {value}" for key, value in last[name].items())))
    return [html.table(("last start", ""), rows)]
