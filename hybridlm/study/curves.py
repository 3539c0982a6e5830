# SPDX-License-Identifier: Apache-2.0
"""A run's losses over steps, tokens, time and FLOPs."""

from dataclasses import dataclass

import numpy as np

from hybridlm.errors import ConfigError
from hybridlm.model.flops import train_flops
from hybridlm.study.reading import Run, is_number

AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds", "flops": "FLOPs"}
"""What a curve may be drawn over -> its words. Seconds are those in which steps were taken: without start-up,
evaluations and saves."""


@dataclass(frozen=True)
class Curve:
    """Values at increasing steps; arrays [points]. What is not known is NaN."""

    step: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray
    values: dict[str, np.ndarray]
    """`loss`, `bits_per_byte` and whatever else the records have."""

    def over(self, axis: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) where both are known."""
        x = getattr(self, axis)
        y = self.values.get(name, np.full(len(x), np.nan))
        known = np.isfinite(x) & np.isfinite(y)
        return x[known], y[known]


def train_curve(run: Run) -> Curve:
    """Of its records of training: one for each interval."""
    records = sorted(run.of_kind("train"), key=lambda record: record["step"])
    step = np.array([record["step"] for record in records], float)
    tokens = _column(records, "tokens")
    tokens = np.where(np.isnan(tokens), step * _tokens_per_step(run), tokens)
    speed = _column(records, "tokens_per_second")
    speed = np.where(speed > 0, speed, np.nan)
    if np.isfinite(speed).any():
        speed = np.where(np.isfinite(speed), speed, np.nanmedian(speed))
    new = np.diff(tokens, prepend=0.0)
    return Curve(step, tokens, np.cumsum(new / speed), np.cumsum(new * _flops_per_token(run, step)), _columns(records))


def val_curve(run: Run, train: Curve | None = None) -> Curve:
    """Of its records of validation; where they lie between those of training, so do tokens, time and FLOPs."""
    train = train or train_curve(run)
    records = sorted(run.of_kind("val"), key=lambda record: record["step"])
    step = np.array([record["step"] for record in records], float)
    return Curve(step, *(_between(step, train, axis) for axis in ("tokens", "seconds", "flops")), _columns(records))


def _between(step: np.ndarray, train: Curve, axis: str) -> np.ndarray:
    if not len(train.step):
        return np.full(len(step), np.nan)
    return np.interp(step, np.append(0.0, train.step), np.append(0.0, getattr(train, axis)))


def _column(records: list[dict], name: str) -> np.ndarray:
    return np.array([record[name] if is_number(record.get(name)) else np.nan for record in records], float)


def _columns(records: list[dict]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for record in records for name, value in record.items() if is_number(value))
    return {name: _column(records, name) for name in names}


def _tokens_per_step(run: Run) -> float:
    data = run.config.get("data")
    sizes = (data.get("batch_size"), data.get("seq_len")) if isinstance(data, dict) else (None, None)
    return float(sizes[0] * sizes[1]) if all(map(is_number, sizes)) else np.nan


def _flops_per_token(run: Run, step: np.ndarray) -> np.ndarray:
    """[points]: what the start says that came before each step; of starts that say nothing, what the config says."""
    starts = [(r["step"], r["flops_per_token"]) for r in run.of_kind("start") if is_number(r.get("flops_per_token"))]
    found = np.full(len(step), np.nan if starts else flops_per_token(run))
    for first, flops in sorted(starts):
        found = np.where(step > first, float(flops), found)
    return np.where(np.isnan(found), flops_per_token(run), found) if starts else found


def flops_per_token(run: Run) -> float:
    """Of a training step, by the run's config; NaN where its blocks are not known here."""
    if run.parsed is None:
        return np.nan
    try:
        return float(train_flops(run.parsed.model, run.parsed.data.seq_len))
    except ConfigError:
        return np.nan
