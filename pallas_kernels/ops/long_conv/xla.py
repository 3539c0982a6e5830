# SPDX-License-Identifier: Apache-2.0
"""`long_conv` in Fourier space: any backend, T log T operations, memory linear in T.

Rows of one document are one transform of twice their length. Documents are kept apart by halves: of two neighbouring
blocks of w tokens only one document can lie in both, and what its tokens of the left block give those of the right one
is a transform of 2 w, everything else masked. Blocks of `DIRECT` tokens are summed lag by lag. Padding, which no lag
counts, is moved behind all tokens first.
"""

import jax.numpy as jnp

from pallas_kernels.by_token import tokens_where
from pallas_kernels.segments import document_numbers

DIRECT = 8


def long_conv_xla(x_BTD, h_SD, *, skip=None, segment_ids=None):
    """See `pallas_kernels.long_conv`."""
    dtype = jnp.result_type(x_BTD, h_SD, jnp.float32)
    n_tokens = x_BTD.shape[1]
    x, h = x_BTD.astype(dtype), h_SD.astype(dtype)[:n_tokens]
    if segment_ids is None:
        y = _transformed(x, h, _power_of_two(n_tokens + h.shape[0] - 1))[:, :n_tokens]
    else:
        real_BT = segment_ids != 0
        x = tokens_where(real_BT, x)
        order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
        moved = jnp.take_along_axis(x, order_BT[..., None], axis=1)
        document_BT = jnp.take_along_axis(jnp.where(real_BT, document_numbers(segment_ids), -1), order_BT, axis=1)
        y = _by_halves(moved, h, document_BT)
        y = jnp.take_along_axis(y, jnp.argsort(order_BT, axis=1)[..., None], axis=1)
        y = tokens_where(real_BT, y)
    if skip is not None:
        y += skip.astype(dtype)[None, None] * x
    return y.astype(x_BTD.dtype)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _transformed(x, h, size: int):
    """The circular convolution over the last axis but one, of that size."""
    return jnp.fft.irfft(jnp.fft.rfft(x, size, axis=-2) * _lead(jnp.fft.rfft(h, size, axis=-2), x), size, axis=-2)


def _by_halves(x_BTD, h_SD, document_BT):
    n_batch, n_tokens, n_channels = x_BTD.shape
    size = max(DIRECT, _power_of_two(n_tokens))
    x = jnp.pad(x_BTD, ((0, 0), (0, size - n_tokens), (0, 0)))
    h = jnp.pad(h_SD, ((0, size - h_SD.shape[0]), (0, 0)))
    document = jnp.pad(document_BT, ((0, 0), (0, size - n_tokens)), constant_values=-1)
    y = _direct(*(array.reshape(n_batch, -1, DIRECT, *array.shape[2:]) for array in (x, document)), h)
    y, width = y.reshape(x.shape), DIRECT
    while width < size:
        left, right = (x.reshape(n_batch, -1, 2, width, n_channels)[:, :, half] for half in (0, 1))
        of_left, of_right = (document.reshape(n_batch, -1, 2, width)[:, :, half] for half in (0, 1))
        shared = jnp.where(of_left[..., -1:] == of_right[..., :1], of_left[..., -1:], -2)
        left = jnp.where((of_left == shared)[..., None], left, 0)
        given = _transformed(left, h[: 2 * width], 2 * width)[..., width:, :]
        given = jnp.where((of_right == shared)[..., None], given, 0)
        y += jnp.concatenate([jnp.zeros_like(right), given], axis=2).reshape(x.shape)
        width *= 2
    return y[:, :n_tokens]


def _direct(x, document, h):
    """Within blocks [B, n, w, D]: lag by lag."""
    total = x * _lead(h[:1], x)
    for lag in range(1, DIRECT):
        same = document[..., lag:] == document[..., :-lag]
        given = jnp.where(same[..., None], x[..., :-lag, :], 0) * _lead(h[lag : lag + 1], x)
        total += jnp.pad(given, ((0, 0), (0, 0), (lag, 0), (0, 0)))
    return total


def _lead(h_SD, like):
    """With the rank of `like`."""
    return jnp.expand_dims(h_SD, range(like.ndim - 2))
