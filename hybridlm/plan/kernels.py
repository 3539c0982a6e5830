# SPDX-License-Identifier: Apache-2.0
"""What Pallas kernels cost by their names, as their ops say."""

import pkgutil
from collections.abc import Sequence

from pallas_kernels import exponentials, gated_head_norm, gated_norm, gated_product, head_norm, rms_norm
from pallas_kernels.cost import Array, KernelCost
from pallas_kernels.ops import OPS

COSTS = {kernel: count for op in OPS.values() for kernel, count in op.costs.items()}
"""Kernel -> "module:function", see `Op.costs`."""
GPU_COSTS = {kernel: count for op in OPS.values() for kernel, count in op.gpu_costs.items()}
GPU_COSTS |= exponentials.COSTS | gated_head_norm.COSTS | gated_norm.COSTS | gated_product.COSTS
GPU_COSTS |= head_norm.COSTS | rms_norm.COSTS
"""Likewise of kernels for GPUs, which may have the same names."""


def kernel_cost(
    name: str, operands: Sequence[Array], results: Sequence[Array], *, gpu: bool = False
) -> KernelCost | None:
    """Of one call; None for a kernel that no op names. operands, results: as the kernel has them, in its order."""
    costs = GPU_COSTS if gpu else COSTS
    if name not in costs:
        return None
    flops = pkgutil.resolve_name(costs[name])(list(operands), list(results))
    return KernelCost(flops, sum(array.bytes for array in (*operands, *results)))
