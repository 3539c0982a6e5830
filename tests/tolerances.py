# SPDX-License-Identifier: Apache-2.0
"""The one tolerance table: relative RMS per named tensor, gradients included. Never relaxed by machine or environment."""

import numpy as np

# By dtype of the activations; `what` is looked up by its longest matching prefix, "" is the rest.
RELATIVE_RMS = {
    "float64": {"": 1e-10},
    "float32": {"": 1e-5},
    # Rounding of a bfloat16 result alone is 1.7e-3; gradients add up a few of them.
    "bfloat16": {"": 1e-2},
}

# Where the expected tensor is zero (or all but), its RMS may not exceed this.
ABSOLUTE_RMS = {"float64": 1e-12, "float32": 1e-7, "bfloat16": 1e-5}


def bound(dtype, what: str = "") -> float:
    """The relative RMS allowed for tensor `what` computed in `dtype`."""
    table = RELATIVE_RMS[_name(dtype)]
    return table[max((prefix for prefix in table if what.startswith(prefix)), key=len)]


def relative_rms(actual, expected) -> float:
    """RMS of the difference over RMS of the expected tensor, in float64; inf for anything but finite numbers."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    scale = _rms(expected)
    return _rms(actual - expected) / scale if scale else (0.0 if not _rms(actual) else float("inf"))


def check_close(actual, expected, *, dtype, what: str) -> None:
    """Asserts equal shapes, finite numbers and a relative RMS within the table; `dtype` is that of the activations."""
    assert np.shape(actual) == np.shape(expected), f"{what}: shape {np.shape(actual)}, expected {np.shape(expected)}"
    assert np.isfinite(np.asarray(actual, np.float64)).all(), f"{what}: not finite"
    error, limit = relative_rms(actual, expected), bound(dtype, what)
    difference = _rms(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    floor = ABSOLUTE_RMS[_name(dtype)]
    assert error <= limit or difference <= floor, f"{what}: relative RMS {error:.2e} above {limit:.0e} ({_name(dtype)})"


def _rms(array) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if np.size(array) else 0.0


def _name(dtype) -> str:
    return str(np.dtype(dtype).name) if not isinstance(dtype, str) else dtype
