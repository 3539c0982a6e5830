# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.grouped_dot`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="grouped_dot",
    cases="pallas_kernels.ops.grouped_dot.cases",
    positional=("x", "w", "sizes"),
    integers=("sizes",),
    rows=("x",),
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.grouped_dot.reference:grouped_dot_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.grouped_dot.xla:grouped_dot_xla"),
        "tpu": Implementation(
            "pallas_kernels.ops.grouped_dot.tpu:grouped_dot_tpu", "pallas_kernels.ops.grouped_dot.tpu:supports"
        ),
        "gpu": Implementation(
            "pallas_kernels.ops.grouped_dot.gpu.api:grouped_dot_gpu",
            "pallas_kernels.ops.grouped_dot.gpu.api:supports",
            "pallas_kernels.ops.grouped_dot.gpu.api:slower",
            capability=HOPPER,
            oldest_jax=(0, 11),
        ),
    },
    proven=("gpu",),
    gpu_costs={
        "grouped_dot_rows": "pallas_kernels.ops.grouped_dot.gpu.cost:rows",
        "grouped_dot_matrices": "pallas_kernels.ops.grouped_dot.gpu.cost:matrices",
    },
)
