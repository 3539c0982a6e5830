# SPDX-License-Identifier: Apache-2.0
"""Tokens written into the slots of a cache: what decoding does before it attends."""

import numbers

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_array, check_float, check_shape
from pallas_kernels.op import call
from pallas_kernels.ops.cache_write import OP


def cache_write(
    array: jax.Array,
    slots_BT: jax.Array,
    value_BTKP: jax.Array,
    *,
    layer: int | jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """`array` with value[b, t] at [b, slots[b, t]], of the layer's entries if the array is that of stacked layers.

    Args:
      array: cache [B, S, K, P] of S slots, or [L, B, S, K, P] where layer is given; bfloat16, float16, float32, float64
        or int8. Donated to a jitted function, it is written in place.
      slots_BT: int32, slot of each token. Tokens of slots outside [0, S) are not written. Within a row they differ; if
        not, one of the tokens of a slot is written, it is not said which.
      value_BTKP: what is written, of the dtype of the array or converted to it; int8 where that is.
      layer: which of the L layers is written, an int or an int32 scalar within [0, L); the others stay as they are.
      implementation: "auto", "reference", "xla" or "tpu" (one token a row, no gradients).

    Returns:
      the array, written. Gradients flow to array and value_BTKP. Raises ValueError or TypeError for arguments that do
      not fit together, NotImplementedError where the named implementation cannot serve the call. Forward-mode
      differentiation goes through reference and xla.
    """
    layers = () if layer is None else (None,)
    check_shape("array", array, (*layers, *[None] * 4), "layers, as layer is given, batch, slots, heads, width")
    n_batch, n_slots, n_heads, width = array.shape[len(layers) :]
    if n_slots < 1:
        raise ValueError(f"array has {n_slots} slots, at least 1 is needed")
    check_shape("slots_BT", slots_BT, (n_batch, None), "batch of array, tokens")
    n_tokens = slots_BT.shape[1]
    check_shape("value_BTKP", value_BTKP, (n_batch, n_tokens, n_heads, width), "batch, tokens, heads, width of array")
    check_array("array", array)
    check_array("value_BTKP", value_BTKP)
    if array.dtype != jnp.int8 or value_BTKP.dtype != jnp.int8:
        check_float("array", array)
        check_float("value_BTKP", value_BTKP)
    if not jnp.issubdtype(slots_BT.dtype, jnp.integer):
        raise TypeError(f"slots_BT has dtype {slots_BT.dtype}, expected int32")
    if isinstance(layer, numbers.Integral) and not 0 <= layer < array.shape[0]:
        raise ValueError(f"layer ({layer}) outside of the layers of array ({array.shape[0]})")
    if layer is not None and (jnp.ndim(layer) or not jnp.issubdtype(jnp.result_type(layer), jnp.integer)):
        raise TypeError(f"layer ({layer!r}) is neither an int nor an integer scalar")
    array = jnp.asarray(array)
    args = (array, jnp.asarray(slots_BT, jnp.int32), jnp.asarray(value_BTKP, array.dtype))
    return call(OP, implementation, args, {"layer": layer})
