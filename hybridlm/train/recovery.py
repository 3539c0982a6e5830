# SPDX-License-Identifier: Apache-2.0
"""Going back to a good checkpoint when a run diverges, and on without the batches that it read since.

A checkpoint is good if the step before it was neither skipped nor a spike (`train.health`). A run goes back to the
newest one; if it fails once more before it is past the step at which it failed, to the one before that. All processes
of a run see the same numbers, and so go back together.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import jax

from hybridlm.cluster import from_first
from hybridlm.config import Config
from hybridlm.errors import RunError
from hybridlm.optim import OptimConfig
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.evaluate import Validation
from hybridlm.train.feed import Feed
from hybridlm.train.health import Health, Trouble
from hybridlm.train.meter import Meter
from hybridlm.train.metrics_log import MetricsLog
from hybridlm.train.rollback import Rollback
from hybridlm.train.run_folder import record_of


@dataclass
class Recovery:
    """What going back needs, and how often it was done."""

    config: Config
    state_like: dict
    path: Path
    """The run's folder."""
    checkpoints: Checkpoints
    feed: Feed
    meter: Meter
    health: Health
    validation: Validation
    log: MetricsLog
    say: Callable[[str], None]
    may_write: Callable[[], None]
    resume: str
    """The command that goes on with the run."""
    _in_row: int = field(default=0, init=False)
    """Times, since the run was last past a step at which it failed."""
    _last: int = field(default=0, init=False)
    """Step that it went back to last."""
    _failed: int = field(default=-1, init=False)
    """The latest step at which it failed."""

    def go_back(self, trouble: Trouble, state: dict) -> tuple[int, dict]:
        """(step, state) of the checkpoint to go on from; batches, records and checkpoints are as they were there. The
        state given is deleted.

        RunError, one line that says how to go on, where there is none, or it was done often enough: the run then
        stands at the checkpoint that it would have gone back to.
        """
        self.may_write()
        self.checkpoints.wait()
        steps = self._candidates(trouble.step)
        if not steps or self._in_row >= self.config.run.max_rollbacks:
            self._give_up(trouble, steps)
        read = self.feed.state()
        for leaf in jax.tree.leaves(state):  # there is no room for two
            leaf.delete()

        def check(record: dict) -> None:
            resumable(self.meter, self.health, record)
            self.feed.go_back(record["data"], 0)

        try:
            step, state, record = self.checkpoints.restore_latest(self.state_like, steps, check)
        except RunError as error:
            raise RunError(f"step {trouble.step}: {trouble.why}; {error}") from error
        left_out = trouble.step - step + _left_out(read, step) - _left_out(record["data"], step)
        self.feed.go_back(record["data"], left_out)
        self._in_row, self._last, self._failed = self._in_row + 1, step, max(self._failed, trouble.step)
        later = self._stand_at(step, left_out)
        told = {"failed_at": trouble.step, "why": trouble.why, "in_row": self._in_row, "superseded": later}
        self.log.write("rollback", step, told)
        self.log.write("window", step, {"batches": left_out, "failed_at": trouble.step})
        self.say(
            f"step {trouble.step}: {trouble.why}: back to the checkpoint of step {step}, without the next {left_out} "
            f"batches ({self._in_row} of {self.config.run.max_rollbacks} times)"
        )
        return step, state

    def _candidates(self, failed: int) -> list[int]:
        """Steps of the checkpoints to go back to, the best last."""
        good = [step for step in self.checkpoints.good_steps() if step < failed]
        if not good or good[-1] > self._failed:
            self._in_row = 0
            return good
        return [step for step in good if step < self._last] or good[:1]

    def _stand_at(self, step: int, left_out: int) -> list[int]:
        """Makes the checkpoint of a step the newest of the run, whatever stops this on the way; steps of those that
        were later."""
        rollback = Rollback(step, left_out, False, self.config.run.from_step)
        write = lambda done: from_first(lambda: rollback._replace(done=done).write(rollback_file(self.path)))
        write(False)
        later = self.checkpoints.supersede(after=step)
        write(True)
        self.log.rewind(step)
        self.validation.forget(step)
        return later

    def _give_up(self, trouble: Trouble, steps: list[int]) -> None:
        run, step = self.config.run, steps[-1] if steps else 0
        before = f"after {self._in_row} times back (run.max_rollbacks {run.max_rollbacks})"
        if not steps:
            before = "no good checkpoint to go back to" + (" (run.save_every -1)" if run.save_every < 0 else "")
        left_out = 0
        if steps and run.max_rollbacks:
            data = from_first(lambda: record_of(self.path, step)).get(
                "data"
            )  # not verified: that is for the next start
            with contextlib.suppress(AttributeError, KeyError, TypeError):
                left_out = trouble.step - step + _left_out(self.feed.state(), step) - _left_out(data, step)
        self._stand_at(step, left_out)
        self.log.write("gave_up", step, {"failed_at": trouble.step, "why": trouble.why, "in_row": self._in_row})
        self.log.flush()
        stands = f"the run stands at the checkpoint of step {step}" if steps else "the run begins again"
        lr = self.config.optim.lr / 10 if math.isfinite(self.config.optim.lr) else OptimConfig.lr
        raise RunError(
            f"step {trouble.step}: {trouble.why}; {before}: {stands}; a lower rate may help: "
            f"{self.resume} --optim.lr={lr:g}"
        )


def rollback_file(path: Path) -> Path:
    """Where a run's folder has what it went back to."""
    return path / "rollback.json"


def resumable(meter: Meter, health: Health, record: dict) -> None:
    """Sets both as a checkpoint's record has them; raises where it does not."""
    meter.set_state(record["meter"])
    health.set_state(record.get("health"))


def _left_out(data: dict, step: int) -> int:
    """Batches that a state of the data leaves out at a step or later."""
    return sum(entry["skipped"] for entry in data.get("entries", ()) if entry["step"] >= step)


def told(records: Iterable[dict]) -> tuple[dict[str, int], str]:
    """What of this there is in the records of a run: {"rollbacks": 1, ...}, and in words, "" where there is nothing."""
    by_kind: dict[str, list[dict]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    left_out = {
        record["step"]: _count(record, "batches") for record in by_kind.get("window", ())
    }  # the last one counts
    rollbacks = before = 0
    for in_row in (_count(record, "in_row") for record in by_kind.get("rollback", ())):
        rollbacks += in_row - before if in_row > before else in_row  # one that went further back took away the others
        before = in_row
    counts = {
        "rollbacks": rollbacks, "batches_left_out": sum(left_out.values()),
        "skipped_steps": len(by_kind.get("skipped", ())), "spikes": len(by_kind.get("spike", ())),
    }  # fmt: skip
    words = {"rollbacks": "times gone back", "batches_left_out": "batches left out", "skipped_steps": "steps skipped"}
    words["spikes"] = "steps far above the loss before"
    return counts, ", ".join(f"{words[name]}: {n}" for name, n in counts.items() if n)


def _count(record: dict, name: str) -> int:
    """A number of a record, which may hold anything."""
    value = record.get(name)
    return value if isinstance(value, int) and value > 0 else 0
