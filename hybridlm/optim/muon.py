# SPDX-License-Identifier: Apache-2.0
"""Muon (Jordan et al. 2024): the momentum of a matrix, orthogonalised."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.optim.together import Form, is_form, together

ITERATIONS = 5
"""Of Newton and Schulz, towards an orthogonal matrix."""
MATRICES = optax.contrib.MuonDimensionNumbers((1,), (2,))
"""Of an array of matrices, one behind the other."""


@dataclass(frozen=True)
class Muon:
    """Muon for matrices, at its own learning rate and decayed; Adam for all others, at optim.lr and without decay."""

    lr: float = 0.02
    """Peak learning rate of the matrices."""
    momentum: float = 0.95
    """Decay of the matrices' momentum (Nesterov)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decays of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment, and to the norm by which Muon divides."""
    grouped: bool = False
    """On one device, matrices of one shape are orthogonalised together: fewer loops to compile, another last bit."""

    def __post_init__(self):
        check_fields(self)
        for name in ("lr", "eps"):
            require(getattr(self, name) > 0, f"{name} ({getattr(self, name)}) must be positive")
        require(0 <= self.momentum < 1, f"momentum ({self.momentum}) must be in [0, 1)")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas ({self.betas}) must be in [0, 1)")

    def transform(
        self, rate: Callable[[float], optax.Schedule], lr: float, weight_decay: float, info
    ) -> optax.GradientTransformation:
        """As of every update rule; see rules.py."""
        adam = optax.chain(optax.scale_by_adam(*self.betas, eps=self.eps), optax.scale_by_learning_rate(rate(lr)))

        def make(dims) -> optax.GradientTransformation:
            return optax.contrib.muon(
                rate(self.lr), ns_steps=ITERATIONS, beta=self.momentum, weight_decay=weight_decay, eps=self.eps,
                muon_weight_dimension_numbers=dims,
            )  # fmt: skip

        muon = make(jax.tree.map(lambda leaf: muon_dims(leaf) or optax.MaskedNode(), info))
        if self.grouped:
            forms = jax.tree.map(_form, info)
            keys = [form.key for form in jax.tree.leaves(forms, is_leaf=is_form) if is_form(form)]
            muon = together(muon, make(dict.fromkeys(keys, MATRICES)), forms)
        labels = jax.tree.map(lambda leaf: "muon" if leaf.kind == "matrix" else "adam", info)
        return optax.partition({"muon": _in_a_loop(muon), "adam": adam}, labels)


def _in_a_loop(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon, its iterations in a loop, not one after the other in the program: the same numbers to the bit, a fifth of
    the products to compile. optax scans where there are coefficients for each iteration; the state keeps one row."""

    def update(grads, state, params=None):
        updates, new = muon.update(grads, _with_rows(state, lambda row: jnp.stack([row] * ITERATIONS)), params)
        return updates, _with_rows(new, lambda rows: rows[0])

    return optax.GradientTransformation(muon.init, update)


def _with_rows(state, change: Callable):
    """A state with other coefficients."""

    def changed(part):
        return part._replace(ns_coeffs=change(part.ns_coeffs)) if _is_muon(part) else part

    return jax.tree.map(changed, state, is_leaf=_is_muon)


def _is_muon(part) -> bool:
    return isinstance(part, optax.contrib.MuonState)


def muon_dims(leaf) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter Muon contracts and which it produces; None: not Muon's.

    leaf: the parameter's ParamInfo. The axis of stacked layers and `fused_axes` (both counted without that axis) index
    independent matrices.
    """
    if leaf.kind != "matrix":
        return None
    first = 1 if leaf.stacked else 0
    axes = tuple(first + axis for axis in range(len(leaf.axes)) if axis not in leaf.fused_axes)
    return optax.contrib.MuonDimensionNumbers(axes[: leaf.n_in], axes[leaf.n_in :])


def _form(leaf) -> Form | optax.MaskedNode:
    """How a parameter, by its ParamInfo, lies in the array that is updated: [matrices, contracted, produced]."""
    dims = muon_dims(leaf)
    if dims is None:
        return optax.MaskedNode()
    of_matrix = (*dims.reduction_axis, *dims.output_axis)
    inner = tuple(math.prod(leaf.shape[axis] for axis in side) for side in dims)
    order = (*(axis for axis in range(len(leaf.shape)) if axis not in of_matrix), *of_matrix)
    return Form("{} x {}".format(*inner), leaf.shape, order, inner)
