# SPDX-License-Identifier: Apache-2.0
"""AdamW and Muon with the right parameters in each.

Only matrices (`kind == "matrix"` in the model's table of parameters) are decayed and, under Muon (Jordan et al. 2024),
orthogonalised; embeddings, norms, biases, convolutions, sinks and recurrence parameters take Adam without decay.
"""

from collections.abc import Callable

import jax
import optax

from hybridlm.optim.config import OptimConfig
from hybridlm.optim.schedule import make_schedule


def make_optimizer(optim: OptimConfig, steps: int, info) -> tuple[optax.GradientTransformation, Callable]:
    """The transformation from mean gradients to updates, and the schedule of AdamW's learning rate.

    info: tree like the parameters with the model's ParamInfo at each leaf.
    """
    schedule = make_schedule(optim, steps, optim.lr)
    is_matrix = jax.tree.map(lambda leaf: leaf.kind == "matrix", info)
    adam, scale = optax.scale_by_adam(*optim.betas, eps=optim.eps), optax.scale_by_learning_rate(schedule)
    if optim.name == "adamw":
        rule = optax.chain(adam, optax.add_decayed_weights(optim.weight_decay, mask=is_matrix), scale)
    else:
        labels = jax.tree.map(lambda matrix: "muon" if matrix else "adam", is_matrix)
        rule = optax.partition({"muon": _muon(optim, steps, info), "adam": optax.chain(adam, scale)}, labels)
    clip = optax.identity() if optim.clip_norm is None else optax.clip_by_global_norm(optim.clip_norm)
    return optax.chain(clip, rule), schedule


def _muon(optim: OptimConfig, steps: int, info) -> optax.GradientTransformation:
    """Muon, for a tree in which all but the matrices is masked."""
    dims = jax.tree.map(lambda leaf: muon_dims(leaf) or optax.MaskedNode(), info)
    return optax.contrib.muon(
        make_schedule(optim, steps, optim.muon_lr), beta=optim.muon_momentum, weight_decay=optim.weight_decay,
        eps=optim.eps, muon_weight_dimension_numbers=dims,
    )  # fmt: skip


def muon_dims(leaf) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter Muon contracts and which it produces; None: not Muon's.

    The axis of stacked layers and `fused_axes` (both counted without that axis) index independent matrices.
    """
    if leaf.kind != "matrix":
        return None
    first = 1 if leaf.stacked else 0
    axes = tuple(first + axis for axis in range(len(leaf.axes)) if axis not in leaf.fused_axes)
    return optax.contrib.MuonDimensionNumbers(axes[: leaf.n_in], axes[leaf.n_in :])
