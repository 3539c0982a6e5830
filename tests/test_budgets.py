# SPDX-License-Identifier: Apache-2.0
"""No change raises what a published pod setting exchanges or holds by more than 2%; `tests/budgets.py` has how to write
the figures anew where that is meant."""

import pytest

from hybridlm.config.find import pod_names
from tests import budgets

pytestmark = pytest.mark.libtpu
QUICK = ("hybrid_125m:v5p:2x2x1", "hybrid_8b:v5p:8x8x16")
"""Compiled whenever the compiler is there; the others are slow tests."""


@pytest.mark.parametrize("name", pod_names())
def test_traced(name):
    with budgets.setting(name) as run:
        assert budgets.raised(budgets.traced(run)[0], budgets.read()[name]["traced"]) == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in pod_names()])
def test_compiled(name):
    with budgets.setting(name) as run:
        assert budgets.raised(budgets.compiled(run.trace()), budgets.read()[name]["compiled"]) == []
