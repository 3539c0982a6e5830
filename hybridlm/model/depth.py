# SPDX-License-Identifier: Apache-2.0
"""Running the sublayers of a program (`pattern.loops`), forward and backward, by indices into stacked arrays.

`lax.scan` within `lax.scan` would copy: the inner loop's slice of the parameters out of the outer one's, and what the
forward keeps for the backward into the outer one's stack. Here each sublayer of the program has one stack over all its
depths, for its parameters and for each array that it keeps. Loops of any nesting carry the stacks and write in place,
and the backward is written out: it adds each depth's gradient straight to the sums of the microbatches before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from hybridlm import exchange
from hybridlm.layers.block import Tokens
from hybridlm.layers.quantized import Wide
from hybridlm.model.pattern import Loop, Spot, spans
from pallas_kernels import platform

LANES = 128
"""Numbers side by side in a TPU's memory tile."""


class Low(NamedTuple):
    """What gradients are taken of in the place of the weights, which hang on it in a way that is not seen here."""

    values: Sequence
    """Of each spot, a tree of arrays [depths, ...], perhaps without any."""
    pull: Callable[[int, Any, Any], Any]
    """(number of a spot, gradient of its weights at a depth, its values there) -> the gradient of these."""


Call = Callable[[Any, Any, jax.Array, Tokens], tuple[jax.Array, dict]]
"""(parameters of a depth, what the symbol's depths share, x_BTD, tokens) -> (x_BTD behind the sublayer, statistics)."""


def walk(program: Sequence[Loop | Spot], visit: Callable, carry, *, index=0, reverse: bool = False):
    """The carry behind all visits: visit(spot, index, carry) -> carry, index: of the depth among the spot's."""
    for part in reversed(program) if reverse else program:
        carry = visit(part, index, carry) if isinstance(part, Spot) else _repeat(part, visit, carry, index, reverse)
    return carry


def _repeat(loop: Loop, visit: Callable, carry, index, reverse: bool):
    def body(i, carry):
        i = loop.repeats - 1 - i if reverse else i
        return walk(loop.parts, visit, carry, index=index * loop.repeats + i, reverse=reverse)

    return body(0, carry) if loop.repeats == 1 else lax.fori_loop(0, loop.repeats, body, carry)


