# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.selective_scan`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="selective_scan",
    cases="pallas_kernels.ops.selective_scan.cases",
    context="pallas_kernels.ops.selective_scan.context:selective_scan_context",
    positional=("x", "dt", "A", "B", "C"),
    integers=("segment_ids",),
    rows=("x", "dt", "B", "C", "initial_state"),
    tokens=("x", "dt", "B", "C"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    hints={"chunk": (1, 7, 1000)},
    proven=("gpu",),
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.selective_scan.reference:selective_scan_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.selective_scan.xla:selective_scan_xla"),
        "tpu": Implementation(
            "pallas_kernels.ops.selective_scan.tpu.api:selective_scan_tpu",
            "pallas_kernels.ops.selective_scan.tpu.api:supports",
        ),
        "gpu": Implementation(
            "pallas_kernels.ops.selective_scan.gpu.api:selective_scan_gpu",
            "pallas_kernels.ops.selective_scan.gpu.api:supports",
            "pallas_kernels.ops.selective_scan.gpu.api:slower",
            oldest_jax=(0, 11),
            capability=HOPPER,
        ),
    },
    costs={
        "selective_scan_forward": "pallas_kernels.ops.selective_scan.tpu.cost:forward",
        "selective_scan_backward": "pallas_kernels.ops.selective_scan.tpu.cost:backward",
    },
    gpu_costs={
        "selective_scan_walk": "pallas_kernels.ops.selective_scan.gpu.cost:walk",
        "selective_scan_gradients": "pallas_kernels.ops.selective_scan.gpu.cost:gradients",
    },
)
