# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.slstm`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="slstm",
    cases="pallas_kernels.ops.slstm.cases",
    context="pallas_kernels.ops.slstm.context:slstm_context",
    positional=("x", "R", "b"),
    integers=("segment_ids",),
    rows=("x", "initial_y", "initial_c", "initial_n", "initial_m"),
    tokens=("x",),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_y", "initial_c", "initial_n", "initial_m"),
    implementations={
        "reference": Implementation("pallas_kernels.ops.slstm.reference:slstm_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.slstm.xla:slstm_xla", forward_mode=True),
    },
)
