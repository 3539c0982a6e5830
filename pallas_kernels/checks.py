# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the ops. Every error names the argument, its value and the limit."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

AnyArray: TypeAlias = jax.Array | np.ndarray[Any, Any]
"""What is taken as an array: one of JAX or of NumPy."""


def check_array(name: str, array) -> None:
    """Raises TypeError for what is no array, as a list or a number: its type is not guessed."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        kind = type(array).__name__
        raise TypeError(f"{name} is {'None' if array is None else f'a {kind}'}, expected an array: use jnp.asarray")


def rank(name: str, array) -> int:
    """Dimensions of an array; TypeError for what is none."""
    check_array(name, array)
    return array.ndim


def check_shape(name: str, array, expected: tuple, legend: str) -> None:
    """Raises TypeError for what is no array, ValueError unless array.shape == expected; None in `expected` matches any
    size."""
    check_array(name, array)
    shape = tuple(array.shape)
    if len(shape) != len(expected) or any(want is not None and have != want for have, want in zip(shape, expected)):
        want = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {list(shape)}, expected [{want}] ({legend})")


def check_float(name: str, array, minimum_bits: int = 16) -> None:
    """Raises TypeError unless array is floating point of at least `minimum_bits` bits."""
    check_array(name, array)
    if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits < minimum_bits:
        limit = "float32 or float64" if minimum_bits == 32 else "bfloat16, float16, float32 or float64"
        raise TypeError(f"{name} has dtype {array.dtype}, expected {limit}")


def check_segment_ids(name: str, ids, expected: tuple, legend: str):
    """Returns ids as int32; raises TypeError unless they are integers, ValueError unless the shape fits."""
    check_array(name, ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {ids.dtype}, expected int32")
    check_shape(name, ids, expected, legend)
    return jnp.asarray(ids).astype(jnp.int32)


def check_sides(name: str, arrays, n_batch: int, n_queries: int, n_keys: int):
    """Of queries and keys the ids or positions as int32, or None: one array is of both sides, a pair of each."""
    if arrays is None:
        return None
    if not isinstance(arrays, (tuple, list)):
        if n_queries != n_keys:
            raise ValueError(f"{name} is one array but q_BTHP has {n_queries} tokens and k_BSKP {n_keys}: give a pair")
        both = check_segment_ids(name, arrays, (n_batch, n_queries), "batch, tokens of q_BTHP")
        return both, both
    if len(arrays) != 2:
        raise ValueError(f"{name} has {len(arrays)} arrays, expected a pair for queries and keys")
    return (
        check_segment_ids(f"{name}[0]", arrays[0], (n_batch, n_queries), "batch, tokens of q_BTHP"),
        check_segment_ids(f"{name}[1]", arrays[1], (n_batch, n_keys), "batch, tokens of k_BSKP"),
    )


def check_positive_int(name: str, value, minimum: int = 1) -> None:
    """Raises TypeError unless value is an int (a bool is none), ValueError if it is below the minimum."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or hasattr(value, "aval"):
        raise TypeError(f"{name} ({value!r}) is not a Python int")
    if value < minimum:
        raise ValueError(f"{name} ({value}) below its minimum ({minimum})")


def check_heads(q_BTGN, k_BTGN, v_BTHP, names: tuple[str, str, str] = ("q_BTGN", "k_BTGN", "v_BTHP")) -> None:
    """Raises ValueError or TypeError unless queries, keys and values of a recurrence fit together."""
    q_name, k_name, v_name = names
    check_shape(v_name, v_BTHP, (None,) * 4, "batch, tokens, heads, head width")
    n_batch, n_tokens, n_heads = v_BTHP.shape[:3]
    if n_tokens < 1:
        raise ValueError(f"{v_name} has {n_tokens} tokens, at least 1 is needed")
    check_shape(q_name, q_BTGN, (n_batch, n_tokens, None, None), f"batch, tokens of {v_name}, groups, key width")
    check_shape(k_name, k_BTGN, q_BTGN.shape, f"shape of {q_name}")
    n_groups = q_BTGN.shape[2]
    if n_groups < 1 or n_heads % n_groups:
        raise ValueError(f"heads of {v_name} ({n_heads}) not divisible by groups of {q_name} ({n_groups})")
    for name, array in ((q_name, q_BTGN), (k_name, k_BTGN), (v_name, v_BTHP)):
        check_float(name, array)


def check_attended(q_BTHP, k_BSKP, v_BSKP, in_int8: bool = False) -> None:
    """Raises ValueError or TypeError unless queries, keys and values of attention fit together.

    in_int8: keys and values are not floating point, and what they are was checked before.
    """
    check_shape("q_BTHP", q_BTHP, (None,) * 4, "batch, tokens, heads, head width")
    n_batch, n_queries, n_heads, width = q_BTHP.shape
    check_shape(
        "k_BSKP", k_BSKP, (n_batch, None, None, width), "batch of q_BTHP, keys, key heads, head width of q_BTHP"
    )
    n_keys, n_kv_heads = k_BSKP.shape[1:3]
    check_shape("v_BSKP", v_BSKP, (n_batch, n_keys, n_kv_heads, None), "batch, keys, key heads of k_BSKP, any width")
    if min(n_queries, n_keys) < 1:
        raise ValueError(f"q_BTHP has {n_queries} tokens and k_BSKP {n_keys}, at least 1 is needed")
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"heads of q_BTHP ({n_heads}) not divisible by heads of k_BSKP ({n_kv_heads})")
    for name, array in (("q_BTHP", q_BTHP), ("k_BSKP", k_BSKP), ("v_BSKP", v_BSKP)):
        if not in_int8 or name == "q_BTHP":
            check_float(name, array)


def check_log_decays(name: str, g, shapes: tuple, legend: str) -> None:
    """Raises ValueError or TypeError unless g is None or float32 or float64 of one of the shapes."""
    if g is None:
        return
    check_array(name, g)
    fitting = [shape for shape in shapes if len(shape) == g.ndim]
    check_shape(name, g, fitting[0] if fitting else shapes[0], legend)
    check_float(name, g, minimum_bits=32)


def check_state(name: str, state, expected: tuple, legend: str):
    """The state in float32 at least, None if it is; raises ValueError or TypeError where it does not fit."""
    if state is None:
        return None
    check_shape(name, state, expected, legend)
    check_float(name, state)
    return state.astype(jnp.promote_types(state.dtype, jnp.float32))


def check_states(states: dict) -> dict:
    """Of {name: (state or None, expected shape, legend)} the states as `check_state` gives them: all or none."""
    absent = [name for name, (state, *_) in states.items() if state is None]
    if 0 < len(absent) < len(states):
        raise ValueError(f"{absent[0]} is None, other initial states are not: give all or none")
    return {name: check_state(name, *given) for name, given in states.items()}
