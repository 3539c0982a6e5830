# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.mlstm`."""

from pallas_kernels.op import Implementation, Op

OP = Op(
    name="mlstm",
    cases="pallas_kernels.ops.mlstm.cases",
    context="pallas_kernels.ops.mlstm.context:mlstm_context",
    positional=("q", "k", "v", "i", "f"),
    integers=("segment_ids",),
    rows=("q", "k", "v", "i", "f", "initial_c", "initial_n", "initial_m"),
    tokens=("q", "k", "v", "i", "f"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_c", "initial_n", "initial_m"),
    hints={"chunk": (1, 7, 1000)},
    implementations={
        "reference": Implementation("pallas_kernels.ops.mlstm.reference:mlstm_reference", forward_mode=True),
        "xla": Implementation("pallas_kernels.ops.mlstm.xla:mlstm_xla", forward_mode=True),
    },
)
