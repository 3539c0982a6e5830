# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of the gated RMS norm of heads and of its gradient: see `pallas_kernels.heads`."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.heads import Plan, call, sums_like, walk
from pallas_kernels.mosaic_gpu import LOG2E


def _gate(gating: str, z):
    """The gate, and its slope."""
    root = lax.rsqrt(1.0 + jnp.exp2(z * -LOG2E))  # a single instruction, unlike a quotient
    sigmoid = root * root
    if gating == "sigmoid":
        return sigmoid, sigmoid * (1.0 - sigmoid)
    return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))


def _forward_body(gating: str, plan: Plan, y_g, z_g, weight_g, out_g):
    def of_piece(halves, weights, _):
        y, z = halves
        root = plan.root(y)
        made = (y * root * weight * _gate(gating, z)[0] for y, z, weight in zip(y, z, weights, strict=True))
        return [tuple(made)], None

    walk(plan, [y_g, z_g], weight_g, [out_g], of_piece)


def _backward_body(gating: str, plan: Plan, y_g, z_g, d_g, weight_g, dy_g, dz_g, sums_g):
    def of_piece(halves, weights, _):
        y, z, d = halves
        root = plan.root(y)
        normed = [half * root for half in y]
        gates, slopes = zip(*(_gate(gating, half) for half in z), strict=True)
        behind = [half * gate for half, gate in zip(d, gates, strict=True)]  # the weights
        grads = [half * weight for half, weight in zip(behind, weights, strict=True)]
        parts = zip(d, normed, weights, slopes, strict=True)
        dz = tuple(half * x * weight * slope for half, x, weight, slope in parts)
        d_weight = tuple(half * x for half, x in zip(behind, normed, strict=True))
        return [plan.gradients(normed, root, grads), dz], d_weight

    walk(plan, [y_g, z_g, d_g], weight_g, [dy_g, dz_g], of_piece, sums_g=sums_g)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gated_head_norm(plan: Plan, gating: str, weight_P, *arrays_RHP) -> jax.Array:
    """See `pallas_kernels.gated_head_norm.gated_head_norm`."""
    y_RHP, _ = arrays_RHP
    body = functools.partial(_forward_body, gating)
    like = jax.ShapeDtypeStruct(y_RHP.shape, y_RHP.dtype)
    return call(plan, "gated_head_norm", body, like, *arrays_RHP, weight_P.reshape(2, plan.pairs))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gated_head_norm_gradients(plan: Plan, gating: str, weight_P, *arrays_RHP) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.gated_head_norm.gated_head_norm_gradients`."""
    y_RHP, *_ = arrays_RHP
    body = functools.partial(_backward_body, gating)
    like = jax.ShapeDtypeStruct(y_RHP.shape, y_RHP.dtype)
    results = like, like, sums_like(plan)
    arrays = *arrays_RHP, weight_P.reshape(2, plan.pairs)
    dy, dz, sums = call(plan, "gated_head_norm_gradients", body, results, *arrays)
    return dy, dz, sums.sum(0).reshape(-1)
