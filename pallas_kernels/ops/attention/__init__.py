# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.attention`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="attention",
    cases="pallas_kernels.ops.attention.cases",
    context="pallas_kernels.ops.attention.context:attention_context",
    positional=("q", "k", "v"),
    integers=("segment_ids", "positions"),
    rows=("q", "k", "v", "gate"),
    tokens=("q", "k", "v", "gate"),
    has_segments=True,
    implementations={
        "reference": Implementation("pallas_kernels.ops.attention.reference:attention_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.attention.xla:attention_xla", takes=("stacked",)),
        "tpu": Implementation(
            "pallas_kernels.ops.attention.tpu.api:attention_tpu",
            "pallas_kernels.ops.attention.tpu.api:supports",
            takes=("stacked",),
        ),
        "gpu": Implementation(
            "pallas_kernels.ops.attention.gpu.api:attention_gpu",
            "pallas_kernels.ops.attention.gpu.api:supports",
            "pallas_kernels.ops.attention.gpu.api:slower",
            capability=HOPPER,
            oldest_jax=(0, 11),
            takes=("stacked", "q_wide", "kv"),
        ),
    },
    proven=("gpu",),
    estimated=("v5e", "v5p", "v6e"),
    costs={
        "attention_forward": "pallas_kernels.ops.attention.tpu.cost:forward",
        "attention_backward": "pallas_kernels.ops.attention.tpu.cost:backward",
    },
    gpu_costs={
        "attention_forward": "pallas_kernels.ops.attention.gpu.cost:forward",
        "attention_backward": "pallas_kernels.ops.attention.gpu.cost:backward",
    },
    gradient_factor=3.5,
)
