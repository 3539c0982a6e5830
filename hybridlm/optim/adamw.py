# SPDX-License-Identifier: Apache-2.0
"""AdamW (Loshchilov and Hutter 2019, "Decoupled weight decay regularization")."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import optax

from hybridlm.errors import require
from hybridlm.fields import check_fields


@dataclass(frozen=True)
class AdamW:
    """AdamW for all parameters, at optim.lr; matrices alone are decayed."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decays of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self):
        check_fields(self)
        require(all(0 <= beta < 1 for beta in self.betas), f"betas ({self.betas}) must be in [0, 1)")
        require(self.eps > 0, f"eps ({self.eps}) must be positive")

    @property
    def bounded(self) -> bool:
        """Whether finite gradients cannot give updates that are not finite (see `optim.rules.is_bounded`).

        The first moment is at most (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) times the root of the second, by Cauchy
        and Schwarz, if b1^2 < b2: in float32, in which both are.
        """
        first, second, eps = np.float32(self.betas[0]), np.float32(self.betas[1]), np.float32(self.eps)
        return bool(first * first < second < 1 and eps > 0)

    @property
    def elementwise(self) -> bool:
        """See `optim.rules.is_elementwise`."""
        return True

    def transform(
        self, rate: Callable[[float], optax.Schedule], lr: float, weight_decay: float, info
    ) -> optax.GradientTransformation:
        """As of every update rule; see rules.py."""
        matrices = jax.tree.map(lambda leaf: leaf.kind == "matrix", info)
        adam = optax.scale_by_adam(*self.betas, eps=self.eps)
        decay = optax.add_decayed_weights(weight_decay, mask=matrices)
        return optax.chain(adam, decay, optax.scale_by_learning_rate(rate(lr)))
