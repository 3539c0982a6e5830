# SPDX-License-Identifier: Apache-2.0
"""A plan as one page that needs nothing beside itself."""

from collections.abc import Callable

from hybridlm import page as html
from hybridlm.plan.live import KINDS
from hybridlm.plan.plan import STAGES, Plan
from hybridlm.plan.sections import Section, sections

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")


def as_html(plan: Plan) -> str:
    """The tables of all stages that are known, with plots of memory and times where the program is compiled."""
    known = [stage for stage in STAGES if getattr(plan, stage) is not None or (stage == "compiled" and plan.refused)]
    first, *others = (section for stage in ["head", *known] for section in sections(plan, stage))
    parts = _tables(first)
    for section in others:
        parts += [html.heading(section.title), *_tables(section)]
        if section.title == "Compiled" and plan.compiled is not None:
            parts.append(_plot(lambda axes: _memory(axes, plan), height=1.9))
        if section.title.startswith("What bounds it"):
            parts.append(_plot(lambda axes: _times(axes, plan), height=4.2))
    return html.page(first.title, *parts)


def _tables(section: Section) -> list[html.Markup]:
    """What stands below its title."""
    tables = [html.table(section.head, section.rows)] if section.rows else []
    return tables + [html.paragraph(note, note=True) for note in section.notes]


def _plot(draw: Callable, height: float) -> html.Markup:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    draw(figure.add_subplot())
    return html.figure(html.as_svg(figure))


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
