# SPDX-License-Identifier: Apache-2.0
"""Learning rates over a run: warmup from zero, then cosine, linear, warmup-stable-decay or constant."""

import optax

from hybridlm.optim.config import OptimConfig


def make_schedule(optim: OptimConfig, steps: int, peak: float) -> optax.Schedule:
    """Learning rate as a function of the number of updates already applied (0 at the first).

    The warmup is linear from zero and reaches the peak after `optim.warmup_steps` updates; the decay ends at
    `optim.final_lr_ratio * peak` with the run's last update, number steps - 1. Warmup-stable-decay (Hu et al. 2024,
    MiniCPM, section 4) decays linearly over the last `optim.decay_fraction` of the run. A run that is shorter than its
    warmup (a trial of a few steps) is warmup alone; one that is shorter than warmup and decay has a shorter decay.
    """
    warmup, last, final = optim.warmup_steps, steps - 1, optim.final_lr_ratio * peak
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    left = max(last - warmup, 1)
    if optim.schedule == "constant":
        parts, bounds = [optax.constant_schedule(peak)], []
    elif optim.schedule == "linear":
        parts, bounds = [optax.linear_schedule(peak, final, left)], []
    elif optim.schedule == "cosine":
        parts, bounds = [optax.cosine_decay_schedule(peak, left, alpha=optim.final_lr_ratio)], []
    else:
        decay = min(round(optim.decay_fraction * steps), max(last - warmup, 0))
        fall = optax.linear_schedule(peak, final, max(decay, 1)) if decay else optax.constant_schedule(peak)
        parts, bounds = [optax.constant_schedule(peak), fall], [last - decay]
    if warmup >= steps:
        return rise
    if warmup:
        parts, bounds = [rise, *parts], [warmup, *bounds]
    return optax.join_schedules(parts, bounds)
