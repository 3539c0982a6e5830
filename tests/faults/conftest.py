# SPDX-License-Identifier: Apache-2.0
"""A run of seconds for each test."""

import jax
import pytest

from hybridlm.sharding import make_mesh
from tests.faults.runs import write_config


@pytest.fixture
def nano(tmp_path):
    """Path of a config file whose data and run lie in the test's folder."""
    return write_config(tmp_path)


@pytest.fixture
def one_device(monkeypatch):
    """`train` in this process uses the first device alone, as the processes that tests start do."""
    monkeypatch.setattr("hybridlm.train.loop.make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