def run(
    program: Sequence[Loop], calls: Sequence[Call], weights: Sequence, x_BTD: jax.Array, shared: dict[str, Any],
    tokens: Tokens, sums: Sequence | None = None, low: Low | None = None,
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:  # fmt: skip
    """The residual stream behind the program, and of each spot its statistics, [depths, ...]. The stream may be any
    pytree of arrays, as it is with blocks that hand something from depth to depth.

    calls, weights: of each spot; weights are stacked over its depths, any float type. shared: of each symbol that has
    some. sums: trees like the weights; in place of the gradient of the weights, which is then zero, the gradient of the
    sums is the sums themselves plus the gradient of the weights, in the type of the sums. Those of a matrix may be
    [depths, N, ...] of N devices, each with its own, to which its products add (`layers.quantized.Wide`). low: the
    gradient is that of its values, of which each depth's is made as soon as that of its weights is known; the weights
    have none.
    """
    spots = [spot for loop in program for spot in loop.spots()]
    consts = _Consts({"": tokens, **shared})
    step = _Step(spots, calls, consts, _slots(weights, sums))

    @jax.custom_vjp
    def through(weights, values, sums, x_BTD, floats, ints):
        steps = step.each(step.__call__)

        def visit(spot, index, carry):
            x_BTD, stats = carry
            x_BTD, of_spot = steps[spot.number](step.read(weights, spot, index), x_BTD, floats, ints)
            return x_BTD, _put_all(stats, spot.number, of_spot, index)

        _, stats = zip(*step.results(steps, weights, x_BTD, floats, ints), strict=True)
        return walk(program, visit, (x_BTD, _empty(stats, spots)))

    def forward(weights, values, sums, x_BTD, floats, ints):
        vjps = step.each(step.vjp)

        def visit(spot, index, carry):
            x_BTD, stats, kept = carry
            x_BTD, of_spot, arrays, _ = vjps[spot.number](step.read(weights, spot, index), x_BTD, floats, ints)
            arrays = [_laid_out(a) for a in arrays]
            return x_BTD, _put_all(stats, spot.number, of_spot, index), _put_all(kept, spot.number, arrays, index)

        _, stats, kept, pull = zip(*step.results(vjps, weights, x_BTD, floats, ints), strict=True)
        x_BTD, stats, kept = walk(program, visit, (x_BTD, _empty(stats, spots), _empty(kept, spots)))
        return (x_BTD, stats), (weights, values, sums, floats, ints, kept, pull)

    def backward(saved, cotangents):
        weights, values, sums, floats, ints, kept, pull = saved
        dx_BTD, d_stats = cotangents

        def back(spot, *arrays):
            return pull[spot.number].back(*arrays)

        backs = step.each(back)

        def visit(spot, index, carry):
            n = spot.number
            dx_BTD, grads, d_floats = carry
            inputs = step.read(weights, spot, index), consts.of(spot.symbol, floats), consts.of(spot.symbol, ints)
            dw, dx_BTD, d_here = backs[n](
                [_laid_out(a) for a in _at(kept[n], index)], inputs, (dx_BTD, _at(d_stats[n], index))
            )
            dw = _narrowed(dw)
            if low is not None:
                dw = low.pull(n, dw, _at(values[n], index))
            if sums is not None:
                dw = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), _at(grads[n], index), dw)
            d_floats = d_floats | {k: jax.tree.map(jnp.add, d_floats[k], d) for k, d in d_here.items()}
            return dx_BTD, _put_all(grads, n, dw, index), d_floats

        zeros = jax.tree.map(jnp.zeros_like, weights if low is None else values)
        start = (dx_BTD, zeros if sums is None else sums, jax.tree.map(jnp.zeros_like, floats))
        dx_BTD, grads, d_floats = walk(program, visit, start, reverse=True)
        d_weights, d_sums = (grads, None) if sums is None else (zeros, grads)
        d_weights, d_values = (d_weights, None) if low is None else (None, d_weights)
        return d_weights, d_values, d_sums, dx_BTD, d_floats, jax.tree.map(_no_gradient, ints)

    through.defvjp(forward, backward)
    values = None if low is None else list(low.values)
    return through(list(weights), values, None if sums is None else list(sums), x_BTD, consts.floats, consts.ints)


