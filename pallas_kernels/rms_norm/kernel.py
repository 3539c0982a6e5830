# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernel of the gradient of an RMS norm: see `pallas_kernels.rows`."""

import functools

import jax

from pallas_kernels import rows


def _of_rows(n_grads: int, eps: float, plan, read, weight, write, sums):
    """x, what its gradient is added to, the cotangents."""

    def parts(p):
        dn = read(2, p)
        for k in range(1, n_grads):
            dn += read(2 + k, p)
        return read(0, p), dn

    square = across = plan.full(0.0)
    for p in range(plan.pieces):
        x, dn = parts(p)
        square, across = square + x * x, across + dn * weight(p) * x
    root, mean = plan.means(square, across, eps)
    made = []
    for p, total in enumerate(sums):
        x, dn = parts(p)
        write(0, p, dn * weight(p) * root - x * mean + read(1, p))
        made.append(total + dn * x * root)
    return tuple(made)


@functools.partial(jax.jit, static_argnums=(0,))
def rms_norm_gradients(eps: float, x_RC, weight_C, beside_RC, *grads_RC):
    """See `pallas_kernels.rms_norm.rms_norm_gradients`."""
    n, (n_rows, n_channels) = len(grads_RC), x_RC.shape
    plan = rows.make_plan("rms_norm_gradients", n_rows, n_channels, n_in=2 + n, n_out=1)
    return tuple(rows.walk(plan, functools.partial(_of_rows, n, eps), [x_RC, beside_RC, *grads_RC], weight_C))
