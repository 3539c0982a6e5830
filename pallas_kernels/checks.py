# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the ops. Every error names the argument, its value and the limit."""

import jax.numpy as jnp


def check_shape(name: str, array, expected: tuple, legend: str) -> None:
    """Raises ValueError unless array.shape == expected; None in `expected` matches any size."""
    shape = tuple(array.shape)
    if len(shape) != len(expected) or any(want is not None and have != want for have, want in zip(shape, expected)):
        want = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {list(shape)}, expected [{want}] ({legend})")


def check_float(name: str, array, minimum_bits: int = 16) -> None:
    """Raises TypeError unless array is floating point of at least `minimum_bits` bits."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits < minimum_bits:
        limit = "float32 or float64" if minimum_bits == 32 else "bfloat16, float16, float32 or float64"
        raise TypeError(f"{name} has dtype {array.dtype}, expected {limit}")


def check_segment_ids(name: str, ids, expected: tuple, legend: str):
    """Returns ids as int32; raises TypeError unless they are integers, ValueError unless the shape fits."""
    if not hasattr(ids, "dtype") or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {getattr(ids, 'dtype', type(ids).__name__)}, expected int32")
    check_shape(name, ids, expected, legend)
    return jnp.asarray(ids).astype(jnp.int32)


def check_positive_int(name: str, value, minimum: int = 1) -> None:
    """Raises TypeError unless value is an int (a bool is none), ValueError if it is below the minimum."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or hasattr(value, "aval"):
        raise TypeError(f"{name} ({value!r}) is not a Python int")
    if value < minimum:
        raise ValueError(f"{name} ({value}) below its minimum ({minimum})")
