# SPDX-License-Identifier: Apache-2.0
"""`slstm` with its tokens split over devices: no map stands for its tokens, so the devices take turns."""

from collections.abc import Callable

from pallas_kernels import context
from pallas_kernels.ops.slstm.reference import STATES, start_of


def slstm_context(scan: Callable, args: tuple, *, context_axis: str, **options):
    """`scan(*args, **options)`, an implementation of the op, on tokens of which each device of the axis has a share."""

    def from_state(state, **more):
        return scan(*args, **options | dict(zip(STATES, state)) | more)

    def run(state):
        return from_state(state, return_final_state=True)[1:]

    own = context.describe(options["segment_ids"])
    x, R, b = args
    entering = context.in_order(run, start_of(x, R, b, options), own, context_axis)
    out = from_state(entering)
    if not options["return_final_state"]:
        return out
    return out[0], *(context.from_last(array, context_axis) for array in out[1:])
