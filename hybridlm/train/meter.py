# SPDX-License-Identifier: Apache-2.0
"""Running means between two lines of metrics: loss over all tokens, speed without evaluations and saves."""

import time

import jax

from hybridlm.config import Config
from hybridlm.model.flops import train_flops
from hybridlm.model.statistics import statistics
from hybridlm.train.evaluate import bits_per_byte
from hybridlm.train.metrics import mfu


class Meter:
    """Adds up steps; its sums travel in the checkpoint, so that a resumed run writes the same records."""

    def __init__(self, config: Config, mesh, bytes_per_token: float):
        """bytes_per_token: of the training text, for bits per byte."""
        self._steps_total = config.run.steps
        self._tokens_per_step = config.data.batch_size * config.data.seq_len
        self._bytes_per_token = bytes_per_token
        self._flops_per_token = train_flops(config.model, config.data.seq_len)
        self._n_devices = mesh.size
        self._device_kind = jax.devices()[0].device_kind if config.model.compute_dtype == "bfloat16" else "float32"
        self._sums = {"nats": 0.0, "z": 0.0, "tokens": 0.0}
        self._statistics = statistics(config.model)
        self._sums |= dict.fromkeys(self._statistics, 0.0)
        self._last: dict = {}
        self._seconds, self._timed_steps = 0.0, 0
        self._seen = time.monotonic()

    def resume(self) -> None:
        """The clock starts again here: after compiling, evaluating or saving."""
        self._seen = time.monotonic()

    def restart(self) -> None:
        """Begins the next interval."""
        self._sums = dict.fromkeys(self._sums, 0.0)
        self._seconds, self._timed_steps = 0.0, 0

    def add(self, metrics: dict) -> None:
        """A step's metrics on the host, when it is finished. The loss of a skipped step is left out of the mean."""
        now = time.monotonic()
        self._seconds, self._timed_steps, self._seen = self._seconds + now - self._seen, self._timed_steps + 1, now
        if not metrics["skipped_in_row"]:
            for name in self._sums:
                self._sums[name] += float(metrics[name])
        self._last = metrics

    def values(self, step: int) -> dict:
        """The record of the interval so far. loss: nats per token; NaN where every step of it was skipped."""
        tokens = self._sums["tokens"]
        loss = self._sums["nats"] / tokens if tokens else float("nan")
        speed = self._tokens_per_step * self._timed_steps / self._seconds if self._seconds else None
        of_blocks = {
            name: self._sums[name] / (1 if kind.batches == "sum" else tokens or 1)
            for name, kind in self._statistics.items()
        }
        used = mfu(speed, self._flops_per_token, self._device_kind, self._n_devices) if speed else None
        return {
            "loss": loss,
            "bits_per_byte": bits_per_byte(loss, self._bytes_per_token),
            "z": self._sums["z"] / tokens if tokens else float("nan"),
            **of_blocks,
            "grad_norm": float(self._last["grad_norm"]),
            "lr": float(self._last["lr"]),
            "skipped": int(self._last["skipped"]),
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": speed,
            "mfu": used,
            "seconds_left": (self._steps_total - step) * self._tokens_per_step / speed if speed else None,
        }

    def state(self) -> dict:
        """The sums, as JSON."""
        return dict(self._sums)

    def set_state(self, state: dict) -> None:
        """The inverse of state()."""
        self._sums = {name: float(state[name]) for name in self._sums}