def run_in_spans(
    program: Sequence[Loop], length: int, calls: Sequence[Call], weights: Sequence, x_BTD, shared: dict[str, Any],
    tokens: Tokens, sums: Sequence | None = None, low: Low | None = None,
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:  # fmt: skip
    """`run`, of which the backward keeps the stream before each run of `length` sublayers alone (see `pattern.spans`)
    and computes one run after the other again, with what its sublayers keep."""
    stats: list = []
    for part in spans(program, length):
        numbers = [spot.number for loop in part for spot in loop.spots()]
        own = [_numbered(loop, {number: i for i, number in enumerate(numbers)}) for loop in part]
        pull = None if low is None else (lambda i, *grads, numbers=numbers: low.pull(numbers[i], *grads))

        def span(weights, x_BTD, shared, tokens, sums, values, own=own, numbers=numbers, pull=pull):
            of_span = None if pull is None else Low(values, pull)
            return run(own, [calls[n] for n in numbers], weights, x_BTD, shared, tokens, sums, of_span)

        mine = [None if of is None else [of[n] for n in numbers] for of in (weights, sums, low and low.values)]
        again = jax.checkpoint(span, policy=jax.checkpoint_policies.nothing_saveable)
        x_BTD, of_span = again(mine[0], x_BTD, shared, tokens, mine[1], mine[2])
        stats += of_span
    return x_BTD, stats


def _numbered(part: Loop | Spot, numbers: dict[int, int]):
    """The part, its spots with other numbers."""
    if isinstance(part, Spot):
        return replace(part, number=numbers[part.number])
    return replace(part, parts=tuple(_numbered(inside, numbers) for inside in part.parts))


def _kind(spot: Spot, calls: Sequence[Call]) -> tuple:
    """Equal for spots that compute the same function."""
    return spot.symbol, calls[spot.number]


class _Consts:
    """Trees that all depths read, by key, taken apart into leaves that have gradients and those that have none."""

    def __init__(self, trees: dict[str, Any]):
        self.floats, self.ints, self._defs = {}, {}, {}
        for key, tree in trees.items():
            leaves, treedef = jax.tree.flatten(tree)
            is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]
            self.floats[key] = [leaf for leaf, yes in zip(leaves, is_float, strict=True) if yes]
            self.ints[key] = [leaf for leaf, yes in zip(leaves, is_float, strict=True) if not yes]
            self._defs[key] = treedef, is_float

    def of(self, symbol: str, leaves: dict[str, list]) -> dict[str, list]:
        """What a symbol reads."""
        return {key: leaves[key] for key in ("", symbol) if key in leaves}

    def join(self, key: str, floats: dict[str, list], ints: dict[str, list]):
        """A tree again; None for a key that is not there."""
        if key not in self._defs:
            return None
        treedef: Any
        treedef, is_float = self._defs[key]
        of_type = {True: iter(floats[key]), False: iter(ints[key])}
        return treedef.unflatten([next(of_type[yes]) for yes in is_float])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Pull:
    """The backward function of a spot without its arrays; a pytree without leaves."""

    treedef: Any = field(metadata={"static": True})
    inputs: tuple[int | None, ...] = field(metadata={"static": True})
    """Of each leaf which leaf of the inputs it is; None: an array of its own."""

    def back(self, arrays: list, inputs, cotangents):
        """The function, from the arrays that were kept and the inputs of the forward, at the cotangents."""
        leaves, kept = jax.tree.leaves(inputs), iter(arrays)
        return self.treedef.unflatten([next(kept) if i is None else leaves[i] for i in self.inputs])(cotangents)


@dataclass(frozen=True, eq=False)
class _Step:
    """One depth of a spot."""

    spots: list[Spot]
    calls: Sequence[Call]
    consts: _Consts
    slots: list[list[int]]
    """See `_slots`."""

    def read(self, weights, spot: Spot, index):
        """The weights of a depth, matrices with slots for gradients that are not rounded before they are added."""
        treedef: Any
        leaves, treedef = jax.tree.flatten(_at(weights[spot.number], index))
        slot = lambda w, n: jnp.zeros((n, *w.shape), jnp.float32)
        both = zip(leaves, self.slots[spot.number], strict=True)
        wide = [Wide(w, slot(w, n), exchange.TOKENS_APART) if n else w for w, n in both]
        return treedef.unflatten(wide)

    def each(self, function: Callable) -> list[Callable]:
        """Of each spot its function(spot, ...); jit traces and lowers each kind once. Its inputs are different arrays,
        though the first x is the embedding."""
        kinds = {_kind(spot, self.calls): jax.jit(partial(function, spot)) for spot in self.spots}
        return [kinds[_kind(spot, self.calls)] for spot in self.spots]

    def results(self, functions: Sequence[Callable], weights, *more) -> list:
        """Shapes of what the spots' functions give, of arrays as they are: jit traces others of these shapes again."""
        first = lambda spot, weights, *more: functions[spot.number](self.read(weights, spot, 0), *more)
        return [jax.eval_shape(partial(first, spot), weights, *more) for spot in self.spots]

    def __call__(self, spot: Spot, weights, x_BTD, floats, ints):
        join = self.consts.join
        y_BTD, stats = self.calls[spot.number](weights, join(spot.symbol, floats, ints), x_BTD, join("", floats, ints))
        return y_BTD, dict(stats)

    def vjp(self, spot: Spot, weights, x_BTD, floats, ints):
        """(x, statistics, the arrays that the backward needs beside the inputs, the backward)."""
        floats, ints = self.consts.of(spot.symbol, floats), self.consts.of(spot.symbol, ints)
        (x_BTD, stats), pull = jax.vjp(lambda w, x, f: self(spot, w, x, f, ints), weights, x_BTD, floats)
        leaves, treedef = jax.tree.flatten(pull)
        inputs = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((weights, floats, ints)))}
        known = tuple(inputs.get(id(leaf)) for leaf in leaves)
        arrays = [leaf for leaf, i in zip(leaves, known, strict=True) if i is None]
        return x_BTD, stats, arrays, _Pull(treedef, known)


