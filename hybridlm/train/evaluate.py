# SPDX-License-Identifier: Apache-2.0
"""The validation text: its metrics, and when a run reads it."""

import time
from collections.abc import Callable, Iterable
from itertools import islice

from hybridlm.config import Config
from hybridlm.train.batches import Batches
from hybridlm.train.metrics import Metrics, bits_per_byte, merge, on_host
from hybridlm.train.metrics_log import MetricsLog
from hybridlm.train.progress import Display


def evaluate(
    eval_step: Callable, params, batches: Iterable[dict], limit: int, stop: Callable[[], bool]
) -> Metrics | None:
    """Metrics of the first `limit` batches together (0: all); None where `stop()` came true on the way.

    eval_step: (params, batch) -> metrics; those of a batch are read while the next one is computed.
    """
    merged, previous = {}, {}
    for batch in islice(batches, limit or None):
        if stop():
            return None
        done, previous = previous, eval_step(params, batch)
        merged = merge(merged, on_host(done))
    return merge(merged, on_host(previous))


class Validation:
    """Evaluations of a run, shown and recorded."""

    def __init__(
        self, config: Config, stats: dict, eval_step: Callable, batches: Batches | None, log: MetricsLog,
        display: Display, stop: Callable[[], bool],
    ):  # fmt: skip
        """stats: the corpus's. batches: of the validation text; None: never evaluate. stop: asked before each batch,
        by every process of a run; True cuts the evaluation short."""
        self._run, self._stats = config.run, stats
        self._eval_step, self._batches = eval_step, batches
        self._log, self._display, self._stop = log, display, stop
        self.result: str | None = None
        """What the last evaluation found, in words."""
        self.losses: dict[int, float] = {}
        """What each found, by step."""

    def due(self, step: int) -> bool:
        """Whether an evaluation follows this step; the one after the last step belongs to the end of the run."""
        every = self._run.eval_every
        return every > 0 and 0 < step < self._run.steps and step % every == 0

    def missed(self, step: int) -> bool:
        """Whether the one that was due at the step that is gone on from was not recorded: a signal came before it."""
        return self.due(step) and not self._log.has("val", step)

    def forget(self, after: int) -> None:
        """The run has gone back to a step."""
        self.losses = {step: loss for step, loss in self.losses.items() if step <= after}

    def read(self, step: int, params) -> bool:
        """Reads the text with the parameters after a step; False where a signal cut that short."""
        if self._batches is None:
            return True
        began = time.monotonic()
        self._batches.loader.reset()
        metrics = evaluate(self._eval_step, params, self._batches, self._run.eval_batches, self._stop)
        if metrics is None:
            return False
        loss = metrics["loss"].value()
        bits, bigram = bits_per_byte(loss, self._stats["val"]["bytes_per_pair"]), self._stats["bigram_bits_per_byte"]
        self.losses[step] = loss
        self._log.write("val", step, {"loss": loss, "bits_per_byte": bits})
        beside = "" if bigram is None else f" (byte bigram: {bigram:.3f})"
        self.result = f"validation {bits:.3f} bits per byte{beside}"
        self._display.say(f"step {step}: {self.result}, loss {loss:.4f}, {time.monotonic() - began:.1f} s")
        return True
