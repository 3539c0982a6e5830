# SPDX-License-Identifier: Apache-2.0
"""Runs beside each other: their losses over tokens, time and FLOPs, their last numbers, and what differs in them."""

from collections.abc import Sequence

import numpy as np

from hybridlm import page as html
from hybridlm.page import as_svg
from hybridlm.study.curves import AXES, train_curve, val_curve
from hybridlm.study.differences import differences, shown
from hybridlm.study.figures import Line, Panel, colour, draw
from hybridlm.study.reading import Run
from hybridlm.study.survey import COLUMNS, cells, labels
from hybridlm.train.progress import clock, short

OVER = ("tokens", "seconds", "flops")
OF_TOKENS = ("data.tokenizer", "model.vocab_size")
"""Where these differ, so do tokens: losses of a token cannot be compared, those of a byte can."""


def measure(runs: Sequence[Run]) -> str:
    """What is drawn of them: `loss`, or `bits_per_byte` where their tokens are not the same."""
    differ = differences([run.config for run in runs])
    return "bits_per_byte" if any(name in differ for name in OF_TOKENS) else "loss"


def comparison(runs: Sequence[Run], title: str = ""):
    """The matplotlib figure."""
    name = measure(runs)
    word = {"loss": "loss, nats a token", "bits_per_byte": "bits per byte"}[name]
    curves = [(train, val_curve(run, train)) for run in runs for train in (train_curve(run),)]
    unit, seconds = _unit(max((train.seconds[-1] for train, _ in curves if len(train.seconds)), default=0.0))
    panels = []
    for axis in OVER:
        lines, scale = [], seconds if axis == "seconds" else 1.0
        for n, (label, (train, val)) in enumerate(zip(labels([run.path for run in runs]), curves)):
            (x, y), (x_val, y_val) = train.over(axis, name), val.over(axis, name)
            lines.append(Line(x / scale, y, "" if len(x_val) else label, n, bold=not len(x_val)))
            lines.append(Line(x_val / scale, y_val, label, n, dots=True))
        panels.append(Panel(unit if axis == "seconds" else AXES[axis], word, lines, log=True))
    return draw(panels, title)


def _unit(longest: float) -> tuple[str, float]:
    """(word, seconds) of the unit that so many seconds are told in."""
    return next((pair for pair in (("hours", 3600.0), ("minutes", 60.0)) if longest >= 3 * pair[1]), ("seconds", 1.0))


def as_page(runs: Sequence[Run], title: str = "Runs compared") -> str:
    """The page."""
    names = labels([run.path for run in runs])
    keys = [html.key(colour(n), name) for n, name in enumerate(names)]
    rows = [[key, *cells(run, name)[1:], *_cost(run)] for key, run, name in zip(keys, runs, names)]
    head = [*COLUMNS, "time", "FLOPs"]
    differ = differences([run.config for run in runs])
    states = [f"{name}: {run.state.word}: {run.state.why}" for name, run in zip(names, runs) if run.state.why]
    drawn = (
        "Thin: training, means of the intervals between records; bold: validation. Time is that of the steps, without "
        "start-up, evaluations and saves. Each step counts once, as it was taken last."
    )
    parts = [
        html.figure(as_svg(comparison(runs)), drawn),
        html.heading("Where they stand"),
        html.table(head, rows, numbers=range(2, len(head))),
        *(html.paragraph(line, note=True) for line in states),
        *_sets(runs, keys),
        html.heading("In what their configs differ"),
    ]
    if differ:
        across = [[key, *(shown(value, 200) for value in values)] for key, values in differ.items()]
        parts.append(html.table(["", *keys], across))
    else:
        parts.append(html.paragraph("in nothing but names and folders"))
    return html.page(title, *parts)


def _sets(runs: Sequence[Run], keys: Sequence[html.Markup]) -> list[html.Markup]:
    """The last loss and bits per byte of each held-out set, where runs have several."""
    names = [name for run in runs for record in run.of_kind("val") for name in record if "/" in name]
    rows = []
    for name in dict.fromkeys(names):
        values = [run.last("val", name) for run in runs]
        rows.append([name, *("-" if value is None else f"{value:.4f}" for value in values)])
    if not rows:
        return []
    return [html.heading("By held-out set"), html.table(["", *keys], rows, numbers=range(1, len(keys) + 1))]


def _cost(run: Run) -> list[str]:
    curve = train_curve(run)
    last = lambda values: values[-1] if len(values) and np.isfinite(values[-1]) else None
    seconds, flops = last(curve.seconds), last(curve.flops)
    return ["-" if seconds is None else clock(seconds), "-" if flops is None else short_flops(flops)]


def short_flops(number: float) -> str:
    """1.23e18; 45.6T below that."""
    return f"{number:.3g}" if number >= 1e15 else short(number)
