# SPDX-License-Identifier: Apache-2.0
"""What a run says of its steps, each read while the next one is computed."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from hybridlm.config import Config
from hybridlm.train.health import Health, Trouble
from hybridlm.train.meter import Meter
from hybridlm.train.metrics import Metrics, on_host
from hybridlm.train.metrics_log import MetricsLog
from hybridlm.train.progress import Display


class Reports:
    """Shows and records the metrics of steps, one step behind the loop, which never waits for the newest.

    A thread waits for each step, so that the step's time is that of its completion even where the loop is held up by
    the data or by the dispatch of the next step, as it is where a device asks the host for a decision.
    """

    def __init__(
        self, config: Config, display: Display, log: MetricsLog, meter: Meter, health: Health,
        is_held_up: Callable[[], bool] = lambda: False,
    ):  # fmt: skip
        """is_held_up: whether that thread, too, may come to know of a step's completion long after it."""
        self._run, self._is_held_up = config.run, is_held_up
        self._display, self._log, self._meter, self._health = display, log, meter, health
        self._reader = ThreadPoolExecutor(1, "metrics")
        self._pending: tuple[int, Future] | None = None
        self.trouble: Trouble | None = None
        """Why the run cannot go on from here, once that is so."""

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of the step that was dispatched just now; says those of the one before it."""
        before, self._pending = self._pending, (step, self._reader.submit(self._read, metrics))
        self._say(before)

    def flush(self) -> None:
        """Says the last one too, which waits for it: before anything that is not to count as time of the steps."""
        last, self._pending = self._pending, None
        self._say(last)

    def forget(self) -> None:
        """The run has gone back: steps that were dispatched since are not said."""
        self._pending, self.trouble = None, None

    def close(self) -> None:
        """Ends the thread, without waiting for a step that never comes."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _say(self, pending: tuple[int, Future] | None) -> None:
        if pending is None:
            return
        step, (metrics, completed) = pending[0], pending[1].result()
        self._judge(step, metrics)
        self._meter.add(metrics, completed)
        log = step % self._run.log_every == 0 or step == self._run.steps
        values = self._meter.values(step)
        self._display.update(step, values, log)
        if log:
            self._log.write("train", step, values)
            self._meter.restart()

    def _read(self, metrics: Metrics) -> tuple[Metrics, float | None]:
        """The metrics on the host, and when the step that they are of was completed, if known: copies come after it."""
        jax.block_until_ready(metrics)
        completed = None if self._is_held_up() else time.monotonic()
        return on_host(metrics), completed

    def _judge(self, step: int, metrics: Metrics) -> None:
        """Says and records what is wrong with a step; sets `trouble` where it is too much."""
        in_row = int(metrics.pop("skipped_in_row").value())
        if in_row:
            what, numbers = _not_finite(metrics)
            self._display.say(f"step {step}: {what} not finite: skipped ({in_row} in a row)")
            self._log.write("skipped", step, {"what": what, "in_row": in_row, **numbers})
            trouble = self._health.skipped(step, in_row)
        else:
            loss, limit = (metrics["loss"].value() if "loss" in metrics else math.nan), self._health.limit()
            above, trouble = self._health.applied(step, loss)
            if above:
                self._display.say(f"step {step}: loss {loss:.4f} above {limit:.4f} ({above} in a row)")
                self._log.write("spike", step, {"loss": loss, "limit": limit, "in_row": above})
        self.trouble = self.trouble or trouble


def _not_finite(metrics: Metrics) -> tuple[str, dict]:
    """What of a skipped step was not finite, in a word, and the norms that tell."""
    norms = {name: metrics[name].value() for name in ("grad_norm", "update_norm")}
    if not math.isfinite(norms["grad_norm"]):
        return "gradient", norms
    return ("loss" if math.isfinite(norms["update_norm"]) else "update"), norms
