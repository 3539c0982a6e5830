# SPDX-License-Identifier: Apache-2.0
"""Public names of a package, imported when first used, so that a config alone does not wait for the model's imports."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def exporter(package: str, exports: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names live in other modules: name -> module."""

    def look_up(name: str):
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(exports[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up
