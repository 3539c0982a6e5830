# SPDX-License-Identifier: Apache-2.0
"""Arguments of calls that are no config, held to their types: an error names the argument, its value and the limit."""

import numbers
from typing import Any

import numpy as np


def rows_of_integers(name: str, values: Any) -> np.ndarray:
    """[rows, width], not empty. values: an array, or lists of one length. Else ValueError or TypeError."""
    array = _array(name, values)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be [batch, tokens], neither empty, not of shape {array.shape}")
    return integers(name, array)


def one_of_each_row(name: str, values: Any, rows: int) -> np.ndarray:
    """Integers [rows]; ValueError or TypeError where they are not."""
    array = _array(name, values)
    if array.shape != (rows,):
        raise ValueError(f"{name} {array.shape} must have one entry for each of {rows} rows")
    return integers(name, array)


def check_whole(name: str, value: Any) -> None:
    """TypeError unless the value is a whole number or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise TypeError(f"{name} ({value!r}) must be a whole number")


def check_number(name: str, value: Any) -> None:
    """TypeError unless the value is a real number or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} ({value!r}) must be a number")


def _array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{name} must be an array, or lists of one length: pad shorter ones, see lengths") from None


def integers(name: str, array: np.ndarray) -> np.ndarray:
    """The array; TypeError where it is of another type."""
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} ({array.dtype}) must be of an integer type")
    return array
