# SPDX-License-Identifier: Apache-2.0
"""Steps are said one behind the loop, and timed at their completion whatever the loop does meanwhile."""

import time
from contextlib import closing

import jax.numpy as jnp
import pytest

from hybridlm.errors import RunError
from hybridlm.train.metrics import Last
from hybridlm.train.report import Reports
from tests.train.conftest import small_config


class Recorder:
    """Stands in for the display, the log, the meter and the checkpoints: keeps what each is told."""

    def __init__(self):
        self.added, self.said, self.logged, self.newest = [], [], [], 5

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
        self.logged.append(step)


@pytest.fixture
def told():
    return Recorder()


@pytest.fixture
def reports(told):
    config = small_config("run.steps=5", "run.log_every=2", "optim.max_skipped=2")
    with closing(Reports(config, told, told, told, told)) as reports:
        yield reports


def metrics(in_row=0):
    return {"lr": Last(jnp.float32(0.5)), "skipped_in_row": Last(jnp.int32(in_row))}


def test_one_behind_the_loop_until_flushed(reports, told):
    for step in range(1, 6):
        reports.add(step, metrics())
        assert told.said == list(range(1, step))
    reports.flush()
    reports.flush()
    assert told.said == [1, 2, 3, 4, 5]
    assert told.logged == [2, "restart", 4, "restart", 5, "restart"]
    assert [m for m, _ in told.added] == [{"lr": Last(0.5)}] * 5


def test_completion_is_noticed_while_the_loop_is_held_up(reports, told):
    """As by a device that asks the host for a decision in the middle of the next step."""
    reports.add(1, metrics())
    time.sleep(0.5)
    released = time.monotonic()
    reports.add(2, metrics())
    assert told.added[0][1] < released - 0.1


def test_too_many_steps_in_a_row_that_are_not_finite(reports, told):
    reports.add(1, metrics(in_row=1))
    reports.add(2, metrics(in_row=2))
    assert told.said[0] == "step 1: loss or gradient not finite: skipped (1 in a row)"
    with pytest.raises(RunError, match=r"step 2: .* 2 times in a row .* last checkpoint is of step 5"):
        reports.flush()
