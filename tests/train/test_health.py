# SPDX-License-Identifier: Apache-2.0
"""What counts as a spike, against NumPy; what a checkpoint keeps of it; which checkpoints stay when a run diverges."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from hybridlm.train.health import Health
from hybridlm.train.keep import Keep
from tests.train.conftest import small_config

SPIKES = ("run.spike_threshold=6", "run.spike_window=8", "run.spike_steps=2")


def by_hand(losses, k=6.0, window=8, in_row=2):
    """Index of the loss at which it is enough; None: never. Spikes are not among those that are compared with."""
    taken, above = [], 0
    for i, loss in enumerate(losses):
        last = np.array(taken[-window:])
        middle = np.median(last) if len(last) else 0.0
        spread = np.median(np.abs(last - middle)) if len(last) else 0.0
        if len(last) == window and spread > 0 and loss > middle + k * spread:
            above += 1
            if above == in_row:
                return i
        else:
            above = 0
            taken.append(loss)
    return None


def first_trouble(health, losses):
    for i, loss in enumerate(losses):
        trouble = health.applied(i, loss)[1]
        if trouble is not None:
            assert trouble.step == i
            return i
    return None


@pytest.mark.parametrize("seed", range(30))
def test_spikes_are_those_of_the_formula(seed):
    rng = np.random.default_rng(seed)
    losses = 3 + 0.1 * rng.standard_t(2 if seed % 2 else 20, 200)
    losses[100:104] += rng.choice([0.0, 0.5, 2.0])
    expected = by_hand(losses)
    assert first_trouble(Health(small_config(*SPIKES)), losses) == expected
    assert first_trouble(Health(small_config()), losses) is None


@pytest.mark.parametrize("seed", range(5))
def test_a_resumed_run_judges_as_the_whole_one(seed):
    rng = np.random.default_rng(seed)
    losses, cut = 3 + 0.1 * rng.standard_t(2, 60), int(rng.integers(1, 60))
    losses[30:33] += 5.0
    whole, before, after = (Health(small_config(*SPIKES)) for _ in range(3))
    judged = [whole.applied(i, loss) for i, loss in enumerate(losses)]
    assert judged[:cut] == [before.applied(i, loss) for i, loss in enumerate(losses[:cut])]
    after.set_state(json.loads(json.dumps(before.state())))
    assert judged[cut:] == [after.applied(i, loss) for i, loss in enumerate(losses[cut:], cut)]
    assert any(above for above, _ in judged) and after.good == whole.good


def test_what_has_no_spread_has_no_spikes_and_other_data_begins_anew():
    health = Health(small_config(*SPIKES))
    assert first_trouble(health, [1.0] * 20 + [9.0] * 5) is None
    health = Health(small_config(*SPIKES))
    assert first_trouble(health, [1.0, 1.1] * 6) is None and health.limit() < 2
    health.other_data()
    assert health.limit() == math.inf and first_trouble(health, [5.0, 5.1] * 6) is None


def test_good_is_what_is_neither_skipped_nor_a_spike():
    health = Health(small_config(*SPIKES, "optim.max_skipped=3"))
    assert health.good and first_trouble(health, [1.0, 1.1] * 6) is None and health.good
    assert health.skipped(12, 1) is None and not health.good and not health.state()["good"]
    assert health.applied(13, 1.0) == (0, None) and health.good
    assert health.applied(14, 9.0) == (1, None) and not health.good
    assert health.skipped(15, 1) is None and health.skipped(16, 2) is None and health.skipped(17, 3).step == 17
    health.set_state(None)
    assert health.good


@pytest.mark.parametrize(
    "state",
    [
        [],
        "x",
        {},
        {"in_row": 0, "above": 0},
        {"in_row": 0, "above": 0, "losses": 1},
        {"in_row": [], "above": 0, "losses": []},
    ],
)
def test_a_state_that_is_none_is_damage(state):
    if not state:
        Health(small_config()).set_state(state)  # as of a checkpoint of before
        return
    with pytest.raises((TypeError, ValueError, KeyError)):
        Health(small_config()).set_state(state)


def staying(keep, steps):
    """Which of the checkpoints stay, the last of them being written."""
    infos = [_Info(step) for step in steps]
    return [info.step for info, stays in zip(infos, keep.should_preserve(infos, context=None), strict=True) if stays]


class _Info(SimpleNamespace):
    def __init__(self, step):
        super().__init__(step=step, metrics=None, time=step)


def test_bad_checkpoints_do_not_take_the_place_of_good_ones():
    there: list[int] = []
    keep = Keep(2, 0, 0, lambda: there)
    for step, good in ((1, True), (2, True), (3, True), (4, False), (5, False), (6, False), (7, True), (8, True)):
        keep.judge(step, good)
        there = staying(keep, [*there, step])
        if step == 6:
            assert there == [2, 3, 6]
    assert there == [7, 8]
    keep.judge(8, False)
    assert staying(keep, there) == [7, 8]
    keep.forget(7)
    assert keep.good(8)
