# SPDX-License-Identifier: Apache-2.0
"""What probes found, as tables, curves and maps: of `hybridlm probe` as JSON, and of the records of a run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hybridlm import page as html
from hybridlm.page import as_svg
from hybridlm.study.curves import AXES
from hybridlm.study.figures import Grid, Line, Panel, draw, draw_grids
from hybridlm.study.reading import Run, is_number

KIND, CHANCE, BOUND, BY = "probe", "chance", "fixed_state", "by"
"""Of the records of a run: their kind, and the tables in them."""
HIDDEN = "depth"
"""The facet that is drawn as a map."""
SHADES = " ░▒▓█"
SCORES = ["task", "length", "answers", "accuracy", "chance", "bound of the state", "rows all right"]
BY_SET = ["task", "set", "tokens", "loss", "repeated", "loss there"]
COST = "seconds"
SHARE = "/share"
"""Behind the names of numbers that stand in the table alone: they are of the text, and no loss."""
COLUMNS = 60
"""Most steps of a map of depth and step: of more, some at even distances, the last among them."""

Counts = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Facet -> value -> {"right", "asked"}."""


# What `hybridlm probe` found ----------------------------------------------------------------------------------------


def title(found: Mapping[str, Any]) -> str:
    """The model, and the size of its state."""
    step = "" if found["step"] is None else f", step {found['step']}"
    state = "grows with the text" if found["state_bits"] is None else f"{found['state_bits']:,} bits"
    return f"{found['model']}{step}: {found['compute_dtype']}, state {state}"


def of_tasks(found: Mapping[str, Any]) -> list[list[str]]:
    """A row of SCORES for each task and length."""
    rows = []
    for name, of_task in found["tasks"].items():
        for one in of_task.get("scores", ()):
            numbers = [_shown(one[key]) for key in ("accuracy", CHANCE, BOUND)]
            whole = f"{one['rows_all_right']} of {one['rows']}"
            rows.append([name, str(one["length"]), str(one["asked"]), *numbers, whole])
    return rows


def of_sets(found: Mapping[str, Any]) -> list[list[str]]:
    """A row of BY_SET for each held-out set: tokens and their loss where no pair is repeated, and where one is."""
    rows = []
    for name, of_task in found["tasks"].items():
        for set_name, parts in of_task.get("sets", {}).items():
            cells = [[f"{parts[part]['tokens']:,}", _shown(parts[part]["loss"], 4)] for part in ("rest", "hits")]
            rows.append([name, set_name, *cells[0], *cells[1]])
    return rows


def facets(found: Mapping[str, Any], shades: bool = False) -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """(task, facet, head, rows) of accuracies by length and value, of facets with several values. shades: a sign behind
    those of what is HIDDEN, the fuller, the more is right."""
    for name, of_task in found["tasks"].items():
        scores = of_task.get("scores", ())
        for facet in scores[0]["by"] if scores else ():
            values = _values([one["by"] for one in scores], facet)
            rows = []
            for one in scores:
                shares = [_share(one["by"], facet, value) for value in values]
                sign = _shade if shades and facet == HIDDEN else lambda share: ""
                rows.append([str(one["length"]), *(_shown(share) + sign(share) for share in shares)])
            if len(values) > 1:
                yield name, facet, ["length", *values], rows


def as_page(found: Mapping[str, Any]) -> str:
    """The page of what was found: tables, and maps of depth and length."""
    parts = [html.paragraph(title(found), note=True)]
    for head, rows in ((SCORES, of_tasks(found)), (BY_SET, of_sets(found))):
        if rows:
            parts.append(html.table(head, rows, numbers=range(1 if head is SCORES else 2, len(head))))
    grids = [
        map_of(name, [(str(one["length"]), one["by"]) for one in of_task.get("scores", ())], "tokens of a row")
        for name, of_task in found["tasks"].items()
        if any(HIDDEN in one["by"] for one in of_task.get("scores", ()))
    ]
    if grids:
        parts += [html.heading("Where it stands"), html.figure(as_svg(draw_grids(grids)), "Accuracy.")]
    for name, facet, head, rows in facets(found):
        parts += [html.heading(f"{name} by {facet}"), html.table(head, rows, numbers=range(len(head)))]
    fields = {name: of_task["fields"] for name, of_task in found["tasks"].items()}
    parts += [html.heading("Tasks"), html.config_part(fields)]
    return html.page(f"What {found['model']} recalls", *parts)


# What a run recorded ------------------------------------------------------------------------------------------------


