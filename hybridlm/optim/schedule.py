# SPDX-License-Identifier: Apache-2.0
"""Learning rates over a run: warmup from zero, then cosine, linear, warmup-stable-decay or constant.

Each is a frozen value that holds its numbers and says what follows the warmup. A new one is such a class, and a word in
SCHEDULES.
"""

from dataclasses import dataclass
from typing import Protocol, Union, runtime_checkable

import optax

from hybridlm.errors import require


@runtime_checkable
class Shape(Protocol):
    """What a schedule answers."""

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """What follows a warmup of `warmup` updates in a run of `steps`: schedules one after the other, each counting
        from its own start, and the updates at which all but the first start."""
        ...


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak, at the end of the warmup, to the last step."""

    final_lr_ratio: float = 0.1
    """Learning rate of the last step over the peak."""

    def __post_init__(self):
        _require_share("final_lr_ratio", self.final_lr_ratio)

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule."""
        left = max(steps - 1 - warmup, 1)
        return [optax.cosine_decay_schedule(peak, left, alpha=self.final_lr_ratio)], []


@dataclass(frozen=True)
class LinearDecay:
    """A straight line from the peak, at the end of the warmup, to the last step."""

    final_lr_ratio: float = 0.1
    """Learning rate of the last step over the peak."""

    def __post_init__(self):
        _require_share("final_lr_ratio", self.final_lr_ratio)

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule."""
        return [optax.linear_schedule(peak, self.final_lr_ratio * peak, max(steps - 1 - warmup, 1))], []


@dataclass(frozen=True)
class Wsd:
    """Warmup-stable-decay (Hu et al. 2024, MiniCPM, section 4): the peak, then a straight line to the last step.

    A run that is shorter than warmup and decay has a shorter decay.
    """

    decay_fraction: float = 0.2
    """Share of the run that the decay takes."""
    final_lr_ratio: float = 0.1
    """Learning rate of the last step over the peak."""

    def __post_init__(self):
        _require_share("decay_fraction", self.decay_fraction)
        _require_share("final_lr_ratio", self.final_lr_ratio)

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule."""
        last = steps - 1
        decay = min(round(self.decay_fraction * steps), max(last - warmup, 0))
        stable = optax.constant_schedule(peak)
        fall = optax.linear_schedule(peak, self.final_lr_ratio * peak, decay) if decay else stable
        return [stable, fall], [last - decay]


@dataclass(frozen=True)
class Constant:
    """The peak to the end."""

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule."""
        return [optax.constant_schedule(peak)], []


SCHEDULES = (Cosine, LinearDecay, Wsd, Constant)
Schedule = Union[SCHEDULES]  # noqa: UP007 (of a tuple)


def make_schedule(optim, steps: int, peak: float) -> optax.Schedule:
    """Learning rate as a function of the number of updates already applied (0 at the first).

    optim: an OptimConfig. The warmup is linear from zero and reaches the peak after `optim.warmup_steps` updates; the
    decay ends with the run's last update, number steps - 1. A run that is shorter than its warmup (a trial of a few
    steps) is warmup alone.
    """
    warmup = optim.warmup_steps
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if warmup >= steps:
        return rise
    parts, bounds = optim.schedule.pieces(peak, warmup, steps)
    if warmup:
        parts, bounds = [rise, *parts], [warmup, *bounds]
    return optax.join_schedules(parts, bounds)


def _require_share(name: str, value: float) -> None:
    require(0 <= value <= 1, f"{name} ({value}) must be in [0, 1]")
