# SPDX-License-Identifier: Apache-2.0
"""The command line: a file a command, a table of them, and what every start does first."""

from hybridlm.errors import importing
from hybridlm.lazy import no_collections

with no_collections(freeze=True), importing():
    from hybridlm.cli.table import main, train_main

__all__ = ["main", "train_main"]
