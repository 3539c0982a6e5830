# SPDX-License-Identifier: Apache-2.0
"""When a run is probed, and what it says and records of that. What a probe is stands above: `hybridlm.probes`."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from jax.sharding import Mesh

from hybridlm.config import Config
from hybridlm.data import Corpus
from hybridlm.errors import require
from hybridlm.train.batches import Batches
from hybridlm.train.metrics_log import MetricsLog
from hybridlm.train.progress import Display
from hybridlm.train.step import Program

KIND = "probe"
"""Of its records."""
CHANCE = "chance"
"""Of a record: by the name of a task and length, what a guess comes to."""
SHOWN = 8
"""Numbers that the line of a probe has; the records have all."""


class Probe(Protocol):
    """What a run is probed with."""

    def __call__(self, params, stop: Callable[[], bool]) -> Mapping[str, Any] | None:
        """The values of a record: numbers by name, and tables that are for reports alone. params: the train state's.
        None where `stop()`, asked by every process before each batch, came true."""


class Probes(NamedTuple):
    """How a run gets its probe."""

    check: Callable[[Config], None]
    """ConfigError, one line, for what can be told without the text."""
    open: Callable[[Config, Mesh, Program, Corpus, Mapping[str, Batches]], Probe]
    """The probe; ConfigError. The batches are those of the held-out sets, by name."""


def check(config: Config, probes: Probes | None) -> None:
    """ConfigError where the config asks for probes that cannot be."""
    if config.probe.tasks:
        said = f"probe.tasks ({' '.join(config.probe.tasks)}): this program trains without probes: use hybridlm train"
        require(probes is not None, said)
        probes.check(config)


class Probing:
    """Probes of a run, shown and recorded; none without tasks."""

    def __init__(
        self, config: Config, probe: Probe | None, log: MetricsLog, display: Display, stop: Callable[[], bool]
    ):
        """stop: as of `Validation`."""
        self._every = config.run.eval_every if config.probe.every is None else config.probe.every
        self._steps, self._probe = config.run.steps, probe
        self._log, self._display, self._stop = log, display, stop

    def due(self, step: int) -> bool:
        """Whether a probe follows this step, which is not the last: that is probed at the end of the run."""
        return self._probe is not None and self._every > 0 and 0 < step < self._steps and step % self._every == 0

    def missed(self, step: int) -> bool:
        """Whether the one that was due at the step that is gone on from was not recorded: a signal came before it."""
        return self.due(step) and not self._log.has(KIND, step)

    def read(self, step: int, params) -> bool:
        """Probes the parameters after a step; False where a signal cut that short."""
        if self._probe is None:
            return True
        began = time.monotonic()
        values = self._probe(params, self._stop)
        if values is None:
            return False
        seconds = time.monotonic() - began
        self._log.write(KIND, step, {**values, "seconds": round(seconds, 3)})
        self._display.say(f"step {step}: {_told(values)}, {seconds:.1f} s")
        return True


def _told(values: Mapping[str, Any]) -> str:
    """`probes: mqar/512 0.250 (chance 0.031)`."""
    chance = values.get(CHANCE, {})
    said = [
        f"{name} {value:.3f}" + (f" (chance {chance[name]:.3g})" if name in chance else "")
        for name, value in values.items()
        if isinstance(value, float)
    ]
    return f"probes: {', '.join(said[:SHOWN])}{', ...' if len(said) > SHOWN else ''}"
