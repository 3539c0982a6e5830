# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.causal_conv1d`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="causal_conv1d",
    cases="pallas_kernels.ops.causal_conv1d.cases",
    context="pallas_kernels.ops.causal_conv1d.context:causal_conv1d_context",
    positional=("x", "w", "b"),
    integers=("segment_ids",),
    rows=("x", "initial_state"),
    tokens=("x",),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.causal_conv1d.reference:causal_conv1d_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.causal_conv1d.xla:causal_conv1d_xla", gradient_forward_mode=False),
        "tpu": Implementation(
            "pallas_kernels.ops.causal_conv1d.tpu.api:causal_conv1d_tpu",
            "pallas_kernels.ops.causal_conv1d.tpu.api:supports",
        ),
        "gpu": Implementation(
            "pallas_kernels.ops.causal_conv1d.gpu.api:causal_conv1d_gpu",
            "pallas_kernels.ops.causal_conv1d.gpu.api:supports",
            capability=HOPPER,
            oldest_jax=(0, 11),
        ),
    },
    proven=("gpu",),
    estimated=("v5e", "v5p", "v6e"),
    costs={
        "causal_conv1d_backward": "pallas_kernels.ops.causal_conv1d.tpu.cost:backward",
    },
    gpu_costs={
        "causal_conv1d_forward": "pallas_kernels.ops.causal_conv1d.gpu.cost:forward",
        "causal_conv1d_backward": "pallas_kernels.ops.causal_conv1d.gpu.cost:backward",
    },
)