def of_run(run: Run) -> list[html.Markup]:
    """The part of a run's page: curves by step and where it stands in what is hidden; nothing without probes."""
    records = sorted(run.of_kind(KIND), key=lambda record: record["step"])
    names = _names(records)
    if not names:
        return []
    by_task: dict[str, list[str]] = {}
    for name in names:
        if not name.endswith(SHARE):
            by_task.setdefault(name.partition("/")[0], []).append(name)
    panels = [_panel(task, of_task, records) for task, of_task in by_task.items()]
    seconds = [record[COST] for record in records if is_number(record.get(COST))]
    parts = [html.heading("Probes"), html.figure(as_svg(draw(panels)), "Dotted: chance.")]
    if grids := [grid for task, of_task in by_task.items() for grid in _grids(task, of_task, records)]:
        parts.append(html.figure(as_svg(draw_grids(grids)), "Accuracy by depth."))
    last = records[-1]
    rows = [
        [name, _shown(last.get(name)), _shown(_table(last, CHANCE).get(name)), _shown(_table(last, BOUND).get(name))]
        for name in names
    ]
    parts.append(html.table([f"step {last['step']}", "", "chance", "bound of the state"], rows, numbers=(1, 2, 3)))
    if seconds:
        told = f"probes took {sum(seconds):.1f} s in all, {np.median(seconds):.2f} s each in the middle"
        parts.append(html.paragraph(told, note=True))
    return parts


def _names(records: Sequence[Mapping]) -> list[str]:
    """What the records have numbers of, but for their cost."""
    names = (name for record in records for name, value in record.items() if is_number(value))
    return [name for name in dict.fromkeys(names) if name not in ("step", COST)]


def _table(record: Mapping, name: str) -> Mapping:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _panel(task: str, names: Sequence[str], records: Sequence[Mapping]) -> Panel:
    lines = []
    for n, name in enumerate(names):
        points = [(record["step"], record[name]) for record in records if is_number(record.get(name))]
        lines.append(Line([x for x, _ in points], [y for _, y in points], name, n, dots=True))
        chance = next((c for r in records if is_number(c := _table(r, CHANCE).get(name))), None)
        if chance is not None and points:
            ends = [points[0][0], points[-1][0]]
            lines.append(Line(ends, [chance, chance], "", n, bold=False, dotted=True))
    accuracy = any(name in _table(record, CHANCE) for record in records for name in names)
    return Panel(AXES["step"], f"{task}: accuracy" if accuracy else f"{task}: nats a token", lines)


def _grids(task: str, names: Sequence[str], records: Sequence[Mapping]) -> list[Grid]:
    """Depth by length of the last record that has several lengths; of one length, depth by step."""
    with_depth = [
        (record["step"], [(name, by) for name in names if HIDDEN in (by := _counts(_table(record, BY).get(name)))])
        for record in records
    ]
    with_depth = [(step, found) for step, found in with_depth if found]
    if not with_depth:
        return []
    step, last = with_depth[-1]
    if len(last) > 1:
        rows = [(name.rpartition("/")[2], by) for name, by in last]
        return [map_of(f"{task}, step {step}", rows, "tokens of an example")]
    (only, _), *_ = last
    by_step = [(str(step), by) for step, of in with_depth for name, by in of if name == only]
    each = -(-len(by_step) // COLUMNS)
    return [map_of(only, by_step[(len(by_step) - 1) % each :: each], AXES["step"])]


def _counts(by: Any) -> Counts:
    """As of `hybridlm probe`; of records, which have [right, asked]."""
    if not isinstance(by, Mapping):
        return {}
    return {
        facet: {
            value: {"right": pair[0], "asked": pair[1]}
            for value, pair in of.items()
            if isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair))
        }
        for facet, of in by.items()
        if isinstance(of, Mapping)
    }


# Both ---------------------------------------------------------------------------------------------------------------


def map_of(name: str, rows: Sequence[tuple[str, Counts]], along: str) -> Grid:
    """Accuracy by depth, from the top down, and what the rows are, from left to right."""
    depths = _values([by for _, by in rows], HIDDEN)
    cells = [[_share(by, HIDDEN, depth) for _, by in rows] for depth in depths]
    values = np.array([[np.nan if share is None else share for share in row] for row in cells], float)
    return Grid(name, along, "depth, percent", [label for label, _ in rows], depths, values)


def _values(scores: Sequence[Counts], facet: str) -> list[str]:
    return sorted({value for by in scores for value in by.get(facet, {})}, key=int)


def _share(by: Counts, facet: str, value: str) -> float | None:
    cell = by.get(facet, {}).get(value)
    return cell["right"] / cell["asked"] if cell and cell["asked"] else None


def _shown(share: Any, digits: int = 3) -> str:
    return f"{share:.{digits}f}" if is_number(share) else "-"


def _shade(share: float | None) -> str:
    return "  " if share is None else f" {SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]}"
