# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run stay: Orbax's policies, any of which is enough."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any


class Keep:
    """What Orbax asks of a `preservation_policy`: the newest few, those of every so many steps, the best few."""

    def __init__(self, newest: int, every: int, best: int, finished: Callable[[], Sequence[int]]):
        """every, best: 0: none on that account. finished: steps of the checkpoints that are there."""
        from orbax.checkpoint.checkpoint_managers import BestN, EveryNSteps, LatestN

        self._newest, self._every = LatestN(newest), EveryNSteps(every) if every else None
        self._by_loss = BestN(get_metric_fn=lambda loss: loss, reverse=True, n=best)
        self._finished = finished
        self.losses: dict[int, float] = {}
        """Validation loss at a step; a step without one is not among the best."""
        self._bad: set[int] = set()

    def rate(self, step: int, loss: Any) -> None:
        """Takes the validation loss of a step; what is no finite number is none."""
        if isinstance(loss, int | float) and not isinstance(loss, bool) and math.isfinite(loss):
            self.losses[step] = float(loss)

    def judge(self, step: int, good: bool) -> None:
        """Takes whether the steps right before a checkpoint were sound; one of which nothing is known counts as so."""
        (self._bad.discard if good else self._bad.add)(step)

    def good(self, step: int) -> bool:
        """What `judge` was told."""
        return step not in self._bad

    def forget(self, after: int) -> None:
        """The run has gone back: what was known of later steps is of others."""
        self.losses = {step: loss for step, loss in self.losses.items() if step <= after}
        self._bad = {step for step in self._bad if step <= after}

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        """Which of the checkpoints, oldest first, the last of them being written, stay.

        A folder that Orbax takes for a checkpoint and that is none of a run's stays and does not count. Nor does one
        that was saved while the run diverged, which stays as long as it is the last one.
        """
        finished = {*self._finished(), *(info.step for info in checkpoints[-1:])}
        ours = [info for info in checkpoints if info.step in finished]
        rated = [replace(info, metrics=self.losses[info.step]) for info in ours if info.step in self.losses]
        good = [info for info in ours if self.good(info.step)]
        staying = {info.step for info in checkpoints} - finished | {info.step for info in ours[-1:]}
        for policy, infos in ((self._newest, good), (self._every, ours), (self._by_loss, rated)):
            if infos and policy is not None:
                flags = policy.should_preserve(infos, context=context)
                staying |= {info.step for info, stays in zip(infos, flags, strict=True) if stays}
        return [info.step in staying for info in checkpoints]