def _slots(weights: Sequence, sums: Sequence | None) -> list[list[int]]:
    """Of each spot, of each array of its weights, how many devices have sums of their own; 0: it has none of those."""
    if sums is None:
        return [[0] * len(jax.tree.leaves(of_spot)) for of_spot in weights]
    pairs = [zip(*map(jax.tree.leaves, of_spot), strict=True) for of_spot in zip(weights, sums, strict=True)]
    return [[total.shape[1] if total.ndim > w.ndim else 0 for w, total in of_spot] for of_spot in pairs]


def _narrowed(grads):
    """Gradients of what `_Step.read` makes as those of one array each. What did not go to a slot has been summed over
    devices: each takes its part."""
    is_wide = lambda x: isinstance(x, Wide)
    both = lambda x: x.slot + x.value.astype(x.slot.dtype)[None] / x.slot.shape[0]
    return jax.tree.map(lambda x: both(x) if is_wide(x) else x, grads, is_leaf=is_wide)


def _empty(shapes: Sequence, spots: Sequence[Spot]) -> list:
    """Stacks over each spot's depths."""
    counts = [len(spot.depths) for spot in spots]
    return [
        jax.tree.map(lambda s, n=n: jnp.zeros((n, *s.shape), s.dtype), of_spot)
        for n, of_spot in zip(counts, shapes, strict=True)
    ]


def _at(tree, index):
    """One depth of a stack; of arrays without a gradient the zeros that stand for it."""

    def cut(a):
        if _is_all(a, index):
            return lax.squeeze(a, (0,))
        return lax.squeeze(lax.dynamic_slice_in_dim(a, index, 1, allow_negative_indices=False), (0,))

    return jax.tree.map(lambda a: np.zeros(a.shape[1:], a.dtype) if a.dtype == jax.dtypes.float0 else cut(a), tree)


def _laid_out(array):
    """A kept array with its longest dim, tokens as a rule, and its last one innermost in memory, on TPUs and where the
    last fills lanes: so the forward writes what the backward reads. Else the compiler finds each of them a layout, and
    copies the whole stack over from one to the other."""
    if platform.platform() != "tpu" or array.ndim < 3 or array.shape[-1] % LANES:
        return array
    return with_layout_constraint(array, Layout(tuple(_longest_behind(array.shape))))


def _longest_behind(shape: Sequence[int]) -> list[int]:
    """Its dims from the outermost in: the longest before the last, the others as they stand."""
    *outer, last = range(len(shape))
    longest = max(outer, key=lambda i: shape[i])
    return [*(i for i in outer if i != longest), longest, last]


def _put_all(stacks: list, number: int, values, index) -> list:
    """The stacks, the spot's with the values of one depth."""

    def at(a, v):
        v = lax.expand_dims(v, (0,))
        return v if _is_all(a, index) else lax.dynamic_update_slice_in_dim(a, v, index, 0, allow_negative_indices=False)

    put = jax.tree.map(at, stacks[number], values)
    return [*stacks[:number], put, *stacks[number + 1 :]]


def _is_all(stack, index) -> bool:
    """Whether the depth is the stack's only one: where loops are written out, nothing is cut, or put in its place."""
    return isinstance(index, int) and stack.shape[0] == 1


def _no_gradient(a) -> np.ndarray:
    return np.zeros(jnp.shape(a), jax.dtypes.float0)
