# SPDX-License-Identifier: Apache-2.0
"""`gated_delta_product` with its tokens split over devices: as `gated_delta_rule`, whose state it has."""

from collections.abc import Callable

from pallas_kernels import context
from pallas_kernels.ops.gated_delta_rule.context import linear_map


def gated_delta_product_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""

    def run(v, start):
        q, k, _, *more = args
        return scan(q, k, v, *more, **options | {"initial_state": start, "return_final_state": True})[1]

    own = linear_map(run, args[2], args[1].shape[-1], args, options["segment_ids"])
    return context.scan_from_entering(scan, args, own, context_axis=context_axis, **options)
