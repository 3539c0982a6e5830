# SPDX-License-Identifier: Apache-2.0
"""The residual stream and its RMS norm, whose gradients from all that reads either are added in one kernel.

A compiler would read what products hand back twice for the norm's gradient. Where there are several, each adds to the
one before while it writes: see `params.in_turn`.
Axis letters: B batch, T tokens, D model.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hybridlm import exchange
from hybridlm.layers import params
from hybridlm.layers.norm import RMSNorm, rms_normalise
from hybridlm.sharding import STREAM, axis_size
from pallas_kernels import rms_norm

NORMED = "sublayer_norm"
"""Name, for remat, of the normed input of a sublayer."""


def serves(norm: Any, x_BTD: Any) -> bool:
    """Whether `fork` has a kernel for the norm of a stream: of one with weights alone."""
    if not isinstance(norm, RMSNorm) or norm.bias is not None or not isinstance(x_BTD, jax.Array) or x_BTD.ndim != 3:
        return False
    return rms_norm.why_not(x_BTD.shape[-1], x_BTD.dtype) is None


def readers(mixer: Any, shape: tuple[int, ...]) -> int:
    """How many arrays a mixer's gradient of what it reads, [B, T, D], comes in: from each of its products, but over
    `tensor`, where those read what is put together: there from its own devices' and from others' where tokens go
    round."""
    if axis_size("tensor") == 1:
        return getattr(mixer, "readers", 1)
    return 2 if hasattr(mixer, "goes_round") and mixer.goes_round(shape) else 1


def fork(norm: Any, x_BTD: jax.Array, n: int) -> tuple[jax.Array, Any]:
    """(x_BTD, the norm of it), for which `serves` holds: an array, or a `Read` for n gradients of it."""
    weight_D = params.use(norm.weight, jnp.float32)
    weight_D = weight_D if norm.offset == 0 else norm.offset + weight_D
    x_BTD, u_BTD, *more = _fork(x_BTD, weight_D, norm.eps, n)
    u_BTD = checkpoint_name(u_BTD, NORMED)
    return x_BTD, params.Read(u_BTD, tuple(more)) if more else u_BTD


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fork(x_BTD, weight_D, eps: float, n: int):
    u_BTD = (rms_normalise(x_BTD, eps) * weight_D[None, None]).astype(x_BTD.dtype)
    return x_BTD, *[u_BTD] * n


def _backward(eps: float, n: int, saved, grads):
    (x_BTD, weight_D), of_products = saved, axis_size("tensor") == 1

    def of_device(x, weight, beside, *grads):
        rows = lambda a: a.reshape(-1, weight.size)
        sums = [params.in_turn(grads)] if of_products else [rows(grad) for grad in grads]
        dx, d_weight = rms_norm.rms_norm_gradients(rows(x), weight, sums, rows(beside), eps)
        return dx.reshape(x.shape), d_weight[None]

    arrays, axes = (x_BTD, weight_D, *grads), [STREAM, (None,), *[STREAM] * (n + 1)]
    of_weight = (exchange.of_parts(STREAM, x_BTD.shape), None), (1, *weight_D.shape)
    dx, d_weight = exchange.manual(of_device, arrays, axes, [(STREAM, x_BTD.shape), of_weight])
    return dx, d_weight.sum(0)


_fork.defvjp(lambda x, weight, eps, n: (_fork(x, weight, eps, n), (x, weight)), _backward)
