# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the matrix products of compiled programs: two for each multiply-add that a product needs.

TPUs write products as convolutions, some with batches as windows over padding: what falls on padding is not counted,
as XLA's own analysis does not.
"""

import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from hybridlm.plan.hlo import SHAPE, Instruction

_OPERANDS = re.compile(r"%([\w.\-]+)")


def flops_of(instruction: Instruction, names: Mapping[str, Instruction]) -> float:
    """0 for what is no matrix product. names: the instructions of its computation."""
    if instruction.op == "dot":
        return _of_dot(instruction, names, r"lhs_contracting_dims=\{([\d,]*)\}")
    if instruction.op == "convolution":
        return _of_convolution(instruction, names)
    if instruction.op == "custom-call" and 'custom_call_target="__cublas' in instruction.rest:
        return _of_dot(instruction, names, r'"lhs_contracting_dimensions":\[([^\]]*)\]')
    return 0.0


def _dims(shape: str) -> list[int]:
    """Of the first array of a type."""
    return [int(dim) for dim in SHAPE.search(shape)[2].split(",") if dim]


def _operand(instruction: Instruction, names: Mapping[str, Instruction], n: int) -> list[int]:
    found = _OPERANDS.findall(instruction.rest)
    return _dims(names[found[n]].shape)


def _of_dot(instruction: Instruction, names: Mapping[str, Instruction], pattern: str) -> float:
    contracted = [int(dim) for dim in re.findall(r"\d+", re.search(pattern, instruction.rest)[1])]
    left = _operand(instruction, names, 0)
    return 2.0 * math.prod(_dims(instruction.shape)) * math.prod(left[dim] for dim in contracted)


def _of_convolution(instruction: Instruction, names: Mapping[str, Instruction]) -> float:
    rest = instruction.rest
    if re.match(r"convolution\(", rest) is None or re.match(r"[su]", instruction.shape):  # of integers: sums of counts
        return 0.0
    inputs, kernel, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    left, right, result = _operand(instruction, names, 0), _operand(instruction, names, 1), _dims(instruction.shape)
    groups = int((re.search(r"batch_group_count=(\d+)", rest) or [0, 1])[1])
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", rest) or [0, ""])[1]))
    count = left[inputs.index("b")] // groups * right[kernel.index("i")] * right[kernel.index("o")]
    for n in range(len(inputs) - 2):
        given = {name: value.split("x")[n] for name, value in window.items()}
        low = int(given.get("pad", "0_0").rpartition("_")[0] or 0)
        count *= _positions(
            left[inputs.index(str(n))], result[outputs.index(str(n))], right[kernel.index(str(n))],
            int(given.get("stride", 1)), low, int(given.get("lhs_dilate", 1)), int(given.get("rhs_dilate", 1)),
        )  # fmt: skip
    return 2.0 * count


@functools.lru_cache(maxsize=4096)
def _positions(n_in: int, n_out: int, size: int, stride: int, low: int, spread: int, spread_kernel: int) -> int:
    """Pairs of an output and a place of the window that fall on an input along one dim, neither padding nor gap."""
    total, starts = 0, np.arange(n_out) * stride - low
    for place in range(size):
        at = starts + place * spread_kernel
        total += int(np.count_nonzero((at >= 0) & (at <= (n_in - 1) * spread) & (at % spread == 0)))
    return total
