# SPDX-License-Identifier: Apache-2.0
"""What a run says of its steps, each read while the next one is computed."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from hybridlm.config import Config
from hybridlm.errors import RunError
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.meter import Meter
from hybridlm.train.metrics import Metrics, on_host
from hybridlm.train.metrics_log import MetricsLog
from hybridlm.train.progress import Display


class Reports:
    """Shows and records the metrics of steps, one step behind the loop, which never waits for the newest.

    A thread waits for each step, so that the step's time is that of its completion even where the loop is held up by
    the data or by the dispatch of the next step, as it is where a device asks the host for a decision.
    """

    def __init__(self, config: Config, display: Display, log: MetricsLog, meter: Meter, checkpoints: Checkpoints):
        self._run, self._max_skipped = config.run, config.optim.max_skipped
        self._display, self._log, self._meter, self._checkpoints = display, log, meter, checkpoints
        self._reader = ThreadPoolExecutor(1, "metrics")
        self._pending: tuple[int, Future] | None = None

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of the step that was dispatched just now; says those of the one before it."""
        before, self._pending = self._pending, (step, self._reader.submit(_read, metrics))
        self._say(before)

    def flush(self) -> None:
        """Says the last one too, which waits for it: before anything that is not to count as time of the steps."""
        last, self._pending = self._pending, None
        self._say(last)

    def close(self) -> None:
        """Ends the thread, without waiting for a step that never comes."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _say(self, pending: tuple[int, Future] | None) -> None:
        if pending is None:
            return
        step, (metrics, completed) = pending[0], pending[1].result()
        in_row = metrics.pop("skipped_in_row").value()
        self._meter.add(metrics, completed)
        self._check_finite(step, in_row)
        log = step % self._run.log_every == 0 or step == self._run.steps
        values = self._meter.values(step)
        self._display.update(step, values, log)
        if log:
            self._log.write("train", step, values)
            self._meter.restart()

    def _check_finite(self, step: int, in_row: int) -> None:
        """RunError after too many steps in a row that were not finite."""
        if in_row:
            self._display.say(f"step {step}: loss or gradient not finite: skipped ({in_row} in a row)")
        if in_row >= self._max_skipped:
            saved = self._checkpoints.newest
            at = "there is no checkpoint" if saved is None else f"the last checkpoint is of step {saved}"
            raise RunError(
                f"step {step}: loss or gradient not finite {in_row} times in a row (optim.max_skipped), none applied; "
                f"{at}; a lower --optim.lr or --optim.clip_norm may help"
            )


def _read(metrics: Metrics) -> tuple[Metrics, float]:
    """The metrics on the host, and when the step that they are of was completed: copies come after it."""
    jax.block_until_ready(metrics)
    completed = time.monotonic()
    return on_host(metrics), completed
