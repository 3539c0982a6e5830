# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark as tables of text, and as a file that a later start goes on with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hybridlm import storage
from hybridlm.errors import ConfigError, require
from hybridlm.infer.bench import Row, as_dict
from hybridlm.infer.bench_claims import beside
from hybridlm.infer.bench_models import DECODE, PREFILL
from hybridlm.infer.cache_size import STATES
from hybridlm.train.provenance import ROOT, commit, versions
from pallas_kernels import platform

HEADS = {
    DECODE: ("context", "batch", "model", "tokens/s", "spread", "ms a token", "of the bound", "weights", "cache",
             "moves", "in use", "peak", "states"),
    PREFILL: ("context", "batch", "model", "tokens/s", "spread", "to first token", "TFLOP/s", "weights", "cache",
              "in use", "peak", "states"),
}  # fmt: skip


class Table(NamedTuple):
    """A title, heads of columns, rows of text, and lines below."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def tables(rows: Sequence[Row], notes: Sequence[str] = ()) -> list[Table]:
    """Of each phase that there is, and the published claims beside it."""
    found = []
    for phase, head in HEADS.items():
        of_phase = sorted(
            (row for row in rows if row.phase == phase), key=lambda row: (row.context, row.fills, row.batch)
        )
        if of_phase:
            title = "Writing" if phase == DECODE else "Reading"
            found.append(Table(title, head, [_cells(row) for row in of_phase], _notes(of_phase)))
    if any(row.phase == DECODE for row in rows):
        head = ("published, over a transformer of the size", "by", "here")
        found.append(Table("Beside what is published", head, list(beside(rows))))
    if notes:
        found[-1] = found[-1]._replace(notes=(*found[-1].notes, *notes))
    return found


def _cells(row: Row) -> tuple[str, ...]:
    batch = f"{row.batch:,}" + (" (fills)" if row.fills else "")
    moves = () if row.phase != DECODE else ("-" if row.moved is None else _size(sum(row.moved.values())),)
    sizes = (_size(row.weights), _size(row.cache), *moves, _size(row.in_use), _size(row.peak))
    return (f"{row.context:,}", batch, row.config, *_speed(row), *sizes, row.types.get(STATES, "-"))


def _speed(row: Row) -> tuple[str, str, str, str]:
    """Or why there is none."""
    if row.tokens_per_second is None or row.seconds is None:
        return row.why, "-", "-", "-"
    speed = _rate(row.tokens_per_second), f"{_rate(row.low)} to {_rate(row.high)}"
    if row.phase == DECODE:
        return *speed, f"{1e3 * row.seconds:,.3f}", "-" if row.share is None else f"{row.share:.1%}"
    return *speed, _seconds(row.seconds), "-" if row.tflops is None else f"{row.tflops:,.2f}"


def _rate(tokens: float | None) -> str:
    return "-" if tokens is None else f"{tokens:,.0f}" if tokens >= 1000 else f"{tokens:,.1f}"


def _notes(rows: Sequence[Row]) -> tuple[str, ...]:
    found = []
    for row in rows:
        before = "" if row.phase != DECODE else f"; before the tokens: {row.filled}"
        found.append(f"{row.config}: {row.kind}, weights in {row.compute}{before}")
    rates = [row.copy_rate for row in rows if row.copy_rate]
    if rates:
        found.append(f"the bound is {_between(min(rates), max(rates))} GB/s, the rate at which copies moved bytes here")
    return tuple(dict.fromkeys(found))


def _between(low: float, high: float) -> str:
    texts = dict.fromkeys(f"{rate / 1e9:,.1f}" for rate in (low, high))
    return " to ".join(texts)


def _size(n: int | None) -> str:
    if n is None:
        return "-"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= unit:
            return f"{n / unit:,.2f} {name}"
    return f"{n} B"


def _seconds(t: float) -> str:
    return f"{t:,.2f} s" if t >= 1 else f"{1e3 * t:,.2f} ms"


def about(words: Sequence[str]) -> dict[str, Any]:
    """What rows of one file have in common. words: overrides of the configs."""
    return {
        "device": platform.device_name(),
        "memory": platform.memory(),
        "versions": versions(),
        "commit": commit(ROOT),
        "overrides": list(words),
        "jax_backend": platform.platform(),
    }


SAME = {"device": "device", "overrides": "overrides of the configs"}
"""What has to be the same for rows to stand in one file; of versions, JAX's."""


def read(path: Path, here: dict[str, Any]) -> list[Row]:
    """Rows of a file that is there, none where there is none. ConfigError where it is of another device, another JAX or
    other overrides, or no such file."""
    if not storage.exists(path):
        return []
    try:
        found = json.loads(storage.read_bytes(path))
        rows = [Row(**row) for row in found["rows"]]
        there = found["about"]
        pairs = [(what, there[key], here[key]) for key, what in SAME.items()]
        pairs.append(("JAX", there["versions"].get("jax"), jax.__version__))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--json ({path}): no file of `hybridlm bench`: name another") from None
    for what, theirs, ours in pairs:
        require(theirs == ours, f"--json ({path}): its {what} was {theirs}, here {ours}: name another file")
    return rows


def write(path: Path, here: dict[str, Any], rows: Sequence[Row]) -> None:
    """All rows, with the published claims beside them."""
    claims = [dict(zip(("published", "source", "here"), row, strict=True)) for row in beside(rows)]
    storage.write_text(
        path, json.dumps({"about": here, "rows": [as_dict(row) for row in rows], "claims": claims}, indent=1) + "\n"
    )
