# SPDX-License-Identifier: Apache-2.0
"""`rwkv7` with its tokens split over devices: its states go through matrices [N, N], as `gated_delta_rule`'s do."""

from collections.abc import Callable

from pallas_kernels import context
from pallas_kernels.ops.gated_delta_rule.context import linear_map


def rwkv7_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""

    def run(v, start):
        r, g, k, _, *more = args
        return scan(r, g, k, v, *more, **options | {"initial_state": start, "return_final_state": True})[1]

    own = linear_map(run, args[3], args[2].shape[-1], args, options["segment_ids"])
    return context.scan_from_entering(scan, args, own, context_axis=context_axis, **options)
