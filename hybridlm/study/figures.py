# SPDX-License-Identifier: Apache-2.0
"""Curves in panels side by side, as SVG for a page and as PNG for a file. The same curves give the same bytes."""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing

from hybridlm.page import as_svg, quiet, visible

WIDTH, HEIGHT = 4.6, 3.4
"""Of a panel, inches."""
LETTER, MARK = 0.07, 0.6
"""Of a legend, inches: the width of a letter, and of a line's mark with the space around it."""
POINTS = 500
"""Most points of a line: of more, the means of as many stretches are drawn."""
COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#c2185b", "#7b52ab", "#8c564b", "#17a2b8", "#7f7f7f", "#b8a000", "#000000")
DASHES = ("-", "--", ":", "-.")
CELLS = 11
"""Most columns and rows of a map whose cells have numbers, and most labels of its columns."""


@dataclass(frozen=True)
class Line:
    """One curve: as many x as y."""

    x: np.typing.ArrayLike
    y: np.typing.ArrayLike
    label: str = ""
    """In the legend; empty: not there."""
    n: int = 0
    """The n-th colour, from 0; behind the last colour they come again, dashed."""
    bold: bool = True
    dots: bool = False
    dotted: bool = False
    between: tuple[np.typing.ArrayLike, np.typing.ArrayLike] | None = None
    """The lowest and the highest value at each x, drawn as a bar; of a line with at most POINTS points."""


@dataclass(frozen=True)
class Panel:
    """Axes with curves."""

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    log: bool = False
    """The x axis is logarithmic."""
    marks: Sequence[float] = field(default=())
    """Places on the x axis at which something happened."""
    log_y: bool = False
    """The y axis is logarithmic."""


@dataclass(frozen=True)
class Grid:
    """A map: numbers from 0 to 1 by column and row, the first row at the top."""

    title: str
    xlabel: str
    ylabel: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: np.ndarray
    """[rows, columns]; NaN where there is none."""


def colour(n: int) -> str:
    """That of the n-th curve."""
    return COLOURS[n % len(COLOURS)]


def draw(panels: Sequence[Panel], title: str = "", columns: int = 3):
    """A matplotlib figure of the panels, `columns` of them in a row, with one legend for all.

    A panel whose lines have no point says so.
    """
    with _side_by_side(panels, columns, _fill) as figure:
        known: dict[str, object] = {}
        for place in figure.axes:
            for handle in place.get_lines():
                label = str(handle.get_label())
                if not label.startswith("_"):
                    known.setdefault(label, handle)
        if known:
            longest = max(map(len, known))
            fitting = int(figure.get_figwidth() / (LETTER * longest + MARK))
            n = max(1, min(4, len(known), fitting))
            figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=n, frameon=False)
        if title:
            figure.suptitle(_plain(title))
    return figure


def draw_grids(grids: Sequence[Grid], columns: int = 3):
    """A matplotlib figure of the maps, `columns` of them in a row, in the same colours; numbers in the cells where
    there is room."""
    with _side_by_side(grids, columns, _fill_grid) as figure:
        return figure


