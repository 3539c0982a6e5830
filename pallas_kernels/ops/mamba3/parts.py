# SPDX-License-Identifier: Apache-2.0
"""What both implementations of `mamba3` do to one token: rotation, and what stands between state and output."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

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


def in_halves(scan: Callable) -> Callable:
    """An implementation of `mamba3` that sees pairs N / 2 apart, whichever the call has.

    Queries and keys may have their channels in any order, the same for both and for the states. Pairs that are
    neighbours in memory are turned by taking every other channel and putting them side by side again, for which a TPU
    moves each array several times; halves are slices. So channels are put in order before there is a copy for every
    head, by products with ones, which are exact.
    """

    @functools.wraps(scan)
    def run(q_BTRGN, k_BTRGN, *tokens, rotary_pairs, return_final_state=False, **options):
        if rotary_pairs != "adjacent":
            more = {"rotary_pairs": rotary_pairs, "return_final_state": return_final_state}
            return scan(q_BTRGN, k_BTRGN, *tokens, **more, **options)
        halves_NN = _halves(k_BTRGN.shape[-1], tokens[-1].shape[-1])
        there, back = (functools.partial(_ordered, order_NN=order) for order in (halves_NN, halves_NN.T))
        named = ("q_bias", "k_bias", "initial_ssm", "initial_k")
        options |= {name: there(options[name]) for name in named if options[name] is not None}
        more = {"rotary_pairs": "half", "return_final_state": return_final_state}
        out = scan(there(q_BTRGN), there(k_BTRGN), *tokens, **more, **options)
        if not return_final_state:
            return out
        y_BTHP, angle_BHS, ssm_BHPN, k_BHRN, v_BHRP = out
        return y_BTHP, angle_BHS, back(ssm_BHPN), back(k_BHRN), v_BHRP

    return run


def _halves(d_key: int, n_angles: int) -> np.ndarray:
    """[N, N]: column j has a one at the channel that stands at j, where pairs of neighbours are d_key // 2 apart."""
    rest = np.arange(2 * n_angles, d_key)
    behind_first = d_key // 2 - n_angles
    pairs = np.arange(2 * n_angles).reshape(n_angles, 2)
    order = np.concatenate([pairs[:, 0], rest[:behind_first], pairs[:, 1], rest[behind_first:]])
    return np.eye(d_key, dtype=np.float32)[:, order]


def _ordered(array, order_NN):
    return jnp.matmul(array, order_NN.astype(array.dtype), precision=jax.lax.Precision.HIGHEST)


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
