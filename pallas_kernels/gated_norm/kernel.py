# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of a gated RMS norm and its gradient: see `pallas_kernels.rows`."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import rows
from pallas_kernels.mosaic_gpu import LOG2E


def _silu_parts(z):
    """(sigmoid(z), silu(z))"""
    sigmoid = 1.0 / (1.0 + jnp.exp2(z * -LOG2E))
    return sigmoid, z * sigmoid


def _norm_of_rows(eps, before_gate, plan, read, weight, write, sums):
    """y, z."""
    square, kept = plan.full(0.0), []
    for p in range(plan.pieces):
        y, (_, gate) = read(0, p), _silu_parts(read(1, p))
        u = y if before_gate else y * gate
        square += u * u
        kept.append((u, gate) if before_gate else (u,))
    root = plan.over(plan.root(square, eps))
    for p, (u, *gate) in enumerate(kept):
        out = u * root * weight(p)
        write(0, p, out * gate[0] if before_gate else out)
    return sums


@functools.partial(jax.jit, static_argnums=(0, 1))
def gated_norm(eps: float, before_gate: bool, y_RC, z_RC, weight_C):
    """See `pallas_kernels.gated_norm.gated_norm`."""
    n_rows, n_channels = y_RC.shape
    plan = rows.make_plan("gated_norm", n_rows, n_channels, n_in=2, n_out=1, sums=False)
    [out] = rows.walk(plan, functools.partial(_norm_of_rows, eps, before_gate), [y_RC, z_RC], weight_C)
    return out


def _of_rows(eps, before_gate, plan, read, weight, write, sums):
    """y, z, the cotangent."""

    def parts(p):
        y, z, d = (read(k, p) for k in range(3))
        sigmoid, gate = _silu_parts(z)
        u, dn = (y, d * gate) if before_gate else (y * gate, d)
        return y, z, d, sigmoid, gate, u, dn

    square = across = plan.full(0.0)
    for p in range(plan.pieces):
        *_, u, dn = parts(p)
        square, across = square + u * u, across + dn * weight(p) * u
    root, mean = plan.means(square, across, eps)
    made = []
    for p, total in enumerate(sums):
        (y, z, d, sigmoid, gate, u, dn), w = parts(p), weight(p)
        d_gate = sigmoid * (1.0 + z * (1.0 - sigmoid))
        du = dn * w * root - u * mean
        write(0, p, du if before_gate else du * gate)
        write(1, p, (d * w * u * root if before_gate else du * y) * d_gate)
        made.append(total + dn * u * root)
    return tuple(made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gated_norm_gradients(eps: float, before_gate: bool, y_RC, z_RC, weight_C, d_RC):
    """See `pallas_kernels.gated_norm.gated_norm_gradients`."""
    n_rows, n_channels = y_RC.shape
    plan = rows.make_plan("gated_norm_gradients", n_rows, n_channels, n_in=3, n_out=2)
    return tuple(rows.walk(plan, functools.partial(_of_rows, eps, before_gate), [y_RC, z_RC, d_RC], weight_C))
