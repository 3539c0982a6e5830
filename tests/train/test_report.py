# SPDX-License-Identifier: Apache-2.0
"""Steps are said one behind the loop, and timed at their completion whatever the loop does meanwhile."""

import time
from contextlib import closing

import jax.numpy as jnp
import pytest

from hybridlm.train.health import Health
from hybridlm.train.metrics import Last, Mean
from hybridlm.train.report import Reports
from tests.train.conftest import small_config


class Recorder:
    """Stands in for the display, the log and the meter: keeps what each is told."""

    def __init__(self):
        self.added, self.said, self.logged, self.events = [], [], [], []

    def add(self, metrics, completed):
        self.added.append((metrics, completed))

    def values(self, step):
        return {"loss": 0.0}

    def restart(self):
        self.logged.append("restart")

    def say(self, line):
        self.said.append(line)

    def update(self, step, values, log):
        self.said.append(step)

    def write(self, kind, step, values):
        self.logged.append(step) if kind == "train" else self.events.append((kind, step, values))


@pytest.fixture
def told():
    return Recorder()


@pytest.fixture
def reports(told):
    config = small_config("run.steps=5", "run.log_every=2", "optim.max_skipped=2")
    with closing(Reports(config, told, told, told, Health(config))) as reports:
        yield reports


def metrics(in_row=0, grad_norm=1.0, update_norm=1.0):
    values = {"lr": 0.5, "grad_norm": grad_norm, "update_norm": update_norm}
    last = {name: Last(jnp.float32(value)) for name, value in values.items()}
    loss = Mean(jnp.float32(0.0 if in_row else 6.0), jnp.float32(0.0 if in_row else 2.0))
    return {"loss": loss, **last, "skipped_in_row": Last(jnp.int32(in_row))}


def test_one_behind_the_loop_until_flushed(reports, told):
    for step in range(1, 6):
        reports.add(step, metrics())
        assert told.said == list(range(1, step))
    reports.flush()
    reports.flush()
    assert told.said == [1, 2, 3, 4, 5]
    assert told.logged == [2, "restart", 4, "restart", 5, "restart"]
    assert [(m["lr"], m["loss"].value()) for m, _ in told.added] == [(Last(0.5), 3.0)] * 5
    assert "skipped_in_row" not in told.added[0][0] and reports.trouble is None and told.events == []


def test_completion_is_noticed_while_the_loop_is_held_up(reports, told):
    """As by a device that asks the host for a decision in the middle of the next step."""
    reports.add(1, metrics())
    time.sleep(0.5)
    released = time.monotonic()
    reports.add(2, metrics())
    assert told.added[0][1] < released - 0.1


def test_where_completion_may_be_noticed_late_it_is_not_known(told):
    config, held = small_config("run.steps=3"), []
    with closing(Reports(config, told, told, told, Health(config), lambda: bool(held))) as reports:
        for step in (1, 2, 3):
            held[:] = ["up"] if step == 2 else []
            reports.add(step, metrics())
            reports.flush()
    assert [completed is None for _, completed in told.added] == [False, True, False]


def test_too_many_steps_in_a_row_that_are_not_finite(reports, told):
    inf = float("inf")
    reports.add(1, metrics(1))
    reports.add(2, metrics(2, grad_norm=inf))
    assert told.said[0] == "step 1: loss not finite: skipped (1 in a row)" and reports.trouble is None
    reports.add(3, metrics(3, update_norm=inf))
    assert told.said[2] == "step 2: gradient not finite: skipped (2 in a row)"
    trouble = reports.trouble
    assert trouble.step == 2 and "not finite 2 times in a row (optim.max_skipped)" in trouble.why
    reports.flush()
    assert told.said[4] == "step 3: update not finite: skipped (3 in a row)" and reports.trouble == trouble
    assert [(kind, step, values["what"], values["in_row"]) for kind, step, values in told.events] == [
        ("skipped", 1, "loss", 1), ("skipped", 2, "gradient", 2), ("skipped", 3, "update", 3)
    ]  # fmt: skip
    reports.add(4, metrics(4))
    reports.forget()
    reports.flush()
    assert reports.trouble is None and len(told.events) == 3
