# SPDX-License-Identifier: Apache-2.0
"""What the blocks of a model report of a batch: one number a statistic, and where they are inspected more."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybridlm.layers.block import Block, Statistic, walk
from hybridlm.model.config import ModelConfig
from hybridlm.model.pattern import loops

MERGE: dict[str, Callable[[jax.Array], jax.Array]] = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "min": jnp.min}
"""Statistic.layers, or the end of an inspected number's name -> how an array of all layers' values becomes one."""


def statistics(config: ModelConfig) -> dict[str, Statistic]:
    """Everything that the model's blocks report, by its name in records; {} where they report nothing."""
    blocks = [config.blocks[symbol] for symbol in dict.fromkeys(config.pattern)]
    return {statistic.name: statistic for block in blocks for statistic in _by_key(block).values()}


def summarise(config: ModelConfig, stats) -> dict[str, jax.Array]:
    """The values of `statistics(config)` from what `HybridLM.hidden_with_stats` gives, layers merged."""
    values: dict[Statistic, list[jax.Array]] = {}
    for loop, of_loop in zip(loops(config.pattern, config.unroll or 1), stats, strict=True):
        for spot, of_sublayer in zip(loop.spots(), of_loop, strict=True):
            known = _by_key(config.blocks[spot.symbol])
            for name, array in sorted(of_sublayer.items()):
                values.setdefault(known[name.rsplit(".", 1)[-1]], []).append(array.reshape(-1))
    return {s.name: MERGE[s.layers](jnp.concatenate(arrays)) for s, arrays in values.items()}


def kind_of(config: ModelConfig, symbol: str) -> str:
    """What profiles and records call the sublayers of a symbol: "M.Mamba2"."""
    return f"{symbol}.{type(config.blocks[symbol]).__name__}"


def inspected(config: ModelConfig, stats) -> dict[str, dict[str, jax.Array]]:
    """{kind of block: {"dt_min": scalar}}, layers merged, from what `HybridLM.hidden_with_stats` gives with `inspect`.

    ValueError for a name that does not say by its end how layers merge.
    """
    values: dict[tuple[str, str], list[jax.Array]] = {}
    for loop, of_loop in zip(loops(config.pattern, config.unroll or 1), stats, strict=True):
        for spot, of_sublayer in zip(loop.spots(), of_loop, strict=True):
            for name, array in of_sublayer.items():
                values.setdefault((kind_of(config, spot.symbol), name), []).append(array.reshape(-1))
    found: dict[str, dict[str, jax.Array]] = {}
    for (kind, name), arrays in sorted(values.items()):
        end = name.rpartition("_")[2]
        if end not in MERGE:
            raise ValueError(f"inspect of {kind}: {name!r} must end in {', '.join(f'_{end}' for end in MERGE)}")
        found.setdefault(kind, {})[name] = MERGE[end](jnp.concatenate(arrays))
    return found


def _by_key(block: Block) -> dict[str, Statistic]:
    """Of the block and those inside, by their keys in `Output.stats` without the names of parts."""
    return {key: statistic for _, inside in walk(block) for key, statistic in inside.STATISTICS.items()}
