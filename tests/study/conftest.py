# SPDX-License-Identifier: Apache-2.0
"""What tests of training have, for those here that train."""

from tests.train.conftest import mini, one_device
from tests.train.test_run import stop_at

__all__ = ["mini", "one_device", "stop_at"]
