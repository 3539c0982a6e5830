# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.linear_attention`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="linear_attention",
    cases="pallas_kernels.ops.linear_attention.cases",
    context="pallas_kernels.ops.linear_attention.context:linear_attention_context",
    positional=("q", "k", "v", "g"),
    integers=("segment_ids",),
    rows=("q", "k", "v", "g", "initial_state"),
    tokens=("q", "k", "v", "g"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    hints={"chunk": (1, 7, 1000)},
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.linear_attention.reference:linear_attention_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.linear_attention.xla:linear_attention_xla", forward_mode=True),
        "gpu": Implementation(
            "pallas_kernels.ops.linear_attention.gpu.api:linear_attention_gpu",
            "pallas_kernels.ops.linear_attention.gpu.api:supports",
            oldest_jax=(0, 11),
            capability=HOPPER,
        ),
    },
)
