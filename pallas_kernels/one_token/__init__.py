# SPDX-License-Identifier: Apache-2.0
"""Kernels for the next token of each text on a Hopper GPU: products, and what stands between them.

`why_not` says where they can serve, MOST_ROWS for how many rows layers take them. What they compute stands in modules
that are imported where they are called, for Mosaic takes its time: `one_row`, `mamba2_step`.

Axis letters: B batch, H heads, P head width, G state groups, N state size, W convolution window.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import compat, platform
from pallas_kernels.one_token.limits import LONGEST, MOST_ROWS, OLDEST_JAX, SHARE, STATES, TILE, Weights
from pallas_kernels.op import HOPPER

__all__ = ["MOST_ROWS", "Weights", "product_fits", "products", "step_fits", "why_not"]


def why_not(dtype: DTypeLike) -> str | None:
    """Why the kernels cannot serve activations of a type; None where they can."""
    if reason := compat.why_too_old(OLDEST_JAX):
        return reason
    if platform.platform() != "gpu" or platform.gpu_capability() != HOPPER:
        return "they are written for Hopper GPUs"
    return None if jnp.dtype(dtype) == jnp.bfloat16 else f"activations are of type {jnp.dtype(dtype)}, not bfloat16"


def product_fits(n_inputs: int, n_outputs: int) -> bool:
    """Whether a matrix can be cut in whole blocks."""
    return n_inputs % SHARE == 0 and 0 < n_inputs <= LONGEST and n_outputs % TILE == 0 and n_outputs > 0


def step_fits(width: int, n_state: int) -> bool:
    """Whether a head's width and state size can be cut in whole blocks."""
    return width % TILE == 0 and n_state in STATES


def products(name: str, parts: Sequence[jax.Array], weights: Sequence[jax.Array], *, eps: float = 0.0) -> list:
    """v times each matrix [K, N], of one row: [1, N], bfloat16 or float32.

    name: what v is of parts, see `vectors.VECTORS`. parts: [1, ...]; a norm's weights, the last, [K]. Of a part that is
    longer than its vector, the rest is not read. eps: of the norm.
    """
    from pallas_kernels.one_token import one_row

    return [y[None] for y in one_row.products(name, [part.reshape(-1) for part in parts], weights, eps=eps)]
