# SPDX-License-Identifier: Apache-2.0
"""What the kernels of one token take.

Axis letters: H heads, P head width, G state groups, N state size, W convolution window.
"""

from typing import NamedTuple

import jax

MOST_ROWS = 1
"""Up to which layers take the kernels. For more rows XLA's products were faster; the step of Mamba-2 serves any."""
OLDEST_JAX = (0, 11)
TILE = 64
"""Columns of a product, and channels of a head, that a thread block has."""
SHARE = 1024
"""Inputs of a product are a multiple of it."""
LONGEST = 8 * SHARE
"""Inputs of a product at most: a thread block has all of their vector in registers."""
STATES = (128, 256)
"""State sizes that the step of Mamba-2 takes: a thread of 128 convolves one or two."""


class Weights(NamedTuple):
    """Parameters of a Mamba-2 mixer that its step reads, float32."""

    conv_x: jax.Array
    """[H, P, W]."""
    conv_x_bias: jax.Array | None
    """[H, P]."""
    conv_BC: jax.Array
    """[2, G, N, W]."""
    conv_BC_bias: jax.Array | None
    """[2, G, N]."""
    dt_bias: jax.Array
    """[H]."""
    A_log: jax.Array
    """[H]."""
    D: jax.Array
    """[H]."""
