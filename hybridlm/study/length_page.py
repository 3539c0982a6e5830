# SPDX-License-Identifier: Apache-2.0
"""The study of lengths as a figure and as a page."""

from collections.abc import Sequence

import numpy as np

from hybridlm import page as html
from hybridlm.page import as_svg
from hybridlm.study.figures import Line, Panel, draw
from hybridlm.study.length import METHODS, Row, as_rows, sentences

ABOUT = (
    "Loss of documents that fill a row, by how many tokens of their document stand before a token. Thin: seeds; bold: "
    "their mean; dotted: the length of the rows in training."
)


def drawn(rows: Sequence[Row], title: str = ""):
    """The matplotlib figure: a panel for each gate, its lines the scalings; where there are several gates, one for each
    scaling, too, its lines the gates."""
    methods = list(dict.fromkeys((row.method, row.tuned) for row in rows))
    kinds = list(dict.fromkeys(row.gate for row in rows))
    colours = {value: n for n, value in enumerate([*methods, *kinds])}
    panels = [
        _panel(f"loss, gate {gate}", [(_word(*m), colours[m], _of(rows, gate, *m)) for m in methods]) for gate in kinds
    ]
    if len(kinds) > 1:
        for method in methods:
            lines = [(f"gate {gate}", colours[gate], _of(rows, gate, *method)) for gate in kinds]
            panels.append(_panel(f"loss, {_word(*method)}", lines))
    return draw(panels, title)


def as_page(rows: Sequence[Row], title: str) -> str:
    """The page."""
    head, cells = as_rows(rows)
    lengths = sorted({(row.trained, row.length) for row in rows})
    read = "; ".join(f"trained at {trained:,} tokens, read to {length:,}" for trained, length in lengths)
    each = [
        [row.run, row.step, row.gate, row.seed, _word(row.method, row.tuned), f"{sum(b.tokens for b in row.buckets):,}"]
        for row in rows
    ]
    return html.page(
        title,
        html.paragraph(read, note=True),
        html.figure(as_svg(drawn(rows)), ABOUT),
        html.heading("From the end of the trained length on"),
        html.table(head, cells, numbers=range(2, len(head))),
        *(html.paragraph(line) for line in sentences(rows)),
        html.heading("What was read"),
        html.table(("run", "step", "gate", "seed", "scaling", "tokens"), each, numbers=(1, 3, 5)),
    )


def _word(method: str, tuned: int) -> str:
    return f"{METHODS[method]}, {tuned} steps" if tuned else METHODS[method]


def _of(rows: Sequence[Row], gate: str, method: str, tuned: int) -> list[Row]:
    return [row for row in rows if (row.gate, row.method, row.tuned) == (gate, method, tuned)]


def _panel(ylabel: str, groups: Sequence[tuple[str, int, list[Row]]]) -> Panel:
    lines = []
    for label, n, rows in groups:
        curves = [({bucket.to: bucket.loss for bucket in row.buckets}) for row in rows]
        if len(curves) > 1:
            lines += [Line(list(curve), list(curve.values()), n=n, bold=False) for curve in curves]
        known = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        means = [float(np.mean([curve[to] for curve in curves])) for to in known]
        lines.append(Line(known, means, label, n, dots=True))
    marks = sorted({row.trained for _, _, rows in groups for row in rows})
    return Panel("tokens of context", ylabel, lines, log=True, marks=marks)
