# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.mamba3`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="mamba3",
    cases="pallas_kernels.ops.mamba3.cases",
    context="pallas_kernels.ops.mamba3.context:mamba3_context",
    positional=("q", "k", "v", "adt", "dt", "trap", "angles"),
    integers=("segment_ids",),
    rows=(
        *("q", "k", "v", "adt", "dt", "trap", "angles", "z"),
        *("initial_angle", "initial_ssm", "initial_k", "initial_v"),
    ),
    tokens=("q", "k", "v", "adt", "dt", "trap", "angles", "z"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_angle", "initial_ssm", "initial_k", "initial_v"),
    hints={"chunk": (1, 7, 1000)},
    proven=("gpu",),
    estimated=("v5e", "v5p", "v6e"),
    implementations={
        "reference": Implementation("pallas_kernels.ops.mamba3.reference:mamba3_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.mamba3.xla:mamba3_xla", forward_mode=True),
        "gpu": Implementation(
            "pallas_kernels.ops.mamba3.by_ssd:mamba3_gpu",
            "pallas_kernels.ops.mamba3.by_ssd:supports_gpu",
            oldest_jax=(0, 11),
            capability=HOPPER,
        ),
        "tpu": Implementation(
            "pallas_kernels.ops.mamba3.by_ssd:mamba3_tpu", "pallas_kernels.ops.mamba3.by_ssd:supports_tpu"
        ),
    },
)
