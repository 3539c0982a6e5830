# SPDX-License-Identifier: Apache-2.0
"""A causal convolution as long as the row: of Hyena (Poli et al. 2023, arXiv:2302.10866), and of S4D (Gu et al. 2022,
arXiv:2206.11893), whose diagonal states give the filter.
"""

import jax

from pallas_kernels.checks import check_float, check_segment_ids, check_shape
from pallas_kernels.op import call
from pallas_kernels.ops.long_conv import OP


def long_conv(
    x_BTD: jax.Array,
    h_SD: jax.Array,
    *,
    skip: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    context_axis: str | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """y_t = sum over s <= t of h_{t-s} x_s, plus skip x_t, per channel, starting anew in each document.

    Padding is not counted by t - s. There is no state of fixed size: to go on with a row is to have all of it.

    Args:
      x_BTD: inputs, bfloat16, float16, float32 or float64.
      h_SD: filters by lag, floating point; h_0 meets the token itself, lags from S on count as 0.
      skip: [D], a term of its own beside h_0, or None.
      segment_ids: int32 [B, T], or None for one document a row; the contract stands in the package docstring.
      context_axis: mesh axis over which the tokens are split in order; to be called inside a shard_map over it. Devices
        exchange tokens for channels, and back; y_BTD is this device's share.
      implementation: "auto", "reference" or "xla", which goes through Fourier space.

    Returns:
      y_BTD in the dtype of x; sums are float32 at least. Raises ValueError or TypeError for arguments that do not fit
      together, NotImplementedError where the named implementation cannot serve the call.
    """
    check_shape("x_BTD", x_BTD, (None,) * 3, "batch, tokens, channels")
    n_batch, n_tokens, n_channels = x_BTD.shape
    if n_tokens < 1:
        raise ValueError(f"x_BTD has {n_tokens} tokens, at least 1 is needed")
    check_shape("h_SD", h_SD, (None, n_channels), "lags, channels of x_BTD")
    if h_SD.shape[0] < 1:
        raise ValueError(f"h_SD has {h_SD.shape[0]} lags, at least 1 is needed")
    check_float("x_BTD", x_BTD)
    check_float("h_SD", h_SD)
    if skip is not None:
        check_shape("skip", skip, (n_channels,), "channels of x_BTD")
        check_float("skip", skip)
    if segment_ids is not None:
        segment_ids = check_segment_ids("segment_ids", segment_ids, (n_batch, n_tokens), "batch, tokens of x_BTD")
    kwargs = {"skip": skip, "segment_ids": segment_ids}
    return call(OP, implementation, (x_BTD, h_SD), kwargs, context_axis=context_axis)
