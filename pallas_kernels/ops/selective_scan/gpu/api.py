# SPDX-License-Identifier: Apache-2.0
"""`selective_scan` on Hopper GPUs: what the kernels serve, preparation, custom gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.ops.selective_scan.gpu import backward, forward
from pallas_kernels.ops.selective_scan.gpu.forward import Walk
from pallas_kernels.ops.selective_scan.gpu.threads import STATES, Threads
from pallas_kernels.segments import document_starts

DTYPES = ("bfloat16", "float16", "float32")
# What a token tells the kernels: it is padding, or begins a document, or neither (0). The latter is added to its log2
# decays, and below 2^-126 nothing is left of a state.
PADDING = 1.0
BETWEEN_DOCUMENTS = -300.0


def supports(x, dt, A, B, C, **options) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    del C, options
    for name, array in (("x_BTD", x), ("dt_BTD", dt), ("B_BTN", B)):
        if array.dtype.name not in DTYPES:
            return f"dtype of {name} ({array.dtype}) not one of {', '.join(DTYPES)}"
    if A.dtype != jnp.float32:
        return f"dtype of A_DN ({A.dtype}) is not float32"
    if A.shape[1] > STATES:
        return f"state size of A_DN ({A.shape[1]}) above {STATES}"
    return None


def slower(x, *_, **__) -> str | None:
    """Why xla is the better choice for a call that the kernels serve, or None."""
    if x.shape[1] < forward.TILE:
        return f"T ({x.shape[1]}) below {forward.TILE}, to which the kernels pad"
    return None


def selective_scan_gpu(
    x_BTD,
    dt_BTD,
    A_DN,
    B_BTGN,
    C_BTGN,
    *,
    D=None,
    segment_ids=None,
    initial_state=None,
    return_final_state=False,
    chunk=None,
):
    """See `pallas_kernels.selective_scan`; `chunk` is a hint not followed. Padding may hold anything.

    Tokens are padded to whole tiles and groups of channels to whole blocks, with zeros, which change nothing, and
    states to 16, which have B = C = 0.
    """
    del chunk
    (_, n_tokens, n_channels), (n_groups, d_state) = x_BTD.shape, B_BTGN.shape[2:]
    width = _width(*x_BTD.shape[::2], n_groups)
    walkers = 2 if width > 1 else 1  # warpgroups of a thread block
    pad_r = -(n_channels // n_groups) % (Threads(width).channels * walkers)
    pad_n, pad_t = ((0, 0), (0, STATES - d_state)), ((0, 0), (0, -n_tokens % forward.TILE))

    def pad(array, axis):
        """Its channels, by group."""
        if not pad_r:
            return array
        by_group = array.reshape(*array.shape[:axis], n_groups, -1, *array.shape[axis + 1 :])
        ends = [(0, 0)] * by_group.ndim
        ends[axis + 1] = (0, pad_r)
        return jnp.pad(by_group, ends).reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])

    def unpad(array, axis):
        if not pad_r:
            return array
        by_group = array.reshape(*array.shape[:axis], n_groups, -1, *array.shape[axis + 1 :])
        kept = jax.lax.slice_in_dim(by_group, 0, n_channels // n_groups, axis=axis + 1)
        return kept.reshape(*array.shape[:axis], n_channels, *array.shape[axis + 1 :])

    marks, real = _marks(segment_ids)
    maps, dtype = [], B_BTGN.dtype if B_BTGN.dtype == C_BTGN.dtype else jnp.float32
    for array in (B_BTGN.astype(dtype), C_BTGN.astype(dtype)):
        array = array if real is None else jnp.where(real[:, :, None, None], array, 0.0)
        maps.append(jnp.pad(array, (*pad_t, *pad_n)))
    x, dt = (pad(jnp.pad(array, (*pad_t, (0, 0))), 2) for array in (x_BTD, dt_BTD))
    A = pad(jnp.pad(A_DN, pad_n), 0)
    skip = None if D is None else pad(D.astype(jnp.float32), 0)
    init = None
    if initial_state is not None:
        init = pad(jnp.pad(initial_state.astype(jnp.float32), ((0, 0), *pad_n)), 1)
    marks = None if marks is None else jnp.pad(marks, pad_t)
    y, final = _core(x, dt, A, *maps, skip, init, marks, (width, return_final_state))
    y = unpad(y[:, :n_tokens], 2)
    return (y, unpad(final, 1)[..., :d_state]) if return_final_state else y


def _width(n_batch: int, n_channels: int, n_groups: int) -> int:
    """Channels of a thread: two, or one where thread blocks of two would not fill the multiprocessors."""
    blocks = -(-n_channels // n_groups // Threads(2).channels) * n_groups
    return 2 if n_batch * blocks > platform.multiprocessors() else 1


def _marks(segment_ids):
    """(what each token tells the kernels, which tokens are real), None without segment ids."""
    if segment_ids is None:
        return None, None
    real = segment_ids != 0
    return jnp.where(real, jnp.where(document_starts(segment_ids), BETWEEN_DOCUMENTS, 0.0), PADDING), real


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _core(x, dt, A, B, C, skip, init, marks, options):
    """y and the final state ``[B, D, 16]`` (None unless asked for), of channels in whole blocks and 16 states."""
    out = forward.walk(_config(x, dt, B, skip, init, marks, options), x, dt, B, C, marks, A, skip, init)
    return out["y"], out.get("final")


def _config(x, dt, B, skip, init, marks, options):
    width, with_final = options
    return Walk(
        *x.shape,
        B.shape[2],
        width,
        x.dtype,
        B.dtype,
        dt.dtype,
        walkers=2 if width > 1 else 1,
        has_skip=skip is not None,
        segments=marks is not None,
        has_init=init is not None,
        emit_final=with_final,
    )


def _core_fwd(x, dt, A, B, C, skip, init, marks, options):
    cfg = dataclasses.replace(_config(x, dt, B, skip, init, marks, options), keep_states=True)
    out = forward.walk(cfg, x, dt, B, C, marks, A, skip, init)
    return (out["y"], out.get("final")), (x, dt, A, B, C, skip, init, marks, out["states"])


def _core_bwd(options, residuals, cotangents):
    x, dt, A, B, C, skip, init, marks, states = residuals
    dy, dfinal = cotangents
    maps = [array.astype(jnp.float32) for array in (B, C)]
    cfg = _config(x, dt, maps[0], skip, init, marks, options)
    dx, ddt, dA, dB, dC, dskip, dinit = backward.gradients(cfg, x, dt, A, *maps, skip, marks, states, dy, dfinal)
    return dx, ddt, dA, dB.astype(B.dtype), dC.astype(C.dtype), dskip, dinit, None


_core.defvjp(_core_fwd, _core_bwd)
