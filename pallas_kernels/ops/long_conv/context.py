# SPDX-License-Identifier: Apache-2.0
"""`long_conv` with its tokens split over devices: they exchange tokens for channels, of which each has whole rows then.

Every token meets every one before it, so activations travel, each twice: to the device of its channel and back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import context


def long_conv_context(scan: Callable, args: tuple, *, context_axis: str, skip, segment_ids):
    """`scan(*args, ...)`, an implementation of the op, on tokens of which each device of the axis has a share."""
    x_BTD, h_SD = args
    n, n_channels = context.axis_size(context_axis), x_BTD.shape[-1]
    share = -(-n_channels // n)
    padded = lambda array: jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, n * share - n_channels)])
    start = jax.lax.axis_index(context_axis) * share
    own = lambda array: jax.lax.dynamic_slice_in_dim(padded(array), start, share, axis=-1)
    rows = jax.lax.all_to_all(padded(x_BTD), context_axis, split_axis=2, concat_axis=1, tiled=True)
    if segment_ids is not None:
        segment_ids = jax.lax.all_gather(segment_ids, context_axis, axis=1, tiled=True)
    y = scan(rows, own(h_SD), skip=None if skip is None else own(skip), segment_ids=segment_ids)
    return jax.lax.all_to_all(y, context_axis, split_axis=1, concat_axis=2, tiled=True)[..., :n_channels]
