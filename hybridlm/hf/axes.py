# SPDX-License-Identifier: Apache-2.0
"""How the axes of a published tensor become those of a parameter, written as data.

`"mixer.in_zx: (c H P) D -> D c H P"`: the parameter `mixer.in_zx`; on the left the axes of the published tensor, a
parenthesis being one axis that runs over several of ours, the last fastest; on the right ours. `1` on the left is an
axis of size one, `-c` an axis in reverse order, a number on the right an index into our parameter at that axis, and a
right-hand name that the left has not the axis that the tensor's name counts (`experts.{e}.`). Without an arrow the
right is the left. Sizes are those of our parameter. Every such move can be undone.
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
    right: tuple[str, ...]
    """Of each axis of the parameter its name, or digits: an index."""
    reversed_names: frozenset[str]
    """Names whose order is reversed."""

    def counted(self) -> str | None:
        """The name that the tensors' names count, if any."""
        known = {name for group in self.left for name in group}
        free = [name for name in self.right if not name.isdigit() and name not in known]
        if len(free) > 1:
            raise ValueError(f"{self.path}: more than one axis ({', '.join(free)}) that the published tensor has not")
        return free[0] if free else None


@cache
def parse(spec: str) -> Move:
    """The Move of a spec; ValueError where the two sides do not name the same axes."""
    path, _, sides = spec.partition(":")
    left_text, arrow, right_text = sides.partition("->")
    left, group, reversed_names = [], None, set()
    for word in left_text.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            group = []
        elif word == ")":
            left.append(tuple(group))
            group = None
        else:
            name = word.removeprefix("-")
            if word != name:
                reversed_names.add(name)
            names = () if name == "1" else (name,)
            if group is None:
                left.append(names)
            else:
                group.extend(names)
    flat = tuple(itertools.chain(*left))
    right = tuple(right_text.split()) if arrow else flat
    if not set(flat) <= set(right) or len(set(flat)) != len(flat):
        raise ValueError(f"spec {spec!r}: every axis on the left must be on the right, once")
    return Move(path.strip(), tuple(left), right, frozenset(reversed_names))


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


def piece(move: Move, path: str, shape: tuple[int, ...], repeat: int | None, count: int | None) -> Piece:
    """The Piece of a move on a parameter.

    path: of the parameter in the model; shape: of one layer's value; repeat: index of the layer in the stacked value
    (None: not stacked); count: index along the counted axis. ValueError where the axes are not as many.
    """
    if len(shape) != len(move.right):
        raise ValueError(f"{path} of shape {shape} has not the axes {' '.join(move.right)}")
    sizes = dict(zip(move.right, shape, strict=True))
    counted = move.counted()
    index: list[int | slice] = [] if repeat is None else [repeat]
    for name in move.right:
        index.append(int(name) if name.isdigit() else count if name == counted else slice(None))
    flat = tuple(itertools.chain(*move.left))
    kept = [name for name in move.right if name in flat]
    return Piece(
        path,
        tuple(index),
        tuple(math.prod(sizes[name] for name in group) for group in move.left),
        tuple(sizes[name] for name in flat),
        tuple(flat.index(name) for name in kept),
        tuple(i for i, name in enumerate(flat) if name in move.reversed_names),
    )
