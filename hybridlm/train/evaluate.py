# SPDX-License-Identifier: Apache-2.0
"""The held-out sets: their metrics, and when a run reads them."""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from itertools import islice

from hybridlm.config import Config
from hybridlm.data import Corpus
from hybridlm.train.batches import Batches
from hybridlm.train.metrics import Mean, Metrics, bits_per_byte, merge, on_host
from hybridlm.train.metrics_log import MetricsLog
from hybridlm.train.progress import Display

SHOWN = 8
"""Sets that the line of an evaluation has; the records have all."""


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
        self, config: Config, corpus: Corpus, eval_step: Callable, batches: Mapping[str, Batches], log: MetricsLog,
        display: Display, stop: Callable[[], bool],
    ):  # fmt: skip
        """batches: of the sets of `corpus.held_out` by name; none: never evaluate. stop: asked before each batch, by
        every process of a run; True cuts the evaluation short."""
        self._run, self._bigram = config.run, corpus.stats["bigram_bits_per_byte"]
        self._bytes_per_pair = {name: of.stats["val"]["bytes_per_pair"] for name, of in corpus.held_out.items()}
        self._eval_step, self._batches = eval_step, batches
        self._log, self._display, self._stop = log, display, stop
        self.result: str | None = None
        """What the last evaluation found, in words."""
        self.losses: dict[int, float] = {}
        """What each found in all sets together, by step."""

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
        """Reads all sets with the parameters after a step; False where a signal cut that short."""
        if not self._batches:
            return True
        began = time.monotonic()
        losses = {}
        for name, batches in self._batches.items():
            batches.loader.reset()
            metrics = evaluate(self._eval_step, params, batches, self._run.eval_batches, self._stop)
            if metrics is None:
                return False
            losses[name] = metrics["loss"]
        values = self._values(losses)
        self.losses[step] = values["loss"]
        self._log.write("val", step, values)
        self.result = f"validation {values['bits_per_byte']:.3f} bits per byte{self._beside(values)}"
        self._display.say(f"step {step}: {self.result}, loss {values['loss']:.4f}, {time.monotonic() - began:.1f} s")
        return True

    def _values(self, losses: Mapping[str, Mean]) -> dict[str, float]:
        """Loss and bits per byte of all sets together, under those names; where there are several of each, too."""
        total = reduce(Mean.merge, losses.values())
        n_bytes = sum(loss.weight * self._bytes_per_pair[name] for name, loss in losses.items())
        several = len(losses) > 1
        per_pair = n_bytes / total.weight if several and total.weight else next(iter(self._bytes_per_pair.values()))
        values = {"loss": total.value(), "bits_per_byte": bits_per_byte(total.value(), per_pair)}
        for name, loss in losses.items() if several else ():
            values[f"loss/{name}"] = loss.value()
            values[f"bits_per_byte/{name}"] = bits_per_byte(loss.value(), self._bytes_per_pair[name])
        return values

    def _beside(self, values: Mapping[str, float]) -> str:
        """The sets, or what a bigram comes to, in words."""
        if len(self._batches) == 1:
            return "" if self._bigram is None else f" (byte bigram: {self._bigram:.3f})"
        shown = [f"{name} {values[f'bits_per_byte/{name}']:.3f}" for name in self._batches]
        return f" ({', '.join(shown[:SHOWN])}{', ...' if len(shown) > SHOWN else ''})"
