# SPDX-License-Identifier: Apache-2.0
"""Several runs as rows of one table: what each has reached, and in what their configs differ."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm.study.differences import differences, shown
from hybridlm.study.reading import Broken, Run
from hybridlm.train.progress import short

COLUMNS = ("run", "state", "steps", "tokens", "loss", "val loss", "bits/byte", "tokens/s", "MFU")
"""loss is that of the last interval of training, bits/byte of the last validation, or of training where there was
none; tokens/s and MFU are medians."""


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [os.fspath(path).rstrip("/").split("/") for path in paths]
    most = max(map(len, parts), default=1)
    for n in range(1, most + 1):
        ends = ["/".join(part[-n:]) for part in parts]
        if len(set(ends)) == len(set(map(tuple, parts))):
            return ends
    return [os.fspath(path) for path in paths]


def numbers(run: Run) -> dict[str, Any]:
    """What a run has reached: plain values, None where they are not known."""
    bits = run.last("val", "bits_per_byte")
    return {
        "state": run.state.word,
        "why": run.state.why,
        "steps": run.steps,
        "asked": run.asked,
        "tokens": run.last("train", "tokens"),
        "loss": run.last("train", "loss"),
        "val_loss": run.last("val", "loss"),
        "bits_per_byte": run.last("train", "bits_per_byte") if bits is None else bits,
        "tokens_per_second": run.middle("train", "tokens_per_second"),
        "mfu": run.middle("train", "mfu"),
    }


def as_json(found: Sequence[Run | Broken]) -> list[dict[str, Any]]:
    """An object for each, with its path, its numbers and the differing values of its config."""
    differ = iter(_differing(found))
    return [
        {"run": os.fspath(each.path), "state": each.word, "why": each.why}
        if isinstance(each, Broken)
        else {"run": os.fspath(each.path), **numbers(each), "differs": next(differ)}
        for each in found
    ]


def _differing(found: Sequence[Run | Broken]) -> list[dict[str, Any]]:
    runs = [run for run in found if isinstance(run, Run)]
    table = differences([run.config for run in runs])
    return [{key: values[i] for key, values in table.items()} for i in range(len(runs))]


def cells(run: Run, label: str) -> list[str]:
    """A row of COLUMNS."""
    has = numbers(run)
    steps = f"{has['steps']}/{'?' if has['asked'] is None else has['asked']}"
    forms = {
        "tokens": short, "loss": "{:.4f}".format, "val_loss": "{:.4f}".format, "bits_per_byte": "{:.3f}".format,
        "tokens_per_second": short, "mfu": "{:.1%}".format,
    }  # fmt: skip
    return [
        label, run.state.word, steps, *("-" if has[name] is None else form(has[name]) for name, form in forms.items())
    ]  # fmt: skip


def as_text(found: Sequence[Run | Broken], most: int = 8) -> str:
    """The table, columns aligned, with up to so many differing keys a run; what is no run is a line below."""
    runs = [run for run in found if isinstance(run, Run)]
    broken = [each for each in found if isinstance(each, Broken)]
    names = dict(zip([each.path for each in found], labels([each.path for each in found])))
    grid = [list(COLUMNS), *(cells(run, names[run.path]) for run in runs)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(COLUMNS))]
    beside = ["differs in", *(_in_words(differ, most) for differ in _differing(found))]
    lines = []
    for row, more in zip(grid, beside):
        aligned = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join([*aligned, more]).rstrip())
    if len(runs) < 2:
        lines[0] = lines[0].removesuffix("differs in").rstrip()
    lines = lines if runs else []
    lines += [f"{names[run.path]}: {run.state.word}: {run.state.why}" for run in runs if _worth_saying(run)]
    return "\n".join([*lines, *(f"{names[each.path]}: {each.word}: {each.why}" for each in broken)])


def _worth_saying(run: Run) -> bool:
    return run.state.word in ("failed", "running") and bool(run.state.why)


def _in_words(differ: dict[str, Any], most: int) -> str:
    words = [f"{key}={shown(value, 40)}" for key, value in list(differ.items())[:most]]
    return " ".join(words) + (f" and {len(differ) - most} more" if len(differ) > most else "")
