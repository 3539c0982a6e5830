# SPDX-License-Identifier: Apache-2.0
"""The update rules to choose from: each a frozen value that holds its numbers and builds its transformation.

A new one is a file with such a class, and a word in RULES.
"""

from collections.abc import Callable
from typing import Protocol, get_args, runtime_checkable

import optax

from hybridlm.optim.adamw import AdamW
from hybridlm.optim.muon import Muon


@runtime_checkable
class UpdateRule(Protocol):
    """What an update rule answers."""

    def transform(
        self, rate: Callable[[float], optax.Schedule], lr: float, weight_decay: float, info
    ) -> optax.GradientTransformation:
        """The transformation from clipped gradients to updates, learning rates and decay included.

        rate: peak -> learning rate as a function of the updates already applied. lr: the peak for whatever has no
        learning rate of its own. weight_decay: of matrices alone. info: tree like the parameters with the model's
        ParamInfo at each leaf. The state's tree is part of every checkpoint.
        """
        ...


def is_bounded(rule: UpdateRule) -> bool:
    """Whether finite gradients cannot give updates that are not finite, at a learning rate whose square is: a rule says
    so by a property `bounded`. Then a step need not look at its updates before it applies them."""
    return bool(getattr(rule, "bounded", False))


def is_elementwise(rule: UpdateRule) -> bool:
    """Whether a rule updates every number of a parameter by itself, clipping aside, so that devices can update shares
    of it: a rule says so by a property `elementwise`."""
    return bool(getattr(rule, "elementwise", False))


Rule = AdamW | Muon
RULES: tuple[type[Rule], ...] = get_args(Rule)
