# SPDX-License-Identifier: Apache-2.0
"""An interval between two lines of metrics: what its steps report, merged, and their speed."""

import math
import time
from collections.abc import Callable

from hybridlm.config import Config
from hybridlm.model.flops import train_flops
from hybridlm.train.metrics import Metrics, bits_per_byte, from_json, merge, to_json
from hybridlm.train.mfu import mfu
from pallas_kernels import platform


class Meter:
    """Merges the metrics of steps, and times them from the completion of one to that of the next.

    Evaluations and saves are not in the times: each happens between the completion of a step and `resume()`. Nor is the
    first step, which compiles. The metrics travel in the checkpoint, so that a resumed run writes the same records.
    """

    def __init__(
        self, config: Config, mesh, bytes_per_token: float, clock: Callable[[], float] = time.monotonic,
        tokens_before: Callable[[int], int] | None = None,
    ):  # fmt: skip
        """bytes_per_token: of the training text, for bits per byte. clock: seconds, that of `add`'s `completed` too.
        tokens_before: of all batches before a step, which may have been of other sizes; None: they were not."""
        self._steps_total = config.run.steps
        self._tokens_per_step = config.data.batch_size * config.data.seq_len
        self._bytes_per_token = bytes_per_token
        self._flops_per_token = train_flops(config.model, config.data.seq_len)
        self._n_devices = mesh.size
        self._device_kind = platform.device_name() if config.model.compute_dtype == "bfloat16" else "float32"
        self._tokens_before = tokens_before or (lambda step: step * self._tokens_per_step)
        self._metrics: Metrics = {}
        self._seconds, self._timed_steps, self._waited = 0.0, 0, 0.0
        self._clock = clock
        self._since: float | None = None

    def resume(self) -> None:
        """The next step begins now: after an evaluation or a save."""
        self._since = self._clock()

    def restart(self) -> None:
        """Begins the next interval."""
        self._metrics = {}
        self._seconds, self._timed_steps, self._waited = 0.0, 0, 0.0

    def wait(self, seconds: float) -> None:
        """The loop waited so long for a batch."""
        if self._since is not None:
            self._waited += seconds

    def add(self, metrics: Metrics, completed: float | None) -> None:
        """A step's metrics on the host, and when it was completed; None: that is not known, so that neither this step
        nor the next one is timed."""
        if self._since is not None and completed is not None:
            self._seconds += completed - self._since
            self._timed_steps += 1
        self._since = completed
        self._metrics = merge(self._metrics, metrics)

    def values(self, step: int) -> dict:
        """The record of the interval so far. loss: nats per token; NaN where every step of it was skipped. data_wait:
        share of the time in which the loop waited for batches."""
        values = {name: metric.value() for name, metric in self._metrics.items()}
        loss = values.pop("loss", math.nan)
        speed = self._tokens_per_step * self._timed_steps / self._seconds if self._seconds else None
        return {
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, self._bytes_per_token),
            **values,
            "tokens": self._tokens_before(step),
            "tokens_per_second": speed,
            "data_wait": min(self._waited / self._seconds, 1.0) if self._seconds else None,
            "mfu": mfu(speed, self._flops_per_token, self._device_kind, self._n_devices) if speed else None,
            "seconds_left": (self._steps_total - step) * self._tokens_per_step / speed if speed else None,
        }

    def state(self) -> dict:
        """The metrics so far, as JSON."""
        return to_json(self._metrics)

    def set_state(self, state: dict) -> None:
        """The inverse of state(); a new interval is timed."""
        self.restart()
        self._metrics = from_json(state)
