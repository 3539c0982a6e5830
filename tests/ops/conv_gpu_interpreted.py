# SPDX-License-Identifier: Apache-2.0
"""Runs the Hopper kernels of causal_conv1d in Mosaic's interpreter, as a process: `conv_gpu_interpreted.py CASE...`.

The interpreter needs enough threads of XLA (NPROC in the environment), whatever the machine has, and copies no tiles
that reach outside an array, so arrays get margins (``interpret`` of the kernels); the rest is the kernels' own.
"""

import dataclasses
import functools
import sys

from pallas_kernels import oracle
from pallas_kernels.ops.causal_conv1d import cases
from pallas_kernels.ops.causal_conv1d.gpu import api as gpu


def make_case(name: str):
    """A test case at a width that the kernels take; "parts" has rows cut into parts, "overhang" a short last block."""
    if name == "parts":
        return cases.Case(name, 2, 150, 264, 4, "packed", "silu", True, True, True)
    if name == "overhang":
        return cases.Case(name, 1, 26, 8, 4, "dense", "silu", True, True, False)
    return dataclasses.replace(cases.CASES[name], width=8)


def compare(case, dtype: str) -> bool:
    """Prints the error of every tensor of a case; whether all are within the tolerance table."""
    kernel = functools.partial(gpu.causal_conv1d_gpu, interpret=True)
    inputs, settings = cases.make_inputs(case, dtype), cases.make_settings(case)
    found = oracle.compare("causal_conv1d", inputs, dtype=dtype, function=kernel, **settings)
    for name, (error, limit) in found.items():
        verdict = "" if error <= limit else " FAIL"
        print(f"{case.name}.{dtype}.{name}: relative RMS {error:.1e} of {limit:.0e}{verdict}", flush=True)
    return all(error <= limit for error, limit in found.values())


def main(names: list[str]) -> int:
    gpu.MULTIPROCESSORS = 2  # so that rows are cut into parts of several blocks
    good = True
    for name in names:
        dtype = "bfloat16" if name.endswith("_bfloat16") else "float32"
        good &= compare(make_case(name.removesuffix("_bfloat16")), dtype)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
