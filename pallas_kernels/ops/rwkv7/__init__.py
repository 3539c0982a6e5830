# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.rwkv7`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="rwkv7",
    cases="pallas_kernels.ops.rwkv7.cases",
    context="pallas_kernels.ops.rwkv7.context:rwkv7_context",
    positional=("r", "g", "k", "v", "a", "b"),
    integers=("segment_ids",),
    rows=("r", "g", "k", "v", "a", "b", "initial_state"),
    tokens=("r", "g", "k", "v", "a", "b"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    hints={"chunk": (1, 7, 1000)},
    implementations={
        "reference": Implementation("pallas_kernels.ops.rwkv7.reference:rwkv7_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.rwkv7.xla:rwkv7_xla", forward_mode=True),
    },
)
