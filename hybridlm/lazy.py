# SPDX-License-Identifier: Apache-2.0
"""What makes imports short: names that are imported when first used, and no search for garbage meanwhile."""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def exporter(package: str, exports: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose public names live in other modules: name -> module. So a config alone does
    not wait for the model's imports."""

    def look_up(name: str):
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(exports[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return look_up


@contextmanager
def no_collections(freeze: bool = False) -> Iterator[None]:
    """Without that search. Of the 13.5 s of CPU time in which `hybrid_1b` is traced and lowered it takes 2, of the 2 s
    in which a start imports what it needs 0.2 to 0.3.

    freeze: what is there at the end is not searched later either; for modules, which stay.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if was:
            gc.enable()
