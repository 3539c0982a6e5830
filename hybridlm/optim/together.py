# SPDX-License-Identifier: Apache-2.0
"""Parameters of one form updated together: compilers take as long for a small array as for a large one."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Form(NamedTuple):
    """How a parameter lies in the array of all of its key, one behind the other along the first axis."""

    key: str
    shape: tuple[int, ...]
    """Of the parameter."""
    order: tuple[int, ...]
    """Its axes as they follow each other there."""
    inner: tuple[int, ...]
    """Shape of the array there, its first axis aside."""

    @property
    def rows(self) -> int:
        """What it takes of the first axis."""
        return math.prod(self.shape) // math.prod(self.inner)

    def there(self, x):
        """The parameter, or an array like it, as it lies there."""
        return x.transpose(self.order).reshape(self.rows, *self.inner)

    def back(self, rows):
        """From there."""
        return rows.reshape([self.shape[axis] for axis in self.order]).transpose(np.argsort(self.order))


def is_form(x) -> bool:
    """For trees of them."""
    return isinstance(x, Form)


def together(
    apart: optax.GradientTransformation, joined: optax.GradientTransformation, forms: Any
) -> optax.GradientTransformation:
    """`apart`, a rule for each parameter by itself, with its state, but whose updates `joined` makes where the program
    is of one device; over several, joining would exchange what they hold.

    joined: the same rule for a dict with an array for each key; it must treat the rows of a form, its first axis, one
    by one. forms: tree like the parameters, a Form each, masked where the rule has none.
    """
    flat, tree = jax.tree.flatten(forms, is_leaf=lambda x: is_form(x) or _is_masked(x))
    members: dict[str, list[int]] = {}
    for index, form in enumerate(flat):
        if is_form(form):
            members.setdefault(form.key, []).append(index)
    keys = jax.tree.structure(dict.fromkeys(members, 0))

    def pack(params):
        leaves = jax.tree.leaves(params, is_leaf=_is_masked)
        there = lambda indices: jnp.concatenate([flat[index].there(leaves[index]) for index in indices])
        masked = {key: _is_masked(leaves[indices[0]]) for key, indices in members.items()}
        return {key: optax.MaskedNode() if masked[key] else there(indices) for key, indices in members.items()}

    def unpack(packed):
        leaves: list[Any] = [optax.MaskedNode()] * len(flat)
        for key, indices in members.items():
            if not _is_masked(packed[key]):
                ends = np.cumsum([flat[index].rows for index in indices])[:-1]
                for index, part in zip(indices, jnp.split(packed[key], ends), strict=True):
                    leaves[index] = flat[index].back(part)
        return jax.tree.unflatten(tree, leaves)

    def update(grads, state, params=None):
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.size > 1:
            return apart.update(grads, state, params)
        packed = _in_place(pack, tree, state), None if params is None else pack(params)
        updates, new = joined.update(pack(grads), *packed)
        return unpack(updates), _in_place(unpack, keys, new)

    return optax.GradientTransformation(apart.init, update)


def _in_place(change: Callable, tree, state):
    """A state with its parts changed that are like the tree, masked leaves included."""
    is_like = lambda x: jax.tree.structure(x, is_leaf=_is_masked) == tree
    return jax.tree.map(lambda x: change(x) if is_like(x) else x, state, is_leaf=is_like)


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)
