# SPDX-License-Identifier: Apache-2.0
"""What may change in the config of a run on resume: what alters no step's result beyond rounding."""

from collections.abc import Callable
from typing import Any

from hybridlm.config import Config
from hybridlm.config.stored import differences
from hybridlm.layers.block import walk

FREE = {
    "its name and its folder": ("name", "run.dir"),
    "where its first parameters came from": ("init",),
    "how devices share the work": ("mesh", "cluster"),
    "what the backward recomputes": ("model.remat",),
    "how text is read": ("data.workers", "data.prefetch", "data.cache_dir"),
    "how long it is": ("run.steps",),
    "what it writes, and when": (
        "run.log_every", "run.eval_every", "run.eval_batches", "run.save_every", "run.keep", "run.sample_prompt",
        "run.sample_tokens", "run.tensorboard", "run.profile_steps",
    ),
    "when it gives up": ("optim.max_skipped",),
}  # fmt: skip
"""Meaning -> dotted names, of whole sub-configs too. Blocks say the same of their fields by FREE."""


def refused(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names that differ and may not, with both values: a run of `old` cannot be resumed with `new`."""
    free = may_change(new)
    same = tuple(f"model.blocks.{symbol}." for symbol in new.model.pattern if _same_block(symbol, old, new, free))
    changed = differences(old, new).items()
    return {name: values for name, values in changed if not free(name) and not name.startswith(same)}


def _same_block(symbol: str, old: Config, new: Config, free: Callable[[str], bool]) -> bool:
    """Whether a block computes the same: one may say n_heads=None, the other the number that it comes to."""
    width = new.model.d_model
    a, b = (config.model.blocks[symbol] if symbol in config.model.pattern else None for config in (old, new))
    if type(a) is not type(b) or old.model.d_model != width:
        return False
    changed = differences(a.resolved(width), b.resolved(width))
    return all(free(f"model.blocks.{symbol}.{name}") for name in changed)


def may_change(config: Config) -> Callable[[str], bool]:
    """Whether a dotted name of the config may change.

    The number of microbatches may unless a block adds to the loss what it counts over a batch, as the balance of
    experts: that would be counted over other batches.
    """
    free = {name for names in FREE.values() for name in names}
    blocks = {f"model.blocks.{symbol}": block for symbol, block in config.model.blocks.items()}
    inside = [pair for path, block in blocks.items() for pair in walk(block, path)]
    free |= {f"{path}.{field}" for path, block in inside for field in block.FREE}
    if not any(statistic.loss for _, block in inside for statistic in block.STATISTICS.values()):
        free.add("optim.accumulate")
    return lambda name: any(name == known or name.startswith(f"{known}.") for known in free)
