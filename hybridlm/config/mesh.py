# SPDX-License-Identifier: Apache-2.0
"""Whether a mesh can split a config's model and batch."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from hybridlm.config import Config
from hybridlm.errors import require
from hybridlm.model.generation import check_room
from hybridlm.model.init import abstract, check_model
from hybridlm.sharding import RULES
from pallas_kernels.platform import memory_of

STATE_BYTES = 8
"""Of a parameter, at least: its value, and one number of the optimizer."""
BATCH_BYTES = 16
"""Of a token of a batch: itself, its target, its document and its position."""


def check_config(config: Config, mesh: Mesh) -> None:
    """ConfigError for the first size of the model or of the batch that the mesh cannot split."""
    check_model(config.model, mesh)
    n = mesh.shape.get("expert", 1)
    split = {axis for symbol in config.model.pattern for _, _, axis in _sizes(config, symbol)}
    require(n == 1 or "experts" in split, f"mesh.expert ({n}): no block of model.pattern has experts to split over it")
    micro = config.optim.accumulate
    rows = "data.batch_size" if micro == 1 else "data.batch_size / optim.accumulate"
    _check_split(rows, config.data.batch_size // micro, RULES["batch"], mesh)
    _check_split("data.seq_len", config.data.seq_len, RULES["tokens"], mesh)
    _check_memory(config, mesh)


def _check_memory(config: Config, mesh: Mesh) -> None:
    """ConfigError where the devices cannot hold what has to be there before anything is computed, by far."""
    limit = memory_of(mesh.devices.flat)
    if limit is None:
        return
    data, run = config.data, config.run
    n_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config.model).shapes))
    parts = (
        (f"the model has {n_params} parameters: lower model.vocab_size, model.d_model or the sizes of its blocks",
         STATE_BYTES * n_params),
        (f"data.batch_size * data.seq_len ({data.batch_size} * {data.seq_len}) is too much for one step: lower them",
         BATCH_BYTES * data.batch_size * data.seq_len),
    )  # fmt: skip
    for what, n_bytes in parts:
        require(
            n_bytes <= limit,
            f"{what} ({n_bytes / 2**30:,.0f} GiB at least, where all devices have {limit / 2**30:,.0f})",
        )
    if run.sample_tokens:
        prompt = len(run.sample_prompt.encode("utf-8", "replace")) + 1
        check_room(abstract(config.model).model(), 1, prompt, run.sample_tokens, "run.sample_tokens")


def repeated(config: Config, mesh: Mesh) -> str | None:
    """What every device keeps whole because its number does not divide by `tensor`, in words; None for nothing."""
    n = mesh.shape.get("tensor", 1)
    leaves = jax.tree.leaves(abstract(config.model).info)
    pairs = (pair for leaf in leaves for pair in zip(leaf.axes, leaf.shape[leaf.stacked :], strict=True))
    whole = {(name, size) for name, size in pairs if name in WORDS and size % n}
    if not whole:
        return None
    shown = ", ".join(f"{size} {WORDS[name]}" for name, size in sorted(whole))
    return f"mesh.tensor ({n}) does not divide {shown}: every device keeps all of them and repeats what its heads need"


WORDS = {"kv_heads": "key/value heads", "groups": "state groups"}
"""Logical axes of parameters that need not divide by `tensor`, in words."""


def _sizes(config: Config, symbol: str) -> Sequence[tuple[str, int, str]]:
    return config.model.blocks[symbol].split(config.model.d_model)


def _check_split(name: str, size: int, axes: Sequence[str], mesh: Mesh) -> None:
    """Axes that most runs do without, those of slices and of experts, are named where they split something."""
    shards = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    named = [axis for axis in axes if axis not in ("slice", "expert") or mesh.shape.get(axis, 1) > 1]
    require(size % shards == 0, f"{name} ({size}) not divisible by mesh.{' * mesh.'.join(named)} ({shards})")
