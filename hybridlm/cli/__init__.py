# SPDX-License-Identifier: Apache-2.0
"""The command line: a file a command, a table of them, and what every start does first."""

from hybridlm.errors import importing

with importing():
    from hybridlm.cli.table import main, train_main

__all__ = ["main", "train_main"]
