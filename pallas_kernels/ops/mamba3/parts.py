# SPDX-License-Identifier: Apache-2.0
"""What both implementations of `mamba3` do to one token: rotation, and what stands between state and output."""

import jax
import jax.numpy as jnp

PAIRS = ("adjacent", "half")
TURN = 2 * jnp.pi


def wrapped(angle):
    """The same angle in [0, 2 pi)."""
    return angle - TURN * jnp.floor(angle / TURN)


def rotate(x, angle, pairs: str):
    """x [..., N] with S pairs of its channels turned by angle [..., S].

    adjacent: channels 2 i and 2 i + 1 by angle i; half: channels i and i + N / 2. The others stay.
    """
    n_angles, half = angle.shape[-1], x.shape[-1] // 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if pairs == "adjacent":
        first, second = x[..., 0 : 2 * n_angles : 2], x[..., 1 : 2 * n_angles : 2]
    else:
        first, second = x[..., :n_angles], x[..., half : half + n_angles]
    first, second = first * cos - second * sin, first * sin + second * cos
    if pairs == "adjacent":
        turned = jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], 2 * n_angles)
        return jnp.concatenate([turned, x[..., 2 * n_angles :]], axis=-1)
    rest = x[..., n_angles:half], x[..., half + n_angles :]
    return jnp.concatenate([first, rest[0], second, rest[1]], axis=-1)


def output(y, z, *, norm_weight, norm_eps: float, mimo_z, mimo_o):
    """[..., H, P] of the ranks' y [..., H, R, P]: normed by rank and head, gated by z [..., H, P], summed."""
    if norm_weight is not None:
        y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + norm_eps)
        y = y * _like(norm_weight[:, None], y)
    if z is not None:
        z = z[..., None, :]
        y = y * jax.nn.silu(z if mimo_z is None else _like(mimo_z, y) * z)
    return y[..., 0, :] if mimo_o is None else jnp.sum(_like(mimo_o, y) * y, axis=-2)


def _like(weight_HRP, y):
    """In the dtype and rank of y."""
    return jnp.expand_dims(weight_HRP.astype(y.dtype), range(y.ndim - 3))
