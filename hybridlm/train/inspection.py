# SPDX-License-Identifier: Apache-2.0
"""What the parts of a model are doing, in numbers, by kind of block: gradients, updates, and what mixers say of
themselves.

A program of its own, which computes the step that is to be taken without taking it: where `run.inspect_every` is 0 it
is never compiled, and where it is not the steps are the same to the bit. Its cost is about that of a step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from hybridlm.model.config import ModelConfig
from hybridlm.model.pattern import groups
from hybridlm.model.statistics import inspected, kind_of
from hybridlm.train.layout import Layout


def make_inspect(
    gradients: Callable, make_rule: Callable, n_micro: int, layout: Layout, graphdef: nnx.GraphDef,
    prepare: Callable, whole: Callable,
) -> Callable:  # fmt: skip
    """(state, batch, lengths, *base) -> {"M.Mamba2/grad_norm": float32 scalar, ...}; the state is left alone.

    For every kind of block, and for what else has parameters, the norms of its gradient and of its parameters, and the
    norm of the update over that of the parameters (`update_ratio`). What mixers say of themselves (`Mixer.inspect`) is
    of the first of n_micro microbatches. gradients, make_rule, layout, prepare: as of the train step. graphdef: of the
    model with stacked parameters. whole: of the state's parameters and the base, if any, those of the model.
    """

    def inspect(state, batch, lengths, *base) -> dict[str, jax.Array]:
        params = state["params"]
        batch = prepare(batch, lambda: jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"]))
        _, _, grads = gradients(params, batch, *base)
        updates, _ = make_rule(lengths)[0].update(grads, state["opt_state"], params)
        weights, changes = (norms(layout.config, tree) for tree in (params, updates))
        ratios = {
            kind: changes[kind] / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny) for kind, norm in weights.items()
        }
        found = {"grad_norm": norms(layout.config, grads), "weight_norm": weights, "update_ratio": ratios}
        numbers = {f"{kind}/{name}": value for name, kinds in found.items() for kind, value in kinds.items()}
        return numbers | said(whole(params, *base), batch)

    def said(params, batch) -> dict[str, jax.Array]:
        """What mixers say of themselves, forward."""
        model = nnx.merge(graphdef, layout.stack(params))
        first = {name: x.reshape(-1, n_micro, x.shape[-1])[:, 0] for name, x in batch.items()}
        tokens = first["tokens"], first["segment_ids"], first["positions"]
        _, stats = model.hidden_with_stats(*tokens, inspect=True)
        by_kind = inspected(layout.config, stats)
        return {f"{kind}/{name}": value for kind, numbers in by_kind.items() for name, value in numbers.items()}

    return inspect


def norms(config: ModelConfig, tree: dict) -> dict[str, jax.Array]:
    """The global norm of each kind's part of a tree like the parameters.

    Kinds: those of blocks ("M.Mamba2", norms and links of their sublayers included), what the depths of a symbol share
    ("S.Shared/shared"), and the names of all else ("embedding", "norm", "output").
    """
    parts: dict[str, list] = {}
    for name, part in tree.items():
        if name == "groups":
            for group, of_group in part.items():
                for position, sublayer in of_group.items():
                    kind = kind_of(config, groups(config.pattern)[group].unit[position])
                    parts.setdefault(kind, []).append(sublayer)
        elif name == "shared":
            parts |= {f"{kind_of(config, symbol)}/shared": [shared] for symbol, shared in part.items()}
        else:
            parts[name] = [part]
    return {kind: optax.tree.norm(part) for kind, part in parts.items() if jax.tree.leaves(part)}
