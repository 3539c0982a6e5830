# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.long_conv`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="long_conv",
    cases="pallas_kernels.ops.long_conv.cases",
    context="pallas_kernels.ops.long_conv.context:long_conv_context",
    positional=("x", "h"),
    integers=("segment_ids",),
    rows=("x",),
    tokens=("x",),
    has_segments=True,
    padding_may_be_nan=True,
    implementations={
        "reference": Implementation("pallas_kernels.ops.long_conv.reference:long_conv_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.long_conv.xla:long_conv_xla", forward_mode=True),
    },
)
