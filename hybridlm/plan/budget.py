# SPDX-License-Identifier: Apache-2.0
"""Budgets: of a plan the figures that no change to the code may raise unseen, as `tests/budgets.json` holds them.

Of each run, "traced" has what its step asks for and "compiled" what the compiler makes of it; bytes are of one device
and one step.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from hybridlm.errors import ConfigError
from hybridlm.plan.collectives import Totals
from hybridlm.plan.compiled import Compiled
from hybridlm.plan.plan import Plan

Figures = dict[str, int]
"""Name -> number."""


def traced(
    state_bytes: int, sublayers: int, flops: float, exchanges: Mapping[str, Totals], kernels: Mapping[str, int]
) -> Figures:
    """Of a traced step: sublayers compiled, FLOPs of a device with what is computed again, exchanges by kind and mesh
    axes, kernels by name."""
    runs = {f"{name} runs": n for name, n in kernels.items()}
    known = {"state bytes": state_bytes, "sublayers compiled": sublayers, "FLOPs": round(flops)}
    return known | _exchanged(exchanges) | runs


def compiled(found: Compiled) -> Figures:
    """Of a compiled step: exchanges by kind."""
    held = {"peak bytes": found.memory.peak, "largest array bytes": found.largest[0].bytes}
    return held | _exchanged(found.exchanges)


def _exchanged(totals: Mapping[str, Totals]) -> Figures:
    return {f"{key} {what}": getattr(total, what) for key, total in totals.items() for what in ("runs", "bytes")}


def of_plan(plan: Plan) -> dict[str, Figures]:
    """Of the stages that are known."""
    asked, counted, lowered = {}, plan.counted, plan.lowered
    if lowered is not None:
        state = sum(counted.state.values())
        asked = traced(state, counted.compiled, lowered.flops.all, lowered.exchanges, lowered.kernels)
    return {"traced": asked, "compiled": {} if plan.compiled is None else compiled(plan.compiled)}


def raised(figures: Figures, budget: Figures, share: float = 0.02) -> list[str]:
    """Lines for what is above the budget by more than the share of it, or not in it."""
    return [
        f"{name}: {number:,}, budget {budget.get(name, 0):,}"
        for name, number in figures.items()
        if number > budget.get(name, 0) * (1 + share)
    ]


def read(path: Path) -> dict[str, dict[str, Figures]]:
    """The budgets of a file, by run; none where there is no file. ConfigError for one that holds something else."""
    if not path.exists():
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} holds no budgets: {error}") from error
    if not isinstance(kept, dict) or not all(isinstance(of, dict) for of in kept.values()):
        raise ConfigError(f"{path} holds no budgets: an object of objects is expected")
    return kept


def write(path: Path, name: str, figures: dict[str, Figures]) -> None:
    """Puts the figures of a run beside those of others; a stage without figures keeps those that were there."""
    kept = read(path)
    before = kept.get(name, {})
    kept[name] = {stage: found or before.get(stage, {}) for stage, found in figures.items()}
    path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n", encoding="utf-8")
