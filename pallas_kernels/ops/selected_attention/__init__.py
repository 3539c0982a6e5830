# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.selected_attention`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="selected_attention",
    cases="pallas_kernels.ops.selected_attention.cases",
    context="pallas_kernels.ops.selected_attention.context:selected_attention_context",
    positional=("q", "k", "v", "chosen", "blocks"),
    integers=("chosen", "blocks", "places"),
    rows=("q", "k", "v", "chosen", "blocks", "places"),
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.selected_attention.reference:selected_attention_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.selected_attention.xla:selected_attention_xla", forward_mode=True),
    },
    gradient_factor=3.5,
)
