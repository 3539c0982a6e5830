# SPDX-License-Identifier: Apache-2.0
"""A page that needs nothing beside itself, of the rows of a benchmark: curves over the context, and tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybridlm import page as html
from hybridlm.study.figures import Line, Panel, draw

SHOWN = {"decode": "tokens/s", "prefill": "tokens/s, reading"}
"""Phase -> what its panels show."""


def as_html(title: str, rows: Sequence[Mapping[str, Any]], tables: Iterable[Any], lines: Sequence[str] = ()) -> str:
    """rows: as JSON has them. tables: with title, head, rows of text and notes. lines: below the title."""
    parts = [html.paragraph(line, note=True) for line in lines]
    parts.append(html.figure(html.as_svg(drawing(rows)), "Medians; models took turns in one process."))
    for table in tables:
        parts += [html.heading(table.title), html.table(table.head, table.rows)]
        parts += [html.paragraph(note, note=True) for note in table.notes]
    return html.page(title, *parts)


def drawing(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The curves alone, a matplotlib figure."""
    return draw([*_speed(rows), *_first(rows), *_shares(rows), *_memory(rows)])


def _speed(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """A panel for each phase and batch."""
    found = []
    for phase, what in SHOWN.items():
        of_phase = [row for row in rows if row["phase"] == phase]
        for batch in dict.fromkeys(_batch(row) for row in of_phase):
            here = [row for row in of_phase if _batch(row) == batch]
            lines = _lines(rows, here, "tokens_per_second")
            found.append(Panel("tokens of context", f"{what}, {batch}", lines, log=True, log_y=True))
    return found


def _first(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Seconds of reading, of each batch."""
    read = [row for row in rows if row["phase"] == "prefill"]
    return [
        Panel("tokens of context", f"seconds to the first token, {batch}",
              _lines(rows, [row for row in read if _batch(row) == batch], "seconds"), log=True, log_y=True)
        for batch in dict.fromkeys(_batch(row) for row in read)
    ]  # fmt: skip


def _shares(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """How near writing is to the bound, of each batch."""
    timed = [row for row in rows if row["phase"] == "decode"]
    return [
        Panel("tokens of context", f"share of the bound, {batch}",
              _lines(rows, [row for row in timed if _batch(row) == batch], "share"), log=True)
        for batch in dict.fromkeys(_batch(row) for row in timed)
    ]  # fmt: skip


def _memory(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Weights and cache of one row, counted."""
    single = [row | {"gib": (row["weights"] + row["cache"] / row["batch"]) / 2**30} for row in map(dict, rows)]
    return [Panel("tokens of context", "GiB: weights and the cache of a row", _lines(rows, single, "gib"), log=True)]


def _batch(row: Mapping[str, Any]) -> str:
    return "as many rows as fit" if row["fills"] else f"batch {row['batch']:,}"


def _lines(
    rows: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]], name: str
) -> list[Line]:  # fmt: skip
    """Of each model, in the colour that it has in all panels."""
    names = list(dict.fromkeys(row["config"] for row in rows))
    found = []
    for n, config in enumerate(names):
        points = {row["context"]: row[name] for row in here if row["config"] == config and row[name] is not None}
        if points:
            found.append(Line(sorted(points), [points[x] for x in sorted(points)], config, n, dots=True))
    return found
