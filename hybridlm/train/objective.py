# SPDX-License-Identifier: Apache-2.0
"""What training minimises, and the metrics of it."""

from collections.abc import Callable

import jax
from flax import nnx

from hybridlm.config import Config
from hybridlm.model.statistics import statistics, summarise
from hybridlm.train.layout import SUMS
from hybridlm.train.loss import training_loss
from hybridlm.train.metrics import Mean, Metrics, Sum


def make_objective(config: Config, graphdef: nnx.GraphDef) -> Callable:
    """(params, batch) -> (objective, metrics): summed over the tokens that have a target, so that batches add up.

    The objective is cross entropy, optim.z_loss times the squared log-partition, and the losses of blocks, in nats.
    params: of the graphdef's model; beside them the sums of gradients of `layout.SUMS`, where there are some.
    """
    kinds = statistics(config.model)

    def objective(params, batch) -> tuple[jax.Array, Metrics]:
        model = nnx.merge(graphdef, {name: value for name, value in params.items() if name != SUMS})
        where = batch["segment_ids"], batch["positions"]
        x_BTD, stats = model.hidden_with_stats(batch["tokens"], *where, params.get(SUMS))
        with jax.named_scope("loss"):
            total, sums = training_loss(
                x_BTD, model.unembedding(), batch["targets"], z_loss=config.optim.z_loss, multiplier=model.logit_scale,
                softcap=config.model.logit_softcap,
            )  # fmt: skip
            metrics = {"loss": Mean(sums.nats, sums.tokens), "z": Mean(sums.z, sums.tokens)}
            for name, value in summarise(config.model, stats).items():
                of_tokens = Mean(value * sums.tokens, sums.tokens)
                metrics[name] = Sum(value) if kinds[name].batches == "sum" else of_tokens
                total = total + of_tokens.total if kinds[name].loss else total
            return total, metrics

    return objective
