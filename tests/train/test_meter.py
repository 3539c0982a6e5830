# SPDX-License-Identifier: Apache-2.0
"""Records of intervals: a printed speed is one that was sustained, whatever the loop waits for."""

import math

import jax
import pytest

from hybridlm.config import MeshConfig
from hybridlm.sharding import make_mesh
from hybridlm.train.meter import Meter
from hybridlm.train.metrics import Last, Mean
from tests.train.conftest import small_config

STEP, PAUSE = 2.0, 100.0
"""Seconds of a step, of an evaluation or a save."""


def make_meter(clock=lambda: 0.0):
    config = small_config("run.steps=12")
    return Meter(config, make_mesh(MeshConfig(1), jax.devices()[:1]), 2.0, clock), config


def metrics(nats=20.0, tokens=10.0):
    return {"loss": Mean(nats, tokens), "lr": Last(0.5)}


class FakeRun:
    """The loop's order of calls on a clock that stands still but for what takes time."""

    def __init__(self, in_dispatch: bool, data: float, log_every: int):
        """in_dispatch: the call of a step returns when the step is complete, not when it has begun. data: seconds to
        the next batch."""
        self.now, self.device_free, self.in_dispatch, self.data = 0.0, 0.0, in_dispatch, data
        self.meter, config = make_meter(lambda: self.now)
        self.tokens_per_step = config.data.batch_size * config.data.seq_len
        self.log_every, self.lines, self.pending = log_every, {}, None

    def dispatch(self, step):
        self.now += self.data
        completed = self.device_free = max(self.now, self.device_free) + STEP
        if self.in_dispatch:
            self.now = completed
        before, self.pending = self.pending, (step, completed)
        self.say(before)

    def say(self, pending):
        if pending is None:
            return
        step, completed = pending
        self.now = max(self.now, completed)
        self.meter.add(metrics(), completed)
        if step % self.log_every == 0 or step == 12:
            self.lines[step] = self.meter.values(step)["tokens_per_second"]
            self.meter.restart()

    def pause(self):
        before, self.pending = self.pending, None
        self.say(before)
        self.now += PAUSE
        self.meter.resume()

    def run(self, pauses):
        for step in range(1, 13):
            self.dispatch(step)
            if step in pauses:
                self.pause()
        return {step: speed and speed / self.tokens_per_step for step, speed in self.lines.items()}


@pytest.mark.parametrize("in_dispatch", [False, True], ids=["queued", "in dispatch"])
@pytest.mark.parametrize("log_every", [1, 3, 4, 5])
@pytest.mark.parametrize("pauses", [{12}, {6, 12}, {1, 2, 3, 7, 12}], ids=str)
def test_every_line_has_the_speed_of_the_steps(in_dispatch, log_every, pauses):
    """The last one too, whose step is read right after the one before it."""
    lines = FakeRun(in_dispatch, 0.0, log_every).run(pauses)
    first = lines.pop(1, None)
    assert first is None, "the step that compiles has no speed"
    assert lines == {step: pytest.approx(1 / STEP) for step in lines} and 12 in lines


@pytest.mark.parametrize("log_every", [3, 4])
def test_where_the_data_is_slower_than_the_device(log_every):
    lines = FakeRun(False, 5 * STEP, log_every).run({12})
    assert lines == {step: pytest.approx(1 / (5 * STEP)) for step in lines} and 12 in lines


def test_record():
    meter, config = make_meter()
    assert math.isnan(meter.values(0)["loss"]) and meter.values(0)["tokens_per_second"] is None
    meter.add(metrics(nats=20.0, tokens=10.0), 1.0)
    meter.add(metrics(nats=20.0, tokens=30.0), 3.0)
    record = meter.values(2)
    tokens = config.data.batch_size * config.data.seq_len
    assert record["loss"] == 1.0 and record["bits_per_byte"] == pytest.approx(1 / math.log(2) / 2)
    assert record["lr"] == 0.5 and record["tokens"] == 2 * tokens
    assert record["tokens_per_second"] == tokens / 2.0 and record["seconds_left"] == 10 * 2.0
    assert record["mfu"] is None  # float32: no peak to compare with


def test_steps_whose_completion_is_not_known_are_not_timed():
    """They took 2 seconds each, as the others did, and were noticed together at 7."""
    meter, config = make_meter()
    tokens, speeds = config.data.batch_size * config.data.seq_len, []
    for completed in (1.0, 3.0, None, None, 9.0, 11.0):
        meter.add(metrics(), completed)
        speeds.append(meter.values(0)["tokens_per_second"])
        meter.restart()
    assert speeds == [None, tokens / 2, None, None, None, tokens / 2]


def test_state_goes_on_with_the_interval():
    whole, _ = make_meter()
    parts, _ = make_meter()
    whole.add(metrics(20.0, 10.0), 1.0)
    parts.set_state(whole.state())
    for meter in (whole, parts):
        meter.add(metrics(7.0, 5.0), 2.0)
    assert parts.values(2)["loss"] == whole.values(2)["loss"] == 27.0 / 15.0
