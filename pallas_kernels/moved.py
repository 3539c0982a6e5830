# SPDX-License-Identifier: Apache-2.0
"""Module names of before that still import: `import pallas_kernels.dispatch` gives what its names are now."""

import importlib.abc
import importlib.util
import sys
import types
import warnings
from collections.abc import Mapping

MOVED = {
    "pallas_kernels.dispatch": ("pallas_kernels.op", "pallas_kernels.platform"),
}
"""Old module -> the modules that have its names now, asked in this order."""


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by the names of a table; each looks its attributes up where they live now, when first asked."""

    def __init__(self, table: Mapping[str, tuple[str, ...]]):
        self.table = table

    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_loader(fullname, self) if fullname in self.table else None

    def exec_module(self, module: types.ModuleType) -> None:
        places = self.table[module.__name__]
        warnings.warn(f"{module.__name__} is now {' and '.join(places)}", DeprecationWarning, stacklevel=2)

        def look_up(name: str):
            for place in places:
                found = importlib.import_module(place)
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = look_up

    def install(self) -> None:
        """From now on the names import, after all others."""
        sys.meta_path.append(self)
