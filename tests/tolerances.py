# SPDX-License-Identifier: Apache-2.0
"""Relative RMS per named tensor, gradients included, against the one table in `pallas_kernels.oracle`.

Never relaxed by machine or environment.
"""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.oracle import bound, relative_rms, rms

# Where the expected tensor is zero (or all but), the RMS of the difference may not exceed this.
ABSOLUTE_RMS = {"float64": 1e-12, "float32": 1e-7, "float16": 1e-6, "bfloat16": 1e-5}


def check_close(actual, expected, *, dtype, what: str) -> None:
    """Asserts equal shapes, finite numbers and a relative RMS within the table; `dtype` is that of the activations."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    error, limit = relative_rms(actual, expected), bound(dtype, what)
    small = rms(actual - expected) <= ABSOLUTE_RMS[jnp.dtype(dtype).name]
    assert error <= limit or small, f"{what}: relative RMS {error:.2e} above {limit:.0e} ({jnp.dtype(dtype).name})"
