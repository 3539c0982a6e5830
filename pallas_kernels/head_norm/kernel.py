# SPDX-License-Identifier: Apache-2.0
"""Mosaic GPU (Hopper) kernels of the RMS norm of heads with their rotation, and of its gradient: see
`pallas_kernels.heads`."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.heads import Plan, call, sums_like, walk
from pallas_kernels.mosaic_gpu import LANE_PARAMS, named_body
from pallas_kernels.varying import call_varying, unchecked_varying


def _forward_body(plan: Plan, x_g, weight_g, *refs):
    *turn_g, y_g = refs

    def of_piece(halves, weights, turn):
        root = plan.root(halves[0])
        first, second = (x * root * weight for x, weight in zip(halves[0], weights, strict=True))
        if turn is not None:
            cos, sin = turn
            first, second = first * cos - second * sin, second * cos + first * sin
        return [(first, second)], None

    walk(plan, [x_g], weight_g, [y_g], of_piece, turn_g)


def _backward_body(plan: Plan, x_g, weight_g, *refs):
    dy_g, *turn_g, dx_g, sums_g = refs if plan.apart else (refs[-2], *refs)

    def of_piece(halves, weights, turn):
        x, (first, second) = halves
        root = plan.root(x)
        if turn is not None:
            cos, sin = turn
            first, second = first * cos + second * sin, second * cos - first * sin
        normed = [half * root for half in x]
        grads = [d * weight for d, weight in zip((first, second), weights, strict=True)]
        return [plan.gradients(normed, root, grads)], (first * normed[0], second * normed[1])

    walk(plan, [x_g, dy_g], weight_g, [dx_g], of_piece, turn_g, sums_g)


def _in_place(plan: Plan, x_RHP, weight, dy_RHP, *turn):
    """(dy with the gradient of x's first heads in the place of theirs, sums): a tile is written where it was read."""
    body = named_body("head_norm_gradients", _backward_body, plan)
    mesh = plgpu.Mesh(grid=(plan.blocks,), grid_names=("blocks",))
    with unchecked_varying():
        dx = jax.new_ref(dy_RHP)
        run = pl.kernel(body, out_type=sums_like(plan), mesh=mesh, compiler_params=LANE_PARAMS, name=body.__name__)
        sums = run(x_RHP, weight, *turn, dx)
        return jax.freeze(dx), sums


@functools.partial(jax.jit, static_argnums=(0,))
def head_norm(plan: Plan, x_RHP, weight_P, turn_RcC):
    """See `pallas_kernels.head_norm.head_norm`."""
    turn = () if turn_RcC is None else (turn_RcC,)
    like = jax.ShapeDtypeStruct((plan.rows, plan.heads, plan.width), x_RHP.dtype)
    return call(plan, "head_norm", _forward_body, like, x_RHP, weight_P.reshape(2, plan.pairs), *turn)


@functools.partial(jax.jit, static_argnums=(0,))
def head_norm_gradients(plan: Plan, x_RHP, weight_P, turn_RcC, dy_RHP):
    """See `pallas_kernels.head_norm.head_norm_gradients`."""
    turn = () if turn_RcC is None else (turn_RcC,)
    arrays = x_RHP, weight_P.reshape(2, plan.pairs), dy_RHP, *turn
    if plan.apart:
        results = jax.ShapeDtypeStruct(x_RHP.shape, x_RHP.dtype), sums_like(plan)
        dx, sums = call(plan, "head_norm_gradients", _backward_body, results, *arrays)
    else:
        run = jax.custom_batching.sequential_vmap(functools.partial(_in_place, plan))
        dx, sums = call_varying(run, *arrays)
    return dx, sums.sum(0).reshape(-1)
