# SPDX-License-Identifier: Apache-2.0
"""Whether two configs are the same model, and in which fields they differ."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from hybridlm.errors import cut
from hybridlm.layers.block import shares
from hybridlm.model.config import ModelConfig

FREE = frozenset({
    "compute_dtype", "remat", "remat_span", "unroll", "chunk", "init_std", "dt_min", "dt_max", "dt_init_floor",
    "dt_init", "dt_scale", "A_init", "blocks", "pattern", "norm_before", "norm_after", "normed_residual",
    "balance_weight", "z_weight", "capacity",
})  # fmt: skip
"""Fields that a config.json need not say: how a model starts and runs, not what it computes."""
LONGEST = 40
"""Characters of a value in a message."""


def difference_of(ours: ModelConfig, published: ModelConfig) -> str | None:
    """The first field that differs, of the model or of a sublayer; None where there is none.

    published: with the family's symbols; ours may have others.
    """
    return next(differences(ours, published), None)


def differences(ours: ModelConfig, published: ModelConfig) -> Iterator[str]:
    """What differs, a field each; one of a block once for each depth where it does."""
    if len(ours.pattern) != len(published.pattern):
        yield f"pattern has {len(ours.pattern)} sublayers where {len(published.pattern)} would be read"
        return
    yield from _differs(ours, published, "model")
    for depth, (a, b) in enumerate(zip(ours.pattern, published.pattern, strict=True)):
        blocks = ours.blocks[a].resolved(ours.d_model), published.blocks[b].resolved(published.d_model)
        yield from _differs(*blocks, f"blocks.{a}")
        if ours.norms(a) != published.norms(b):
            yield f"norm_before, norm_after: where the norms of {a} stand"
        residual = ours.normed_residual.get(a), published.normed_residual.get(b)
        yield from _differs(*residual, f"normed_residual.{a}")
        if shares(published.blocks[b]) and ours.pattern.index(a) != published.pattern.index(b):
            yield f"pattern: what sublayer {depth} shares weights with"


def _differs(a: Any, b: Any, name: str) -> Iterator[str]:
    if type(a) is not type(b) and not _close(a, b):
        yield f"{name} is {_short(a)} where {_short(b)} would be read"
    elif isinstance(a, dict):
        if list(a) != list(b):
            yield f"{name} has {', '.join(a)} where {', '.join(b)} would be read"
            return
        for key in a:
            yield from _differs(a[key], b[key], f"{name}.{key}")
    elif not is_dataclass(a):
        if a != b and not _close(a, b):
            yield f"{name} is {_short(a)} where {_short(b)} would be read"
    else:
        for field in fields(a):
            if field.name not in FREE:
                yield from _differs(getattr(a, field.name), getattr(b, field.name), f"{name}.{field.name}")


def _close(a: Any, b: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (a, b))
    return numbers and math.isclose(a, b, rel_tol=1e-12)


def _short(value: Any) -> str:
    return cut(type(value).__name__ if is_dataclass(value) else str(value), LONGEST)
