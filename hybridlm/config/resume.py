# SPDX-License-Identifier: Apache-2.0
"""What may change in the config of a run on resume, by meaning.

What alters no step's result beyond rounding may, and so may what says how the run learns and what it reads from
here on: each change is recorded in the run. What parameters, the order of rows and the meaning of tokens hang on may
not.
"""

from collections.abc import Callable
from typing import Any

from hybridlm.config import Config
from hybridlm.config.stored import differences
from hybridlm.layers.block import walk

FREE = {
    "its name and its folder": ("name", "run.dir"),
    "where its first parameters came from": ("init",),
    "how devices share the work": (
        "mesh", "cluster", "optim.gather_once", "optim.scatter_once", "optim.split_over_data", "optim.offload",
    ),
    "what the backward recomputes": ("model.remat", "model.remat_span"),
    "how the program is written": ("model.unroll",),
    "how text is read": ("data.workers", "data.prefetch", "data.cache_dir"),
    "how long it is": ("run.steps",),
    "what it writes, and when": (
        "run.log_every", "run.save_every", "run.keep", "run.keep_every", "run.keep_best", "run.sample_prompt",
        "run.sample_tokens", "run.tensorboard", "run.wandb", "run.report", "run.profile_steps", "run.inspect_every",
    ),
    "which checkpoint it goes on from": ("run.from_step",),
    "how it is evaluated": ("run.eval_every", "run.eval_batches", "data.val_path", "data.val_fraction"),
    "what it is probed with, and when": ("probe",),
    "how fast it learns": ("optim.lr", "optim.schedule", "optim.warmup_steps"),
    "what holds it back": ("optim.weight_decay", "optim.clip_norm", "optim.z_loss"),
    "what its matrices are rounded to": (
        "quantize.weights", "quantize.activations", "quantize.products", "quantize.keep",
    ),
    "what it reads": ("data.path", "data.format", "data.weights", "data.epochs", "data.text_key"),
    "how much it reads a step": ("data.seq_len", "data.batch_size", "data.packing", "optim.accumulate"),
    "when it goes back, or gives up": (
        "optim.max_skipped", "run.max_rollbacks", "run.spike_threshold", "run.spike_window", "run.spike_steps",
        "run.watchdog", "run.heartbeat",
    ),
}  # fmt: skip
"""Meaning -> dotted names, of whole sub-configs too. Blocks say the same of their fields by FREE."""

NUMBERS = ("optim.rule",)
"""Sub-configs whose numbers may change, but not their class: the optimizer's state is that of its rule."""


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names that differ, with both values, but for two ways to say the same of a block, and for who takes part:
    the address of a cluster is another one at each start."""
    free = may_change(new)
    same = tuple(f"model.blocks.{symbol}." for symbol in new.model.pattern if _same_block(symbol, old, new, free))
    found = differences(old, new).items()
    others = {name: values for name, values in found if not name.startswith("cluster")}
    return {name: values for name, values in others.items() if free(name) or not name.startswith(same)}


def refused(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names that differ and may not, with both values: a run of `old` cannot be resumed with `new`."""
    free = may_change(new)
    return {name: values for name, values in changes(old, new).items() if not free(name)}


def _same_block(symbol: str, old: Config, new: Config, free: Callable[[str], bool]) -> bool:
    """Whether a block computes the same: one may say n_heads=None, the other the number that it comes to."""
    width = new.model.d_model
    a, b = (config.model.blocks[symbol] if symbol in config.model.pattern else None for config in (old, new))
    if a is None or b is None:
        return False
    if type(a) is not type(b) or old.model.d_model != width:
        return False
    changed = differences(a.resolved(width), b.resolved(width))
    return all(free(f"model.blocks.{symbol}.{name}") for name in changed)


def may_change(config: Config) -> Callable[[str], bool]:
    """Whether a dotted name of the config may change."""
    free = {name for names in FREE.values() for name in names}
    blocks = {f"model.blocks.{symbol}": block for symbol, block in config.model.blocks.items()}
    inside = [pair for path, block in blocks.items() for pair in walk(block, path)]
    free |= {f"{path}.{field}" for path, block in inside for field in block.FREE}
    below = tuple(f"{name}." for name in (*free, *NUMBERS))
    return lambda name: name in free or name.startswith(below)
