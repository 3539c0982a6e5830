# SPDX-License-Identifier: Apache-2.0
"""How the axes of a published tensor become those of a parameter, written as data.

`"mixer.in_zx: (c H P) D -> D c H P"`: the parameter `mixer.in_zx`; on the left the axes of the published tensor, a
parenthesis being one axis that runs over several of ours, the last fastest; on the right ours. `1` on the left is an
axis of size one, `-c` an axis in reverse order, a number on the right an index into our parameter at that axis, and a
right-hand name that the left has not the axis that the tensor's name counts (`experts.{e}.`). Where the name counts
nothing, the rows of all specs of the tensor come again for each index of that axis: `["mixer.w_q: P D -> D h P",
"mixer.w_gate: P D -> D h P"]` is a query and its gate, head by head. A parenthesis on the right, `(g r)`, is one axis
of ours that runs over the counted one and the next; `; g of mixer.in_q 1` behind the spec says where its size is found:
axis 1 of that parameter; `; s is 4` says the size. Without an arrow the right is the left. Sizes are those of our
parameter. Every such move can be undone.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import numpy as np


@dataclass(frozen=True)
class Move:
    """A parsed spec."""

    path: str
    """Dotted path of the parameter."""
    left: tuple[tuple[str, ...], ...]
    """Of each axis of the published tensor the names that it runs over; empty: size one."""
    right: tuple[tuple[str, ...], ...]
    """Of each axis of the parameter the names that it runs over, the counted one first, or digits: an index."""
    reversed_names: frozenset[str]
    """Names whose order is reversed."""
    count_of: tuple[str, int] | None = None
    """Path of the parameter, and its axis, that has the size of the counted axis, or "" and the size; None: it is an
    axis of this one."""

    def counted(self) -> str | None:
        """The name that the tensors' names count, or that repeats the tensor's rows, if any."""
        known = {name for group in self.left for name in group}
        free = [name for name in itertools.chain(*self.right) if not name.isdigit() and name not in known]
        if len(free) > 1:
            raise ValueError(f"{self.path}: more than one axis ({', '.join(free)}) that the published tensor has not")
        return free[0] if free else None


@cache
def parse(spec: str) -> Move:
    """The Move of a spec; ValueError where the two sides do not name the same axes."""
    body, _, count = spec.partition(";")
    path, _, sides = body.partition(":")
    left_text, arrow, right_text = sides.partition("->")
    left, reversed_names = _axes(left_text)
    left = tuple(() if group == ("1",) else group for group in left)  # on the right it is an index
    right = _axes(right_text)[0] if arrow else tuple((name,) for name in itertools.chain(*left))
    flat, ours = tuple(itertools.chain(*left)), tuple(itertools.chain(*right))
    if not set(flat) <= set(ours) or len(set(flat)) != len(flat):
        raise ValueError(f"spec {spec!r}: every axis on the left must be on the right, once")
    move = Move(path.strip(), left, right, reversed_names, _count_of(count))
    if any(len(group) > 2 or (len(group) == 2 and group[0] != move.counted()) for group in right):
        raise ValueError(f"spec {spec!r}: a parenthesis on the right is of the counted axis and one more")
    return move


def _axes(text: str) -> tuple[tuple[tuple[str, ...], ...], frozenset[str]]:
    """Of each axis the names that it runs over, and the names that are reversed."""
    axes, group, reversed_names = [], None, set()
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            group = []
        elif word == ")":
            axes.append(tuple(group))
            group = None
        else:
            name = word.removeprefix("-")
            if word != name:
                reversed_names.add(name)
            if group is None:
                axes.append((name,))
            else:
                group.append(name)
    return tuple(axes), frozenset(reversed_names)


def _count_of(text: str) -> tuple[str, int] | None:
    """`g of PATH AXIS`, or `g is SIZE`."""
    words = text.split()
    if words and words[1] == "is":
        return "", int(words[2])
    return (words[2], int(words[3])) if words else None


@dataclass(frozen=True)
class Piece:
    """Rows of a published tensor, and the part of a parameter that they are."""

    path: str
    """Dotted path of the parameter."""
    index: tuple[int | slice, ...]
    """The part of the parameter (its axis over scanned repeats included)."""
    shape: tuple[int, ...]
    """Of the rows in the published tensor."""
    sizes: tuple[int, ...]
    """Of the rows with every axis apart, as on the left."""
    order: tuple[int, ...]
    """Transposes from left to right."""
    flips: tuple[int, ...]
    """Axes, as on the left, that are reversed."""

    def to_ours(self, rows: np.ndarray) -> np.ndarray:
        """The part of the parameter; a view where the rows can be viewed so."""
        return np.transpose(np.flip(rows.reshape(self.sizes), self.flips), self.order)

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """The inverse of to_ours."""
        return np.flip(np.transpose(part, np.argsort(self.order)), self.flips).reshape(self.shape)


def piece(
    move: Move, path: str, shape: tuple[int, ...], repeat: int | None, count: int | None, n_counted: int | None = None
) -> Piece:
    """The Piece of a move on a parameter.

    path: of the parameter in the model; shape: of one layer's value; repeat: index of the layer in the stacked value
    (None: not stacked); count: index along the counted axis, of n_counted. ValueError where the axes are not as many.
    """
    names = [" ".join(group) for group in move.right]
    if len(shape) != len(names):
        raise ValueError(f"{path} of shape {shape} has not the axes {' '.join(names)}")
    sizes: dict[str, int] = {}
    counted, index, kept = move.counted(), [] if repeat is None else [repeat], []
    for group, size in zip(move.right, shape, strict=True):
        *first, last = group
        if first:  # the counted axis and the next, together one of ours
            if not n_counted or size % n_counted:
                raise ValueError(f"{path} of shape {shape}: {n_counted} {counted} do not divide ({' '.join(group)})")
            sizes[last] = size // n_counted
            index.append(slice(count * sizes[last], (count + 1) * sizes[last]))
        else:
            sizes[last] = size
            index.append(int(last) if last.isdigit() else count if last == counted else slice(None))
        if isinstance(index[-1], slice):
            kept.append(last)
    flat = tuple(itertools.chain(*move.left))
    return Piece(
        path,
        tuple(index),
        tuple(math.prod(sizes[name] for name in group) for group in move.left),
        tuple(sizes[name] for name in flat),
        tuple(flat.index(name) for name in kept),
        tuple(i for i, name in enumerate(flat) if name in move.reversed_names),
    )
