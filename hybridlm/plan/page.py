# SPDX-License-Identifier: Apache-2.0
"""A plan as one page that needs nothing beside itself."""

import html
import io
from collections.abc import Callable

from hybridlm.plan.live import KINDS
from hybridlm.plan.plan import STAGES, Plan
from hybridlm.plan.sections import Section, sections

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.5em 0}td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top}"
    "th{font-weight:600;border-bottom:1px solid #bbb}tr:nth-child(even) td{background:#f6f6f6}"
    "h2{margin-top:1.6em;font-size:1.15em}.note{color:#666;font-size:.9em}svg{max-width:100%;height:auto}"
)
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")


def as_html(plan: Plan) -> str:
    """The tables of all stages that are known, with plots of memory and times where the program is compiled."""
    title = html.escape(f"{plan.name} on {plan.devices.words}")
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"]
    known = [stage for stage in STAGES if getattr(plan, stage) is not None or (stage == "compiled" and plan.refused)]
    for n, section in enumerate(s for stage in ["head", *known] for s in sections(plan, stage)):
        parts.append(_section(section, "h1" if n == 0 else "h2"))
        if section.title == "Compiled" and plan.compiled is not None:
            parts.append(_svg(lambda axes: _memory(axes, plan), height=1.9))
        if section.title.startswith("What bounds it"):
            parts.append(_svg(lambda axes: _times(axes, plan), height=4.2))
    return "\n".join(parts) + "\n</html>\n"


def _section(section: Section, heading: str) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.head)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in section.rows)
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in section.notes)
    table = f"<table>{f'<tr>{head}</tr>' if head else ''}{rows}</table>" if rows else ""
    return f"<{heading}>{html.escape(section.title)}</{heading}>{table}{notes}"


def _svg(draw: Callable, height: float) -> str:
    """A plot as the text of an element."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    draw(figure.add_subplot())
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]


def _memory(axes, plan: Plan) -> None:
    """What lives at the peak beside what the device has."""
    left, by_kind = 0.0, plan.compiled.live.by_kind
    for colour, kind in zip(COLOURS, KINDS, strict=False):
        width = by_kind[kind] / 2**30
        axes.barh(["at the peak"], [width], left=left, color=colour, label=f"{kind} {width:.2f}")
        left += width
    axes.axvline(plan.compiled.memory.peak / 2**30, color="black", linestyle=":", label="as the compiler says")
    if plan.counted.memory is not None:
        axes.axvline(plan.counted.memory / 2**30, color="red", label="the device has")
    axes.set_xlabel("GiB a device")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def _times(axes, plan: Plan) -> None:
    """Of each class the three times, at peaks."""
    rows = sorted(plan.bounds.rows.items(), key=lambda item: item[1].alone + item[1].exchange_exposed)
    kinds = (("arithmetic", "arithmetic"), ("memory", "memory"), ("exchange_exposed", "exchange, not hidden"))
    for n, (name, label) in enumerate(kinds):
        at = [i + (1 - n) * 0.27 for i in range(len(rows))]
        axes.barh(at, [1e3 * getattr(row, name) for _, row in rows], height=0.25, color=COLOURS[n], label=label)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel("ms a step at the peaks of the data sheet")
    axes.legend(fontsize=8)
