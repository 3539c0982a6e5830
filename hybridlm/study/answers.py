# SPDX-License-Identifier: Apache-2.0
"""Models of one kind scored on trials, all of them by the same programs.

Short documents stand one behind the other in rows of one length, as in training, so that the stages of a task are one
program and not one each. Axis letters: S models, R rows, K answers of a row; else those of `probes.scoring`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hybridlm.model.model import HybridLM
from hybridlm.probes.scoring import Counts, Score, places
from hybridlm.probes.task import Examples, Task
from hybridlm.study.on_task import Trial, one_device

TEST_SEED = 0
"""Of the rows that models are scored on: those that a seed of training draws are others."""


class Rows(NamedTuple):
    """Documents of one length, packed."""

    tokens_RT: np.ndarray
    segment_ids_RT: np.ndarray
    at_RK: np.ndarray
    """Places of the answers, those of one document next to each other."""


def scored(model: HybridLM, trials: Sequence[Trial], rows: int, batches: int) -> list[dict[str, Any]]:
    """As `scored_together`, of one model."""
    graphdef, state = nnx.split(model)
    return scored_together(graphdef, jax.tree.map(lambda leaf: leaf[None], state), trials, rows, batches)[0]


def scored_together(
    graphdef: nnx.GraphDef, params: Any, trials: Sequence[Trial], rows: int, batches: int
) -> list[list[dict[str, Any]]]:
    """Of each model, of each trial what was right, as JSON, of rows that no training saw.

    params: of all models, stacked in front, on one device. rows: documents of a batch of the first trial; one of longer
    documents has fewer, so that it has no more tokens.
    """
    n_models = jax.tree.leaves(params)[0].shape[0]
    found: list[list[dict[str, Any]]] = [[] for _ in range(n_models)]
    least = trials[0].length
    with jax.set_mesh(one_device()):
        for task, length in trials:
            n = max(1, rows * least // max(length, least))
            longer = length > least
            scores = _scores(graphdef, params, Trial(task, length), n, batches, max(length, least), longer)
            for of, one in zip(found, scores):
                of.append(_as_json(one, task))
    return found


def _as_json(one: Score, task: Task) -> dict[str, Any]:
    by = {facet: {str(value): list(count) for value, count in of.items()} for facet, of in one.by.items()}
    return {"length": one.length, "accuracy": one.accuracy, "right": one.right, "asked": one.asked,
            "chance": task.chance(one.length), "by": by}  # fmt: skip


def _scores(
    graphdef: nnx.GraphDef, params: Any, trial: Trial, n: int, batches: int, row: int, in_turn: bool
) -> list[Score]:
    """Of each model, of `batches` batches of n documents of a trial, in rows of `row` tokens, n at once. in_turn:
    model by model, where all at once would be too many tokens."""
    task, length = trial
    drawn = [task.batch(TEST_SEED, step, n, length) for step in range(batches)]
    facets = {name: np.concatenate([one.facets[name] for one in drawn]) for name in drawn[0].facets}
    joined = (np.concatenate([getattr(one, name) for one in drawn]) for name in ("tokens_BT", "targets_BT"))
    examples = Examples(*joined, facets)
    at_BN, real_BN = places(examples.scored_BT)
    packed = pack(examples.tokens_BT, at_BN, row)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params) for i in range(len(jax.tree.leaves(params)[0]))]
    read = [
        np.concatenate([_likeliest(graphdef, part, *_piece(packed, i, n)) for i in range(0, len(packed.at_RK), n)], 1)
        for part in (parts if in_turn else [params])
    ]
    scores = []
    for likeliest_RK in np.concatenate(read):
        counts = Counts(length)
        counts.add(examples, at_BN, real_BN, likeliest_RK.reshape(-1, at_BN.shape[1])[: len(at_BN)])
        scores.append(counts.score())
    return scores


def pack(tokens_BT: np.ndarray, at_BN: np.ndarray, row: int) -> Rows:
    """Documents in rows of `row` tokens, as many in each as fit; the last row is filled up with empty ones."""
    length = tokens_BT.shape[1]
    each = row // length
    missing = -len(tokens_BT) % each
    whole = lambda x_BX: np.pad(x_BX, ((0, missing), (0, 0))).reshape(-1, each, x_BX.shape[1])
    tokens_RDT, at_RDN = whole(tokens_BT), whole(at_BN) + np.arange(each)[:, None] * length
    ids_RDT = np.broadcast_to(np.arange(1, each + 1)[:, None], tokens_RDT.shape)
    rows_of = lambda x_RDX: x_RDX.reshape(len(x_RDX), -1)
    padded = lambda x_RDT: np.pad(rows_of(x_RDT), ((0, 0), (0, row - each * length))).astype(np.int32)
    return Rows(padded(tokens_RDT), padded(ids_RDT), rows_of(at_RDN).astype(np.int32))


def _piece(packed: Rows, start: int, n: int) -> Rows:
    """n rows from a row on, where there are fewer filled up by copies of the first."""
    take = np.arange(start, start + n)
    return Rows(*(x[np.where(take < len(x), take, 0)] for x in packed))


@partial(jax.jit, static_argnums=0)
def _likeliest(graphdef: nnx.GraphDef, params: Any, tokens_RT, segment_ids_RT, at_RK) -> jax.Array:
    """[S, R, K] of all vocabulary."""

    def of_model(params):
        model = nnx.merge(graphdef, params)
        hidden_RTD = model.hidden(tokens_RT, segment_ids_RT)
        return model.logits(jnp.take_along_axis(hidden_RTD, at_RK[..., None], axis=1)).argmax(axis=-1)

    return jax.vmap(of_model)(params)
