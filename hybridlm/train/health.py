# SPDX-License-Identifier: Apache-2.0
"""Whether a run is sound: steps that are not finite, and losses far above those before them."""

import math
from collections import deque
from statistics import median
from typing import NamedTuple

from hybridlm.config import Config


class Trouble(NamedTuple):
    """Why a run cannot go on from where it is."""

    step: int
    """The step at which it was enough."""
    why: str
    """In words, without the step."""


class Health:
    """Judges one step after the other. What it remembers is part of every checkpoint."""

    def __init__(self, config: Config):
        self._run, self._max_skipped = config.run, config.optim.max_skipped
        self._losses: deque[float] = deque(maxlen=self._run.spike_window)
        self._in_row = self._above = 0

    @property
    def good(self) -> bool:
        """Whether the newest step was neither skipped nor a spike: its parameters can be gone back to."""
        return not self._in_row and not self._above

    def state(self) -> dict:
        """As a checkpoint keeps it."""
        losses = list(self._losses) if self._run.spike_threshold else []
        return {"good": self.good, "in_row": self._in_row, "above": self._above, "losses": losses}

    def set_state(self, state: dict | None) -> None:
        """The inverse of state(); None: of a checkpoint of before. Raises TypeError, ValueError or KeyError."""
        state = state or {"in_row": 0, "above": 0, "losses": []}
        losses = [float(loss) for loss in state["losses"]]
        self._losses = deque(losses if all(map(math.isfinite, losses)) else [], self._run.spike_window)
        self._in_row, self._above = int(state["in_row"]), int(state["above"])

    def other_data(self) -> None:
        """Losses of before do not say what those from here on should be."""
        self._losses.clear()
        self._above = 0

    def skipped(self, step: int, in_row: int) -> Trouble | None:
        """Takes a step that was not applied, the in_row-th one after the other."""
        self._in_row = in_row
        if in_row < self._max_skipped:
            return None
        return Trouble(
            step, f"loss, gradient or update not finite {in_row} times in a row (optim.max_skipped), none applied"
        )

    def limit(self) -> float:
        """The loss above which the next one is a spike; infinite where there is no telling yet."""
        if not self._run.spike_threshold or len(self._losses) < self._run.spike_window:
            return math.inf
        middle = median(self._losses)
        spread = median(abs(loss - middle) for loss in self._losses)
        return middle + self._run.spike_threshold * spread if spread else math.inf

    def applied(self, step: int, loss: float) -> tuple[int, Trouble | None]:
        """Takes the loss of a step that was applied: (the how many one above the limit in a row, 0: it is not, what is
        wrong). A spike is not among those that the next ones are compared with."""
        self._in_row, limit = 0, self.limit()
        if not loss > limit:
            self._above = 0
            if self._run.spike_threshold and math.isfinite(loss):
                self._losses.append(loss)
            return 0, None
        self._above += 1
        if self._above < self._run.spike_steps:
            return self._above, None
        return self._above, Trouble(
            step,
            f"loss above {limit:.4g}, {self._run.spike_threshold:g} median deviations over the median of the last "
            f"{self._run.spike_window}, {self._above} times in a row (run.spike_steps)",
        )
