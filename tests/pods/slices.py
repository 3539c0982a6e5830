# SPDX-License-Identifier: Apache-2.0
"""Described TPU slices: their devices, in the order in which JAX gives them, without a TPU."""

from functools import cache

from hybridlm.plan.slices import slice_devices

LARGEST = ("v5p:8x8x16",)
SMALL = ("v5e:2x4", "v6e:2x4", "v5p:2x2x1", "v5p:2x2x2", "tpu7x:2x2x1")
SLICES = (
    "v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x1", "v5p:2x2x2", "v5p:4x4x4", "v5p:4x4x8", *LARGEST,
    "v6e:2x4", "v6e:8x8", "v6e:16x16", "tpu7x:2x2x1", "tpu7x:2x2x2", "tpu7x:4x4x8",
)  # fmt: skip
ROWS = (
    ("v5e:16x16", dict(fsdp=256), 256), ("v5e:16x16", dict(fsdp=256), 512),
    ("v5e:16x16", dict(fsdp=64, tensor=4), 256), ("v5e:16x16", dict(data=4, fsdp=64), 512),
    ("v5e:8x8", dict(fsdp=64), 512), ("v5e:4x4", dict(fsdp=16), 16), ("v5e:2x4", dict(fsdp=8), 16),
    ("v6e:16x16", dict(fsdp=256), 256), ("v6e:16x16", dict(fsdp=16, tensor=16), 256), ("v6e:8x8", dict(fsdp=64), 512),
    ("v5p:8x8x16", dict(fsdp=1024), 1024), ("v5p:8x8x16", dict(data=16, fsdp=64), 1024),
    ("v5p:8x8x16", dict(fsdp=128, tensor=8), 768), ("v5p:4x4x8", dict(fsdp=128), 512), ("v5p:2x2x2", dict(fsdp=8), 16),
    ("v5p:4x4x4", dict(fsdp=64), 512), ("tpu7x:4x4x8", dict(fsdp=256), 256), ("tpu7x:2x2x2", dict(fsdp=16), 16),
)  # fmt: skip
"""(slice, mesh, rows of a batch)."""


devices = cache(slice_devices)
"""Those of `v5p:8x8x16`, or of several slices, `2xv5e:16x16`."""
