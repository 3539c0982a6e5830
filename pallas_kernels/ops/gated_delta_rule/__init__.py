# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.gated_delta_rule`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="gated_delta_rule",
    cases="pallas_kernels.ops.gated_delta_rule.cases",
    context="pallas_kernels.ops.gated_delta_rule.context:gated_delta_rule_context",
    positional=("q", "k", "v", "beta", "g"),
    integers=("segment_ids",),
    rows=("q", "k", "v", "beta", "g", "initial_state"),
    tokens=("q", "k", "v", "beta", "g"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    hints={"chunk": (1, 7, 1000)},
    proven=("gpu",),
    estimated=("v5e", "v5p", "v6e"),
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.gated_delta_rule.reference:gated_delta_rule_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.gated_delta_rule.xla:gated_delta_rule_xla", forward_mode=True),
        "tpu": Implementation(
            "pallas_kernels.ops.gated_delta_rule.tpu.api:gated_delta_rule_tpu",
            "pallas_kernels.ops.gated_delta_rule.tpu.api:supports",
            "pallas_kernels.ops.gated_delta_rule.tpu.api:slower",
        ),
        "gpu": Implementation(
            "pallas_kernels.ops.gated_delta_rule.gpu.api:gated_delta_rule_gpu",
            "pallas_kernels.ops.gated_delta_rule.gpu.api:supports",
            oldest_jax=(0, 11),
            capability=HOPPER,
            takes=("exact",),
        ),
    },
    costs={
        "gated_delta_rule_forward": "pallas_kernels.ops.gated_delta_rule.tpu.cost:forward",
        "gated_delta_rule_backward": "pallas_kernels.ops.gated_delta_rule.tpu.cost:backward",
        "gated_delta_rule_channel_forward": "pallas_kernels.ops.gated_delta_rule.tpu.cost:channel_forward",
        "gated_delta_rule_channel_backward": "pallas_kernels.ops.gated_delta_rule.tpu.cost:channel_backward",
    },
    gpu_costs={
        "gated_delta_rule_walk": "pallas_kernels.ops.gated_delta_rule.gpu.cost:walk",
        "gated_delta_rule_reverse_walk": "pallas_kernels.ops.gated_delta_rule.gpu.cost:reverse_walk",
        "gated_delta_rule_gradients": "pallas_kernels.ops.gated_delta_rule.gpu.cost:gradients",
        "gated_delta_rule_channel_chunks": "pallas_kernels.ops.gated_delta_rule.gpu.cost:channel_chunks",
        "gated_delta_rule_channel_walk": "pallas_kernels.ops.gated_delta_rule.gpu.cost:channel_walk",
        "gated_delta_rule_channel_reverse_walk": "pallas_kernels.ops.gated_delta_rule.gpu.cost:channel_walk",
        "gated_delta_rule_channel_gradients": "pallas_kernels.ops.gated_delta_rule.gpu.cost:gradients",
    },
)
