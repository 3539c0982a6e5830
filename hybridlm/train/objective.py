# SPDX-License-Identifier: Apache-2.0
"""What training minimises, and the metrics of it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hybridlm.config import Config
from hybridlm.layers.segments import with_padding_last
from hybridlm.model import lora
from hybridlm.model.depth import Low
from hybridlm.model.statistics import statistics, summarise
from hybridlm.train import tables
from hybridlm.train.layout import SUMS
from hybridlm.train.loss import training_loss
from hybridlm.train.metrics import Mean, Metrics, Sum


def make_objective(config: Config, graphdef: nnx.GraphDef) -> Callable:
    """(params, batch, weight) -> (objective, metrics): summed over the tokens that have a target, so that batches add
    up; the objective is multiplied by the weight, 1 where it is left out.

    The objective is cross entropy, optim.z_loss times the squared log-partition, and the losses of blocks, in nats.
    params: of the graphdef's model; beside them the sums of gradients of `layout.SUMS` and `tables.SUMS`, where there
    are some, and the adapters of `lora.LOW`, where gradients are those of adapters: groups have theirs in them already,
    of which the rest is constant. Of conversations a metric says which share of their tokens is trained on.
    """
    kinds, is_chat = statistics(config.model), config.data.format == "chat"
    specs = lora.of_program(config.model, config.lora) if config.lora.on else {}
    merge = partial(lora.merge, specs=specs, scale=config.lora.scale)

    def pull(number: int, dw, values: dict) -> dict:
        at = {path[2:]: spec for path, spec in specs.items() if path[:2] == ("groups", number)}
        return lora.pull(nnx.to_pure_dict(dw), values, at, config.lora.scale)

    def objective(params, batch, weight=1.0) -> tuple[jax.Array, Metrics]:
        params = tables.with_sums(params)
        low, of_spots = params.get(lora.LOW), None
        if low is not None:
            of_spots = Low([low["groups"][n] for n in range(len(low["groups"]))], pull)
            params = params | merge({"shared": params["shared"]}, low) if "shared" in low else params
        model = nnx.merge(graphdef, {name: value for name, value in params.items() if name not in (SUMS, lora.LOW)})
        batch = with_padding_last(batch)
        where = batch["segment_ids"], batch["positions"]
        x_BTD, stats = model.hidden_with_stats(
            batch["tokens"], *where, params.get(SUMS), low=of_spots, padding_is_last=True
        )
        with jax.named_scope("loss"):
            total, sums = training_loss(
                x_BTD, model.unembedding(), batch["targets"], z_loss=config.optim.z_loss, multiplier=model.logit_scale,
                softcap=config.model.logit_softcap, weight=weight,
            )  # fmt: skip
            metrics = {"loss": Mean(sums.nats, sums.tokens), "z": Mean(sums.z, sums.tokens)}
            if is_chat:
                metrics["trained"] = Mean(sums.tokens, jnp.sum(batch["segment_ids"] != 0, dtype=jnp.float32))
            for name, value in summarise(config.model, stats).items():
                of_tokens = Mean(value * sums.tokens, sums.tokens)
                metrics[name] = Sum(value) if kinds[name].batches == "sum" else of_tokens
                total = total + weight * of_tokens.total if kinds[name].loss else total
            return total, metrics

    return objective
