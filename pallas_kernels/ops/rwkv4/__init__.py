# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.rwkv4`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="rwkv4",
    cases="pallas_kernels.ops.rwkv4.cases",
    context="pallas_kernels.ops.rwkv4.context:rwkv4_context",
    positional=("k", "v", "g", "bonus"),
    integers=("segment_ids",),
    rows=("k", "v", "initial_a", "initial_b", "initial_m"),
    tokens=("k", "v"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_a", "initial_b", "initial_m"),
    implementations={
        "reference": Implementation("pallas_kernels.ops.rwkv4.reference:rwkv4_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.rwkv4.xla:rwkv4_xla", forward_mode=True),
    },
)
