# SPDX-License-Identifier: Apache-2.0
"""Kernels of Triton: where they can run, and how they are called."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from pallas_kernels import platform
from pallas_kernels.op import HOPPER


def why_not(dtype: DTypeLike, *sizes: Any) -> str | None:
    """Why kernels cannot serve activations of a type, in arrays of these sizes; None where they can."""
    if platform.platform() != "gpu" or platform.gpu_capability() != HOPPER:
        return "they are measured on Hopper alone"
    if platform.default_device_platform() != "gpu" and jax.sharding.get_abstract_mesh().abstract_device is None:
        return "they are lowered for a GPU that is at hand, or that an abstract mesh describes"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are of type {jnp.dtype(dtype)}, not bfloat16"
    return None if all(isinstance(n, int) for n in sizes) else "a size is a symbol"


def call(
    kernel: Callable, grid: tuple[int, ...], out: Any, name: str, warps: int, stages: int = 1,
    aliases: Mapping[int, int] | None = None,
) -> Callable:  # fmt: skip
    """`pl.pallas_call`. stages: of products whose operands are copied ahead. aliases: of operands and results that lie
    in the same memory."""
    options = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(
        kernel, grid=grid, out_shape=out, name=name, compiler_params=options, input_output_aliases=dict(aliases or {})
    )