@contextlib.contextmanager
def _side_by_side(drawings: Sequence[Any], columns: int, fill: Callable[[Any, Any], None]) -> Iterator[Any]:
    """A figure with a place for each drawing, `columns` of them in a row, filled by `fill(place, drawing)`; inside,
    text has its size."""
    import matplotlib
    from matplotlib.figure import Figure

    across, down = min(columns, len(drawings)), -(-len(drawings) // columns)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(WIDTH * across, HEIGHT * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for place, drawing in zip(axes, drawings):
            fill(place, drawing)
        for place in axes[len(drawings) :]:
            place.set_axis_off()
        yield figure


def _fill_grid(axes, grid: Grid) -> None:
    """Cells are drawn as shapes, not as an image, which a page would have to fetch."""
    values = np.ma.masked_invalid(grid.values)
    axes.set_facecolor("#dddddd")
    n_rows, n_columns = grid.values.shape
    width = 0.6 if n_columns <= CELLS else 0.0
    axes.pcolormesh(
        values, cmap="viridis", vmin=0.0, vmax=1.0, edgecolors="white" if width else "none", linewidth=width
    )
    for (row, column), value in np.ndenumerate(grid.values) if n_columns <= CELLS and n_rows <= CELLS else ():
        if np.isfinite(value):
            shade = "black" if value > 0.6 else "white"
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=7)
    each = -(-n_columns // CELLS)
    axes.set_xticks(np.arange(0, n_columns, each) + 0.5, [_plain(label) for label in grid.columns[::each]])
    axes.set_yticks(np.arange(n_rows) + 0.5, [_plain(label) for label in grid.rows])
    axes.invert_yaxis()
    axes.set(xlabel=_plain(grid.xlabel), ylabel=_plain(grid.ylabel), title=_plain(grid.title))


def _fill(axes, panel: Panel) -> None:
    drawn = False
    for line in panel.lines:
        x, y = _thinned(line.x, line.y, panel.log)
        if not len(x):
            continue
        drawn = True
        axes.plot(
            x, y, color=colour(line.n),
            linestyle=":" if line.dotted else DASHES[line.n // len(COLOURS) % len(DASHES)],
            linewidth=1.6 if line.bold else 0.9, alpha=1.0 if line.bold else 0.55,
            marker="o" if line.dots or len(x) == 1 else None, markersize=3,
            label=_plain(line.label) if line.label else "_",
        )  # fmt: skip
        if line.between is not None:
            _bars(axes, line, panel.log)
    if panel.log and drawn:
        axes.set_xscale("log")
        _name_few(axes)
    if panel.log_y and drawn:
        axes.set_yscale("log")
    for place in panel.marks:
        axes.axvline(place, color="#c62828", linestyle=":", linewidth=0.9)
    if not drawn:
        axes.text(0.5, 0.5, "no record", transform=axes.transAxes, ha="center", va="center", color="#777777")
    axes.set(xlabel=_plain(panel.xlabel), ylabel=_plain(panel.ylabel))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _name_few(axes) -> None:
    """Of a logarithmic x axis that shows less than two powers of ten, names 2 and 5 between them, and else nothing:
    more would touch. One of a small range hardly differs from a linear one, which is drawn in its place."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low, high = np.log10(axes.get_xlim())

    def name(x: float, _) -> str:
        power = int(np.floor(np.log10(x) + 1e-9))
        digit = round(x / 10.0**power)
        return rf"$\mathdefault{{{digit}\times10^{{{power}}}}}$" if digit in (2, 5) else ""

    if high - low < 0.4:  # a factor of 2.5: in more than that there is 1, 2 or 5 of some power
        axes.set_xscale("linear")
    else:
        few = np.floor(high) - np.ceil(low) + 1 < 2
        axes.xaxis.set_minor_formatter(FuncFormatter(name) if few else NullFormatter())


def _bars(axes, line: Line, log: bool) -> None:
    """From the lowest to the highest value at each point that is drawn."""
    x, y, low, high = (np.asarray(a, float) for a in (line.x, line.y, *(line.between or ())))
    fits = np.isfinite(x) & np.isfinite(y) & np.isfinite(low) & np.isfinite(high) & ((x > 0) | (not log))
    x, y, low, high = x[fits], y[fits], low[fits], high[fits]
    axes.errorbar(x, y, yerr=(y - low, high - y), fmt="none", ecolor=colour(line.n), elinewidth=1.0, capsize=2.5)


def _thinned(x: np.ndarray, y: np.ndarray, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Points that can be drawn, at most POINTS: means over stretches of the axis."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    fits = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log))
    x, y = x[fits], y[fits]
    if len(x) <= POINTS:
        return x, y
    place = np.log(x) if log else x
    edges = np.linspace(place[0], place[-1], POINTS + 1)[1:-1]
    of = np.searchsorted(edges, place)
    count = np.bincount(of, minlength=POINTS)
    means = [np.bincount(of, v, POINTS)[count > 0] / count[count > 0] for v in (x, y)]
    return means[0], means[1]


def _plain(label: str) -> str:
    """A label as it is: no mathematics between dollars, no line ends; a first `_` would keep it out of the legend."""
    label = visible(label).replace("\n", " ").replace("\t", " ").replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def as_file(figure, name: str) -> bytes:
    """The bytes of a file of that name, .svg or .png."""
    return as_svg(figure).encode("utf-8", "backslashreplace") if name.endswith(".svg") else as_png(figure)


def as_png(figure) -> bytes:
    """The file's bytes."""
    out = io.BytesIO()
    with quiet():
        figure.savefig(out, format="png", dpi=130)
    return out.getvalue()
