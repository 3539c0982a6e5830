# SPDX-License-Identifier: Apache-2.0
"""The least that has to move to write a token: the weights once for all rows, what is kept of earlier tokens read, what
does not grow (states, windows of convolutions) read and written. Counted from shapes; nothing is made.

Activations and logits are left out: they can stay on the chip. So the time that these bytes take at the rate at which
the device copies memory is a bound, which no program can go below while weights and caches do not fit on the chip.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from hybridlm.infer.cache_size import STATES, WINDOWS, CacheSize, Part, cache_size, mixes
from hybridlm.layers.block import walk
from hybridlm.layers.cache import AS_COMPUTED, CacheTypes
from hybridlm.layers.params import ParamInfo, param_info
from hybridlm.model import pattern
from hybridlm.model.config import ModelConfig, QuantizeConfig
from hybridlm.model.decoding import NOT_ROUNDED, shapes_at_work

TRANSFORMER, HYBRID, RECURRENT = "transformer", "hybrid", "recurrent"


class Moved(NamedTuple):
    """Bytes of one step, that of a token of every row."""

    weights: int
    """Read once, whatever the number of rows; shared ones at each depth that uses them."""
    states: int
    """Of states and windows of convolutions: read and written."""
    kept: int
    """Read of what is kept of earlier tokens: keys and values, latents, in windows or not."""
    added: int
    """Written of the new tokens."""

    @property
    def all(self) -> int:
        """Their sum."""
        return sum(self)


def moved(
    model: ModelConfig, batch: int, context: int, types: CacheTypes = AS_COMPUTED,
    rounding: QuantizeConfig = NOT_ROUNDED,
) -> Moved:  # fmt: skip
    """Of a step of `batch` rows whose tokens are the `context`-th. Arguments and errors as of `cache_size`; rounding:
    of matrices in eight bits."""
    size = cache_size(model, batch, context, types=types)
    fixed = sum(part.row_bytes for part in size.parts if part.kind in (STATES, WINDOWS))
    kept = [part for part in size.parts if part.kind not in (STATES, WINDOWS) and part.symbol]
    added = sum(part.per_token or part.row_bytes // _slots(part) for part in kept)
    read = batch * sum(part.row_bytes for part in kept)
    return Moved(weights_read(model, batch, rounding), 2 * batch * fixed, read, batch * added)


def _slots(part: Part) -> int:
    """Tokens that a ring has room for: the second axis, of scales the last."""
    return part.shape[-1 if part.name.endswith("scales") else 1]


def weights_held(model: ModelConfig, rounding: QuantizeConfig = NOT_ROUNDED) -> int:
    """Bytes of the parameters as they lie in memory while a model writes."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(shapes_at_work(model, rounding)))


def weights_read(model: ModelConfig, batch: int, rounding: QuantizeConfig = NOT_ROUNDED) -> int:
    """Bytes of them that a step reads: of an embedding that is no output a row for each token, of experts those that
    tokens which choose evenly are expected to choose."""
    state = shapes_at_work(model, rounding)
    shapes = nnx.to_pure_dict(state)
    info = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(param_info(state)))
    total = 0.0
    for name, tree in shapes.items():
        infos = info[name]
        if name == "prefix":
            continue
        if name == "embedding" and shapes.get("output") is not None:
            total += min(batch, tree.shape[0]) * _bytes(tree) / tree.shape[0]
        elif name == "groups":
            for number, spot in enumerate(pattern.spots(model.pattern, model.unroll or 1)):
                total += _of_block(model, spot.symbol, tree[number], infos[number], batch)
        elif name == "shared":
            total += sum(
                model.pattern.count(symbol) * _of_block(model, symbol, tree[symbol], infos[symbol], batch)
                for symbol in tree
            )
        else:
            total += sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))
    return round(total)


def _of_block(model: ModelConfig, symbol: str, shapes: Any, infos: Any, batch: int) -> float:
    """Of the parameters of a symbol."""
    chosen = _chosen(model, symbol)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(infos), strict=True)
    return sum(_bytes(leaf) * _share(leaf, info, chosen, batch) for leaf, info in pairs)


def _chosen(model: ModelConfig, symbol: str) -> Mapping[int, int]:
    """Number of experts -> how many of them a token chooses, of the blocks of a symbol."""
    found = [inside for _, inside in walk(model.blocks[symbol]) if hasattr(inside, "n_experts")]
    return {block.n_experts: block.router.top_k for block in found if hasattr(block, "router")}


def _share(leaf: jax.ShapeDtypeStruct, info: ParamInfo, chosen: Mapping[int, int], batch: int) -> float:
    """Of an array's bytes that a step reads: all, but of experts those that are expected to be chosen by anyone."""
    if "experts" not in info.axes or info.kind not in ("matrix", "quantized") or info.exact:
        return 1.0
    n = leaf.shape[info.axes.index("experts") + info.stacked]
    return 1 - (1 - chosen[n] / n) ** batch if n in chosen else 1.0


def kind_of(model: ModelConfig) -> str:
    """TRANSFORMER where all mixers keep all tokens, RECURRENT where none does, HYBRID between them."""
    size: CacheSize = cache_size(model, 1, 1)
    grows = {part.symbol for part in size.parts if part.per_token}
    mixers = [symbol for symbol in model.pattern if mixes(model.blocks[symbol], model.d_model)]
    keep = [symbol in grows for symbol in mixers]
    return RECURRENT if not any(keep) else TRANSFORMER if all(keep) else HYBRID


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
