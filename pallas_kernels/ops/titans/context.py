# SPDX-License-Identifier: Apache-2.0
"""`titans` with its tokens split over devices: no map stands for its tokens, so the devices take turns."""

from collections.abc import Callable

from pallas_kernels import context
from pallas_kernels.ops.titans.reference import prepare


def titans_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""
    q, k, v, rate, eta, alpha, g, W1, W2 = args
    start = prepare(q, k, v, rate, eta, alpha, g, W1, W2, options["initial_state"])[-1]

    def run(state):
        return scan(*args, **options | {"initial_state": state, "return_final_state": True})[1]

    entering = context.in_order(run, start, context.describe(options["segment_ids"]), context_axis)
    out = scan(*args, **options | {"initial_state": entering})
    if not options["return_final_state"]:
        return out
    return out[0], context.from_last(out[1], context_axis)
