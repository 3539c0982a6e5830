# SPDX-License-Identifier: Apache-2.0
"""No change raises what a published pod setting exchanges or holds by more than 2%; `tests/budgets.py` has how to write
the figures anew where that is meant."""

import pytest

from hybridlm.config.find import pod_names
from hybridlm.plan.budget import raised
from tests import budgets

BUDGETS = budgets.read()
QUICK = ("hybrid_125m:v5p:2x2x1", "hybrid_8b:v5p:8x8x16")
"""Compiled whenever the compiler is there; the others are slow tests."""


def slow_but(name: str):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


def test_every_setting_has_a_budget():
    assert list(BUDGETS) == pod_names()
    assert all(budget["traced"] and budget["compiled"] for budget in BUDGETS.values())


def test_what_is_raised():
    budget = {"peak bytes": 100, "all-gather fsdp runs": 4}
    assert raised({"peak bytes": 102, "all-gather fsdp runs": 1}, budget) == []
    figures = {"peak bytes": 103, "all-gather fsdp runs": 5, "all-reduce tensor bytes": 7}
    assert raised(figures, budget) == [
        "peak bytes: 103, budget 100",
        "all-gather fsdp runs: 5, budget 4",
        "all-reduce tensor bytes: 7, budget 0",
    ]


@pytest.mark.libtpu
@pytest.mark.parametrize("name", BUDGETS)
def test_traced(name):
    with budgets.setting(name) as run:
        assert raised(budgets.traced(run)[0], BUDGETS[name]["traced"]) == []


@pytest.mark.libtpu
@pytest.mark.parametrize("name", [slow_but(name) for name in BUDGETS])
def test_compiled(name):
    with budgets.setting(name) as run:
        assert raised(budgets.compiled(run.trace()), BUDGETS[name]["compiled"]) == []
