# SPDX-License-Identifier: Apache-2.0
"""RMS norm of the heads of queries or keys (Henry et al. 2020), and their rotation.

On a GPU XLA would write what is normed in float32 before it rotates it, and take its gradient in pieces of half a head.
There both are one function with a gradient that is written out: a pass for the roots, kept for the backward, and one
for the result; in the backward a pass for the sums of each head and one for the gradient.

Axis letters: B batch, T tokens, H heads, P head width, R pairs that are rotated.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from hybridlm.layers.rope import Rope, turns
from pallas_kernels.platform import platform


def is_faster(rope: Rope | None, d_head: int) -> bool:
    """Whether `normed_and_rotated` serves this rotation, and in less time than norm and rotation one by one."""
    whole = rope is None or (not rope.interleaved and rope.d_rotated(d_head) == d_head)
    return platform() == "gpu" and whole


def normed_and_rotated(
    x_BTHP: jax.Array, weight_P: jax.Array, positions_BT: jax.Array, rope: Rope | None, eps: float, name: str
) -> jax.Array:
    """x / rms(x) * weight of each head, then `rope.rotate` (None: not rotated); type of the input.

    Nothing is rounded between them. The weight is float32. name: under which remat keeps the roots, small beside x.
    """
    turn = None if rope is None else turns(positions_BT, rope, x_BTHP.shape[-1])
    return _fused(x_BTHP, weight_P, turn, eps, name)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused(x_BTHP, weight_P, turn, eps: float, name: str):
    return _forward(x_BTHP, weight_P, turn, eps, name)[0]


def _forward(x_BTHP, weight_P, turn, eps, name):
    x, weight = x_BTHP.astype(jnp.float32), _of_head(weight_P)
    root = lax.optimization_barrier(lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps))
    root = checkpoint_name(root, name)
    return _turned(x * root * weight, turn).astype(x_BTHP.dtype), (x_BTHP, weight_P, turn, root)


def _backward(eps, name, saved, dy_BTHP):
    del eps, name
    x_BTHP, weight_P, turn, root = saved

    def parts(x_BTHP, dy_BTHP):
        """What was normed, before its weight, and the gradient behind the weight."""
        return x_BTHP.astype(jnp.float32) * root, _turned(dy_BTHP.astype(jnp.float32), turn, back=True)

    weight = _of_head(weight_P)
    normed, d_out = parts(x_BTHP, dy_BTHP)
    mean = jnp.mean(d_out * weight * normed, axis=-1, keepdims=True)
    x_BTHP, dy_BTHP, mean = lax.optimization_barrier((x_BTHP, dy_BTHP, mean))  # else the first pass's float32 is kept
    normed, d_out = parts(x_BTHP, dy_BTHP)
    dx = root * (d_out * weight - normed * mean)
    d_weight = jnp.sum(d_out * normed, axis=(0, 1, 2))
    return dx.astype(x_BTHP.dtype), d_weight.astype(weight_P.dtype), jax.tree.map(jnp.zeros_like, turn)


_fused.defvjp(_forward, _backward)


def _of_head(weight_P):
    return jnp.expand_dims(weight_P.astype(jnp.float32), (0, 1, 2))


def _turned(x_BTHP, turn, back: bool = False):
    """Pairs (i, i + R) of whole heads rotated, or back: sums of each half and the other; nothing is put together."""
    if turn is None:
        return x_BTHP
    cos, sin = (jnp.expand_dims(a, (2, 3)) for a in turn)
    x = x_BTHP.reshape(*x_BTHP.shape[:3], 2, cos.shape[-1])
    sign = jnp.array([1.0, -1.0] if back else [-1.0, 1.0], jnp.float32)[None, None, None, :, None]
    return (x * cos + lax.rev(x, (3,)) * (sin * sign)).reshape(x_BTHP.shape)
