# SPDX-License-Identifier: Apache-2.0
"""Learning rates over a run: warmup from zero, then cosine, linear, warmup-stable-decay or constant.

Each is a frozen value that holds its numbers and says what follows the warmup. A new one is such a class, and a word in
SCHEDULES.

The built-in ones say apart what of them hangs on the length of the run (`lengths`), whole numbers that a train step
takes as an argument: a run that is made longer is the same program. One without them is compiled with its numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from hybridlm.errors import require
from hybridlm.fields import check_fields


@runtime_checkable
class Shape(Protocol):
    """What a schedule answers."""

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """What follows a warmup of `warmup` updates in a run of `steps`: schedules one after the other, each counting
        from its own start, and the updates at which all but the first start."""
        ...


@runtime_checkable
class Lengthened(Shape, Protocol):
    """What a schedule answers whose program is the same for any length of the run."""

    def lengths(self, warmup: int, steps: int) -> tuple[int, ...]:
        """The whole numbers that hang on `steps`."""
        ...

    def pieces_of(self, peak: float, lengths: Sequence) -> tuple[list[optax.Schedule], list]:
        """As `pieces`, from those numbers, which may be traced."""
        ...


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak, at the end of the warmup, to the last step."""

    final_lr_ratio: float = 0.1
    """Learning rate of the last step over the peak."""

    def __post_init__(self):
        check_fields(self)
        _require_share("final_lr_ratio", self.final_lr_ratio)

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule."""
        return self.pieces_of(peak, self.lengths(warmup, steps))

    def lengths(self, warmup: int, steps: int) -> tuple[int, ...]:
        """(updates from the peak to the last one,)"""
        return (max(steps - 1 - warmup, 1),)

    def pieces_of(self, peak: float, lengths: Sequence) -> tuple[list[optax.Schedule], list]:
        """As of every schedule with lengths."""
        return [_cosine(peak, lengths[0], self.final_lr_ratio)], []


@dataclass(frozen=True)
class LinearDecay:
    """A straight line from the peak, at the end of the warmup, to the last step."""

    final_lr_ratio: float = 0.1
    """Learning rate of the last step over the peak."""

    def __post_init__(self):
        check_fields(self)
        _require_share("final_lr_ratio", self.final_lr_ratio)

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule."""
        return self.pieces_of(peak, self.lengths(warmup, steps))

    def lengths(self, warmup: int, steps: int) -> tuple[int, ...]:
        """(updates from the peak to the last one,)"""
        return (max(steps - 1 - warmup, 1),)

    def pieces_of(self, peak: float, lengths: Sequence) -> tuple[list[optax.Schedule], list]:
        """As of every schedule with lengths."""
        return [_line(peak, self.final_lr_ratio * peak, lengths[0])], []


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
        check_fields(self)
        _require_share("decay_fraction", self.decay_fraction)
        _require_share("final_lr_ratio", self.final_lr_ratio)

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule."""
        return self.pieces_of(peak, self.lengths(warmup, steps))

    def lengths(self, warmup: int, steps: int) -> tuple[int, ...]:
        """(update at which the decay starts, updates that it takes); one that takes none starts after the last."""
        last = steps - 1
        decay = min(round(self.decay_fraction * steps), max(last - warmup, 0))
        return (last - decay, decay) if decay else (steps, 1)

    def pieces_of(self, peak: float, lengths: Sequence) -> tuple[list[optax.Schedule], list]:
        """As of every schedule with lengths."""
        start, decay = lengths
        return [optax.constant_schedule(peak), _line(peak, self.final_lr_ratio * peak, decay)], [start]


@dataclass(frozen=True)
class Constant:
    """The peak to the end."""

    def pieces(self, peak: float, warmup: int, steps: int) -> tuple[list[optax.Schedule], list[int]]:
        """As of every schedule."""
        return self.pieces_of(peak, self.lengths(warmup, steps))

    def lengths(self, warmup: int, steps: int) -> tuple[int, ...]:
        """Nothing of it hangs on the length."""
        del warmup, steps
        return ()

    def pieces_of(self, peak: float, lengths: Sequence) -> tuple[list[optax.Schedule], list]:
        """As of every schedule with lengths."""
        del lengths
        return [optax.constant_schedule(peak)], []


Schedule = Cosine | LinearDecay | Wsd | Constant
SCHEDULES: tuple[type[Schedule], ...] = get_args(Schedule)


def schedule_lengths(optim, steps: int) -> tuple[int, ...]:
    """What a train step takes as an argument of the length of the run; of a schedule without lengths, nothing."""
    known = isinstance(optim.schedule, Lengthened)
    return optim.schedule.lengths(optim.warmup_steps, steps) if known else ()


def make_schedule(optim, steps: int, peak: float, lengths: Sequence | None = None) -> optax.Schedule:
    """Learning rate as a function of the number of updates already applied (0 at the first).

    optim: an OptimConfig. The warmup is linear from zero and reaches the peak after `optim.warmup_steps` updates; the
    decay ends with the run's last update, number steps - 1. A run that is shorter than its warmup (a trial of a few
    steps) is warmup alone. lengths: those of `schedule_lengths`, traced, in the place of `steps`.
    """
    warmup = optim.warmup_steps
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if lengths is not None and isinstance(optim.schedule, Lengthened):
        parts, bounds = optim.schedule.pieces_of(peak, lengths)
    elif warmup >= steps:
        return rise
    else:
        parts, bounds = optim.schedule.pieces(peak, warmup, steps)
    if warmup:
        parts, bounds = [rise, *parts], [warmup, *bounds]
    return optax.join_schedules(parts, bounds)


def _cosine(peak: float, updates, ratio: float) -> optax.Schedule:
    """optax.cosine_decay_schedule, whose length has to be a number of Python; the product with the inverse is what
    the compiler makes of its quotient by a constant."""

    def schedule(count):
        length = jnp.float32(updates)
        part = jnp.pi * jnp.minimum(count, length) * (1 / length)
        return peak * ((1 - ratio) * (0.5 * (1 + jnp.cos(part))) + ratio)

    return schedule


def _line(start: float, end: float, updates) -> optax.Schedule:
    """optax.linear_schedule, likewise."""

    def schedule(count: jax.typing.ArrayLike):
        length = jnp.float32(updates)
        return (start - end) * (1 - jnp.clip(count, 0, length) * (1 / length)) + end

    return schedule


def _require_share(name: str, value: float) -> None:
    require(0 <= value <= 1, f"{name} ({value}) must be in [0, 1]")
