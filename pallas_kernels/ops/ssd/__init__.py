# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.ssd`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="ssd",
    cases="pallas_kernels.ops.ssd.cases",
    context="pallas_kernels.ops.ssd.context:ssd_context",
    positional=("x", "dt", "A", "B", "C"),
    integers=("segment_ids",),
    rows=("x", "dt", "B", "C", "decay", "initial_state"),
    tokens=("x", "dt", "B", "C"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    hints={"chunk": (1, 7, 1000), "states": ("recompute",)},
    implementations={
        "reference": Implementation("pallas_kernels.ops.ssd.reference:ssd_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.ssd.xla:ssd_xla"),
        "tpu": Implementation(
            "pallas_kernels.ops.ssd.tpu.api:ssd_tpu",
            "pallas_kernels.ops.ssd.tpu.api:supports",
            takes=("turn", "turns", "interpret"),
        ),
        "gpu": Implementation(
            "pallas_kernels.ops.ssd.gpu.api:ssd_gpu",
            "pallas_kernels.ops.ssd.gpu.api:supports",
            oldest_jax=(0, 11),
            capability=HOPPER,
            takes=("turn", "turns"),
        ),
    },
    proven=("gpu",),
    estimated=("v5e", "v5p", "v6e"),
    costs={
        "ssd_forward": "pallas_kernels.ops.ssd.tpu.cost:forward",
        "ssd_backward": "pallas_kernels.ops.ssd.tpu.cost:backward",
    },
    gpu_costs={
        "ssd_decays": "pallas_kernels.ops.ssd.gpu.cost:nothing",
        "ssd_decay_gradients": "pallas_kernels.ops.ssd.gpu.cost:nothing",
        "ssd_walk": "pallas_kernels.ops.ssd.gpu.cost:walk",
        "ssd_reverse_walk": "pallas_kernels.ops.ssd.gpu.cost:walk",
        "ssd_gradients": "pallas_kernels.ops.ssd.gpu.cost:gradients",
    },
)
