# SPDX-License-Identifier: Apache-2.0
"""A plan on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hybridlm.plan.plan import Plan
from hybridlm.plan.sections import Section, sections

WIDTH = 140
"""Columns where the output is no terminal."""


def show(plan: Plan, stage: str, console: Console | None = None) -> None:
    """Prints what a stage found; `head` stands before all."""
    for section in sections(plan, stage):
        show_section(section, console)


def show_section(section: Section, console: Console | None = None) -> None:
    """Prints one table."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=WIDTH)
    console.print(f"\n[bold]{escape(section.title)}[/bold]")
    if section.rows:
        console.print(_table(section))
    for note in section.notes:
        console.print(f"  [dim]{escape(note)}[/dim]")


def _table(section: Section) -> Table:
    table = Table(box=None, pad_edge=True, show_header=bool(section.head), header_style="dim")
    width = max(len(section.head), *(len(row) for row in section.rows))
    for n in range(width):
        heading = section.head[n] if section.head else ""
        numbers = bool(section.head) and n > 0 and all(row[n][:1].isdigit() for row in section.rows if len(row) > n)
        table.add_column(escape(heading), justify="right" if numbers else "left")
    for row in section.rows:
        table.add_row(*(escape(cell) for cell in row), *[""] * (width - len(row)))
    return table
