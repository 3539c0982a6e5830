# SPDX-License-Identifier: Apache-2.0
"""The one place of `hybridlm` that knows of differences between JAX versions (0.10.2 and 0.11.2)."""

from pallas_kernels.compat import avoid_faulty_cpu_fusions

__all__ = ["avoid_faulty_cpu_fusions"]
