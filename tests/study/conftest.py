# SPDX-License-Identifier: Apache-2.0
"""The config file that tests of training have."""

from tests.train.conftest import mini

__all__ = ["mini"]
