# SPDX-License-Identifier: Apache-2.0
"""Over which axes arrays vary in a shard_map that checks it (check_vma); elsewhere everything here changes nothing."""

import contextlib

import jax
import numpy as np


def vary_alike(tree):
    """`tree` with its arrays varying over the same axes of a shard_map that checks it (check_vma), else as it is.

    A custom gradient must vary as its argument does, and a gradient with respect to parameters, equal on all devices,
    of tokens that are not, would not; so made, JAX itself sums it over the devices.
    """
    axes = frozenset().union(*map(_varying, jax.tree.leaves(tree)))

    def vary(leaf):
        missing = tuple(axes - _varying(leaf)) if isinstance(leaf, (jax.Array, np.ndarray)) else ()
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree) if axes else tree


@contextlib.contextmanager
def unchecked_varying():
    """Within, a shard_map does not check over which of its axes arrays vary: for kernels that add to a reference.

    Results count as the same on all devices until `vary_alike` says otherwise.
    """
    from jax._src import config  # no public name turns the check off but shard_map's own argument

    with config._check_vma(False):
        yield


def call_varying(call, *arrays):
    """call(*arrays) of a kernel: under a checked shard_map its results vary over the axes that its arrays vary over."""
    with unchecked_varying():  # within, a product varies over nothing; XLA leaves out one with 1
        results = call(*(array * np.ones((), array.dtype) if _varying(array) else array for array in arrays))
    return vary_alike((results, arrays))[0]


def _varying(leaf) -> frozenset:
    return jax.typeof(leaf).manual_axis_type.varying if isinstance(leaf, jax.Array) else frozenset()
