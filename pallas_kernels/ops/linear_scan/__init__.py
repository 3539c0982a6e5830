# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.linear_scan`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="linear_scan",
    cases="pallas_kernels.ops.linear_scan.cases",
    context="pallas_kernels.ops.linear_scan.context:linear_scan_context",
    positional=("x", "g"),
    integers=("segment_ids",),
    rows=("x", "g", "initial_state"),
    tokens=("x", "g"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.linear_scan.reference:linear_scan_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.linear_scan.xla:linear_scan_xla"),
    },
)
