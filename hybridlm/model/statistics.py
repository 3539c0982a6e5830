# SPDX-License-Identifier: Apache-2.0
"""What the blocks of a model report of a batch: one number a statistic."""

import jax
import jax.numpy as jnp

from hybridlm.layers.block import Block, Statistic, walk
from hybridlm.model.config import ModelConfig
from hybridlm.model.pattern import groups

MERGE = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max}
"""Statistic.layers -> how an array of all layers' values becomes one."""


def statistics(config: ModelConfig) -> dict[str, Statistic]:
    """Everything that the model's blocks report, by its name in records; {} where they report nothing."""
    blocks = [config.blocks[symbol] for symbol in dict.fromkeys(config.pattern)]
    return {statistic.name: statistic for block in blocks for statistic in _by_key(block).values()}


def summarise(config: ModelConfig, stats) -> dict[str, jax.Array]:
    """The values of `statistics(config)` from what `HybridLM.hidden_with_stats` gives, layers merged."""
    values: dict[Statistic, list[jax.Array]] = {}
    for group, of_group in zip(groups(config.pattern), stats, strict=True):
        for symbol, of_sublayer in zip(group.unit, of_group, strict=True):
            known = _by_key(config.blocks[symbol])
            for name, array in sorted(of_sublayer.items()):
                values.setdefault(known[name.rsplit(".", 1)[-1]], []).append(array.reshape(-1))
    return {s.name: MERGE[s.layers](jnp.concatenate(arrays)) for s, arrays in values.items()}


def _by_key(block: Block) -> dict[str, Statistic]:
    """Of the block and those inside, by their keys in `Output.stats` without the names of parts."""
    return {key: statistic for _, inside in walk(block) for key, statistic in inside.STATISTICS.items()}
