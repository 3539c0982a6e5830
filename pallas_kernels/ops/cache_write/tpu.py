# SPDX-License-Identifier: Apache-2.0
"""Pallas TPU (Mosaic): a token written into each row of a cache [(L,) B, S, K, P] that lies with S along lanes.

XLA keeps a cache so where P is not a multiple of 128, and attention's kernel for few queries reads it so; but XLA's own
scatter does not write there: it copies the whole array before and after. This kernel changes one lane of one block a
row, in place.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mosaic_tpu import F32, LANES
from pallas_kernels.varying import call_varying


def supports(array, slots_BT, value_BTKP, *, layer=None) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    del value_BTKP, layer
    if array.dtype not in (jnp.bfloat16, jnp.float32):
        return f"array has dtype {array.dtype}, not bfloat16 or float32"
    if slots_BT.shape[1] != 1:
        return f"slots_BT has {slots_BT.shape[1]} tokens a row, not 1"
    if array.shape[-1] % LANES == 0:
        return f"width of array ({array.shape[-1]}) is a multiple of {LANES}, of which XLA keeps no slots along lanes"
    return None


def _kernel(slots, first, old, new, out, *, n_slots: int):
    del first  # for index maps alone
    row = pl.program_id(0)
    start = _block(slots, row, n_slots) * LANES
    lane = lax.broadcasted_iota(jnp.int32, (1, 1, LANES), 2) + start
    chosen = lane == slots[row]
    out[0] = jnp.where(chosen, new[0].astype(F32), old[0].astype(F32)).astype(out.dtype)


def _block(slots, row, n_slots: int):
    return jnp.clip(slots[row], 0, n_slots - 1) // LANES


def cache_write_tpu(array, slots_BT, value_BTKP, *, layer=None, interpret: bool = False):
    """See `pallas_kernels.cache_write`."""
    slots_B, value_BKP = slots_BT[:, 0], value_BTKP[:, 0]
    stack = array if layer is None else array.reshape(-1, *array.shape[2:])
    n_batch, (n_slots, n_heads, width) = slots_B.shape[0], stack.shape[1:]
    first = jnp.zeros(1, jnp.int32) if layer is None else jnp.full(1, layer, jnp.int32) * n_batch
    stack = stack.transpose(0, 2, 3, 1)
    spec = pl.BlockSpec(
        (1, n_heads, width, LANES), lambda b, slots, first: (first[0] + b, 0, 0, _block(slots, b, n_slots))
    )
    call = pl.pallas_call(
        functools.partial(_kernel, n_slots=n_slots),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(n_batch,),
            in_specs=[spec, pl.BlockSpec((1, n_heads, width, 1), lambda b, *_: (b, 0, 0, 0))],
            out_specs=spec,
        ),
        out_shape=jax.ShapeDtypeStruct(stack.shape, stack.dtype),
        input_output_aliases={2: 0},
        interpret=interpret,
        name="cache_write",
    )
    written = call_varying(call, slots_B.astype(jnp.int32), first, stack, value_BKP.astype(array.dtype)[..., None])
    return written.transpose(0, 3, 1, 2).reshape(array.shape)
