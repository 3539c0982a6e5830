# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.cache_write`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="cache_write",
    cases="pallas_kernels.ops.cache_write.cases",
    positional=("array", "slots", "value"),
    integers=("slots",),
    rows=("array", "slots", "value"),
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.cache_write.reference:cache_write_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.cache_write.xla:cache_write_xla", forward_mode=True),
        "tpu": Implementation(
            "pallas_kernels.ops.cache_write.tpu:cache_write_tpu",
            "pallas_kernels.ops.cache_write.tpu:supports",
            gradients=False,
        ),
    },
    estimated=("v5e", "v5p", "v6e"),
)
