# SPDX-License-Identifier: Apache-2.0
"""Module names of before that still import: `import pallas_kernels.dispatch` gives what its names are now.

They are found by one entry of `sys.meta_path` for each of the packages, the last one, which is asked for modules that
nothing else has; PALLAS_KERNELS_PURE_IMPORT=1 leaves it out, and with it these names.
"""

import importlib.abc
import importlib.util
import sys
import types
import warnings
from collections.abc import Mapping

from pallas_kernels.compat import imports_purely

MOVED = {
    "pallas_kernels.dispatch": ("pallas_kernels.op", "pallas_kernels.platform"),
}
"""Old module -> the modules that have its names now, asked in this order."""


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by the names of a table; each looks its attributes up where they live now, when first asked."""

    def __init__(self, table: Mapping[str, tuple[str, ...]], functions: Mapping[str, str] = {}):
        """functions: what looks like a module and is none, with the package that may be meant."""
        self.table, self.functions = table, functions

    def find_spec(self, fullname, path=None, target=None):
        if fullname in self.functions:
            where = self.functions[fullname]
            raise ModuleNotFoundError(f"{fullname} is a function; its package is {where}", name=fullname)
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

        vars(module)["__getattr__"] = look_up

    def install(self) -> None:
        """From now on the names import, after all others."""
        if not imports_purely():
            sys.meta_path.append(self)
