# SPDX-License-Identifier: Apache-2.0
"""All ops. A new op is a folder here, whose `__init__` holds `OP` and whose `api` the function, and its name in NAMES.

Nothing else is put into this module: `pallas_kernels.ops.ssd` is a package, `pallas_kernels.ssd` the function.
"""

import importlib
from collections.abc import Callable

from pallas_kernels.op import Op

NAMES = (
    "attention",
    "cache_write",
    "causal_conv1d",
    "gated_delta_product",
    "gated_delta_rule",
    "grouped_dot",
    "linear_attention",
    "linear_scan",
    "long_conv",
    "mamba3",
    "mlstm",
    "relative_attention",
    "rwkv4",
    "rwkv7",
    "selected_attention",
    "selective_scan",
    "slstm",
    "ssd",
    "titans",
)

OPS: dict[str, Op] = {name: importlib.import_module("." + name, __name__).OP for name in NAMES}


def function(name: str) -> Callable:
    """The public function of an op."""
    return getattr(importlib.import_module("." + name + ".api", __name__), name)
