# SPDX-License-Identifier: Apache-2.0
"""From the config to the transformation of a train step's gradients.

Only matrices (`kind == "matrix"` in the model's table of parameters) are decayed and, under Muon, orthogonalised;
embeddings, norms, biases, convolutions, sinks and recurrence parameters take Adam without decay.
"""

from collections.abc import Callable, Sequence

import optax

from hybridlm.optim.config import OptimConfig
from hybridlm.optim.schedule import make_schedule


def make_optimizer(
    optim: OptimConfig, steps: int, info, lengths: Sequence | None = None
) -> tuple[optax.GradientTransformation, Callable]:
    """The transformation from mean gradients to updates, and the schedule of optim.lr.

    info: tree like the parameters with the model's ParamInfo at each leaf. lengths: see make_schedule.
    """

    def rate(peak: float) -> optax.Schedule:
        return make_schedule(optim, steps, peak, lengths)

    clip = optax.identity() if optim.clip_norm is None else optax.clip_by_global_norm(optim.clip_norm)
    return optax.chain(clip, optim.rule.transform(rate, optim.lr, optim.weight_decay, info)), rate(optim.lr)
