# SPDX-License-Identifier: Apache-2.0
"""All ops. A new op is a folder here, whose `__init__` holds `OP`, and its name in NAMES.

Nothing else is put into this module: `pallas_kernels.ops.ssd` is a package, `pallas_kernels.ssd` the function.
"""

import importlib

NAMES = ("attention", "cache_write", "causal_conv1d", "grouped_dot", "selective_scan", "ssd")

OPS = {name: importlib.import_module("." + name, __name__).OP for name in NAMES}
