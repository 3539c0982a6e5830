# SPDX-License-Identifier: Apache-2.0
"""Operators on plain arrays. Recurrences: `ssd`, `selective_scan`, `mamba3`, `gated_delta_rule`, `gated_delta_product`,
`rwkv7`, `rwkv4`, `linear_attention`, `linear_scan`, `mlstm`, `slstm`, `titans`; `attention`,
`relative_attention`, `selected_attention`; convolutions: `causal_conv1d`, `long_conv`; `grouped_dot` for experts;
`cache_write` for decoding. `assume_platform` traces them for another platform than the one at hand.

Knows nothing of Flax, configs or meshes and imports nothing of hybridlm. Importing it has two effects on the process:
with jaxlib 0.10 it adds a flag to XLA_FLAGS (`compat.avoid_faulty_cpu_fusions`), and a finder of earlier module names
to `sys.meta_path` (`moved`). PALLAS_KERNELS_PURE_IMPORT=1 leaves out both.

Segment contract of the sequence operators. `segment_ids_BT` is int32. A change of id between consecutive real tokens
starts a document; nothing passes from one document into the next. Id 0 is padding, wherever it stands (right, left or
inside a document): its outputs and gradients are zero, and it neither changes nor resets any state, so [1, 1, 0, 0, 1]
is one document of three tokens. An initial state continues a row's first document; a final state belongs to its last
one. A row without real tokens returns its initial state.
"""

from pallas_kernels.compat import avoid_faulty_cpu_fusions

avoid_faulty_cpu_fusions()

from pallas_kernels.moved import MOVED, MovedModules  # noqa: E402
from pallas_kernels.ops import NAMES  # noqa: E402
from pallas_kernels.ops.attention.api import attention  # noqa: E402
from pallas_kernels.ops.cache_write.api import cache_write  # noqa: E402
from pallas_kernels.ops.causal_conv1d.api import causal_conv1d  # noqa: E402
from pallas_kernels.ops.gated_delta_product.api import gated_delta_product  # noqa: E402
from pallas_kernels.ops.gated_delta_rule.api import gated_delta_rule  # noqa: E402
from pallas_kernels.ops.grouped_dot.api import grouped_dot  # noqa: E402
from pallas_kernels.ops.linear_attention.api import linear_attention  # noqa: E402
from pallas_kernels.ops.linear_scan.api import linear_scan  # noqa: E402
from pallas_kernels.ops.long_conv.api import long_conv  # noqa: E402
from pallas_kernels.ops.mamba3.api import mamba3  # noqa: E402
from pallas_kernels.ops.mlstm.api import mlstm  # noqa: E402
from pallas_kernels.ops.relative_attention.api import relative_attention  # noqa: E402
from pallas_kernels.ops.rwkv4.api import rwkv4  # noqa: E402
from pallas_kernels.ops.rwkv7.api import rwkv7  # noqa: E402
from pallas_kernels.ops.selected_attention.api import selected_attention  # noqa: E402
from pallas_kernels.ops.selective_scan.api import selective_scan  # noqa: E402
from pallas_kernels.ops.slstm.api import slstm  # noqa: E402
from pallas_kernels.ops.ssd.api import ssd  # noqa: E402
from pallas_kernels.ops.titans.api import titans  # noqa: E402
from pallas_kernels.platform import assume_platform  # noqa: E402

MovedModules(MOVED, {f"{__name__}.{name}": f"{__name__}.ops.{name}" for name in NAMES}).install()

__all__ = [
    "assume_platform",
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
]
