# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.gated_delta_product`."""

from pallas_kernels.op import HOPPER, Implementation, Op

OP = Op(
    name="gated_delta_product",
    cases="pallas_kernels.ops.gated_delta_product.cases",
    context="pallas_kernels.ops.gated_delta_product.context:gated_delta_product_context",
    positional=("q", "k", "v", "beta", "g"),
    integers=("segment_ids",),
    rows=("q", "k", "v", "beta", "g", "initial_state"),
    tokens=("q", "k", "v", "beta", "g"),
    has_segments=True,
    padding_may_be_nan=True,
    states=("initial_state",),
    hints={"chunk": (1, 7, 1000)},
    proven=("gpu",),
    implementations={
        "reference": Implementation(
            "pallas_kernels.ops.gated_delta_product.reference:gated_delta_product_reference", forward_mode=True
        ),
        "xla": Implementation("pallas_kernels.ops.gated_delta_product.flat:gated_delta_product_xla", forward_mode=True),
        "gpu": Implementation(
            "pallas_kernels.ops.gated_delta_product.flat:gated_delta_product_gpu",
            "pallas_kernels.ops.gated_delta_product.flat:supports_gpu",
            oldest_jax=(0, 11),
            capability=HOPPER,
        ),
    },
)
