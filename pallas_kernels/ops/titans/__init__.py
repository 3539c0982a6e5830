# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.titans`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="titans",
    cases="pallas_kernels.ops.titans.cases",
    context="pallas_kernels.ops.titans.context:titans_context",
    positional=("q", "k", "v", "rate", "eta", "alpha", "g", "W1", "W2"),
    integers=("segment_ids",),
    rows=("q", "k", "v", "rate", "eta", "alpha", "initial_state"),
    tokens=("q", "k", "v", "rate", "eta", "alpha"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    implementations={
        "reference": Implementation("pallas_kernels.ops.titans.reference:titans_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.titans.xla:titans_xla", forward_mode=True),
    },
)
