# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.relative_attention`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="relative_attention",
    cases="pallas_kernels.ops.relative_attention.cases",
    context="pallas_kernels.ops.relative_attention.context:relative_attention_context",
    positional=("q", "k", "v", "r", "profiles"),
    integers=("segment_ids", "positions"),
    rows=("q", "k", "v", "r"),
    tokens=("q", "k", "v", "r"),
    has_segments=True,
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.relative_attention.reference:relative_attention_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.relative_attention.xla:relative_attention_xla", forward_mode=True),
    },
    gradient_factor=3.5,
)
