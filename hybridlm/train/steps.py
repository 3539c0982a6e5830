# SPDX-License-Identifier: Apache-2.0
"""The steps of a run, one after the other, with what happens between them."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from hybridlm.config import Config
from hybridlm.config.tree import to_dict
from hybridlm.errors import RunError
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.evaluate import Validation
from hybridlm.train.feed import Feed
from hybridlm.train.health import Health
from hybridlm.train.meter import Meter
from hybridlm.train.metrics import numbers
from hybridlm.train.metrics_log import MetricsLog
from hybridlm.train.probing import Probing
from hybridlm.train.progress import Display
from hybridlm.train.recovery import Recovery
from hybridlm.train.report import Reports
from hybridlm.train.step import Program
from hybridlm.train.stop import StopRequest
from hybridlm.train.tokenizer_copy import IDENTITY
from hybridlm.train.trace import Trace
from hybridlm.train.watchdog import Watchdog


@dataclass
class Steps:
    """What the steps of a run need; opened and closed by the run."""

    config: Config
    program: Program
    feed: Feed
    meter: Meter
    health: Health
    recovery: Recovery
    checkpoints: Checkpoints
    validation: Validation
    reports: Reports
    log: MetricsLog
    trace: Trace
    stop: StopRequest
    watchdog: Watchdog
    display: Display
    probing: Probing
    may_write: Callable[[], None]
    tokenizer: str
    """Its fingerprint, which every checkpoint holds."""
    single: bool
    """Whether this process is the only one of the run: it can save without the others."""

    def take(self, step: int, state: dict, began: float) -> tuple[int, dict, bool]:
        """From a step to the last one: (step, state, whether it was stopped before). A checkpoint of that step is being
        written, unless the run has none. began: when the run did, by time.monotonic().

        A step is dispatched before the metrics of the one before it are read: the device never waits for this loop, but
        for evaluations, inspections and saves. Where the run diverges it goes back, and the step with it.
        """
        run, validation, first = self.config.run, self.validation, step + 1
        stopping = not self._caught_up(step, state)
        self.trace.turn(step)
        while step < run.steps and not stopping:
            fetched = time.monotonic()
            batch = self._fetch(step, state)
            if batch is None:
                self._save_now(step, state)
                return step, state, True
            self.meter.wait(time.monotonic() - fetched)
            if _due(run.inspect_every, step + 1):
                self._inspect(step + 1, state, batch)
            with self.watchdog.during("compiling") if step + 1 == first else nullcontext():
                state, metrics = self.program.train_step(state, batch)
            del batch  # freed where the next one is taken, Python's lock would go to the thread that reads on
            step += 1
            if step == first:
                first = None  # a run that goes back may come here again
                now = time.monotonic()
                self.display.say(f"first step after {now - began:.1f} s, {now - fetched:.1f} s of them waiting for it")
                self.stop.arm()
            self.reports.add(step, metrics)
            self.watchdog.step()
            stopping = self.stop.agreed()
            evaluating = (validation.due(step) or self.probing.due(step)) and not stopping
            saving = run.save_every >= 0 and (_due(run.save_every, step) or step == run.steps or stopping)
            between = evaluating or saving or stopping or step == run.steps or self.trace.turns(step)
            if between:
                self.reports.flush()
            if self.reports.trouble is not None:
                step, state = self._go_back(state)
            elif between:
                self.trace.turn(step)
                if evaluating:
                    stopping = not self._evaluate_due(step, state)
                if saving or stopping:
                    self._save(step, state)
                self.meter.resume()
        return step, state, stopping

    def evaluate(self, step: int, state: dict) -> bool:
        """Reads the validation text with the parameters after a step, and probes; False where that was cut short."""
        return self._validate(step, state) and self._probe(step, state)

    def _evaluate_due(self, step: int, state: dict) -> bool:
        """What of it follows this step."""
        read = not self.validation.due(step) or self._validate(step, state)
        return read and (not self.probing.due(step) or self._probe(step, state))

    def _caught_up(self, step: int, state: dict) -> bool:
        """What of it a signal came before, at the step that is gone on from."""
        read = not self.validation.missed(step) or self._validate(step, state)
        return read and (not self.probing.missed(step) or self._probe(step, state))

    def _validate(self, step: int, state: dict) -> bool:
        with self.watchdog.during("the evaluation"):
            return self.validation.read(step, state["params"])

    def _probe(self, step: int, state: dict) -> bool:
        with self.watchdog.during("the probe"):
            return self.probing.read(step, state["params"])

    def _go_back(self, state: dict) -> tuple[int, dict]:
        with self.watchdog.during("going back"):
            step, state = self.recovery.go_back(self.reports.trouble, state)
        self.reports.forget()
        self.meter.resume()
        return step, state

    def _inspect(self, step: int, state: dict, batch: dict) -> None:
        """Records what the parts of the model do in the step that comes next, as it will be."""
        self.reports.flush()
        with self.watchdog.during("the inspection"):
            self.log.write("inspect", step, numbers(self.program.inspect(state, batch)))
        self.meter.resume()

    def _save(self, step: int, state: dict) -> None:
        if self.config.run.save_every < 0:
            return
        self.may_write()
        with self.watchdog.during("saving"):
            for at, loss in self.validation.losses.items():
                self.checkpoints.rate(at, loss)
            loop = {"data": self.feed.state(), "meter": self.meter.state(), "health": self.health.state()}
            loop |= {IDENTITY: self.tokenizer, "val_loss": self.validation.losses.get(step)}
            self.checkpoints.save(step, state, to_dict(self.config), loop)

    def _save_now(self, step: int, state: dict) -> None:
        """The steps so far, where they are not saved yet and no next one is coming."""
        self.reports.flush()
        if step not in (0, self.checkpoints.newest):
            self._save(step, state)

    def _fetch(self, step: int, state: dict) -> dict | None:
        """The next batch; where there is none to be had, the steps so far are saved before the run ends."""
        try:
            return self.feed.next(last=step + 1 == self.config.run.steps)
        except RunError as error:
            if not self.single:
                raise
            self._save_now(step, state)
            self.checkpoints.wait()
            saved = self.checkpoints.newest
            line = f"{error}; " + ("nothing was saved" if saved is None else f"the last checkpoint is of step {saved}")
            self.feed.leave_if_stuck(error.exit_code, f"error: {line}")
            raise type(error)(line) from error


def _due(every: int, step: int) -> bool:
    """Whether what comes every so many steps (0: never) follows this step."""
    return every > 0 and step % every == 0
