# SPDX-License-Identifier: Apache-2.0
"""A run of seconds for each test."""

import pytest

from tests.faults.runs import write_config
from tests.train.conftest import one_device

__all__ = ["one_device"]


@pytest.fixture
def nano(tmp_path):
    """Path of a config file whose data and run lie in the test's folder."""
    return write_config(tmp_path)
