# SPDX-License-Identifier: Apache-2.0
"""Whether two configs are the same model."""

import math
from dataclasses import fields, is_dataclass
from typing import Any

from hybridlm.hf.family import Family
from hybridlm.model.config import ModelConfig

FREE = frozenset({
    "compute_dtype", "remat", "unroll", "chunk", "init_std", "dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale",
    "A_init", "blocks", "pattern", "norm_before", "norm_after", "normed_residual",
    "balance_weight", "z_weight", "capacity",
})  # fmt: skip
"""Fields that a config.json need not say: how a model starts and runs, not what it computes."""


def difference_of(family: Family, ours: ModelConfig, published: ModelConfig) -> str | None:
    """The first field that differs, of the model or of a sublayer; None where there is none.

    published: with the family's symbols; ours may have others.
    """
    if len(ours.pattern) != len(published.pattern):
        return f"pattern has {len(ours.pattern)} sublayers where {len(published.pattern)} would be read"
    found = _differs(ours, published, "model")
    for depth, (a, b) in enumerate(zip(ours.pattern, published.pattern, strict=True)):
        blocks = ours.blocks[a].resolved(ours.d_model), published.blocks[b].resolved(published.d_model)
        found = found or _differs(*blocks, f"blocks.{a}")
        if found is None and ours.norms(a) != published.norms(b):
            found = f"norm_before, norm_after: where the norms of {a} stand"
        residual = ours.normed_residual.get(a), published.normed_residual.get(b)
        found = found or _differs(*residual, f"normed_residual.{a}")
        if found is None and b in family.shared and ours.pattern.index(a) != published.pattern.index(b):
            found = f"pattern: what sublayer {depth} shares weights with"
    return found


def _differs(a: Any, b: Any, name: str) -> str | None:
    if type(a) is not type(b):
        return f"{name} is {_short(a)} where {_short(b)} would be read"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{name} has {', '.join(a)} where {', '.join(b)} would be read"
        return next((d for key in a if (d := _differs(a[key], b[key], f"{name}.{key}"))), None)
    if not is_dataclass(a):
        return None if a == b or _close(a, b) else f"{name} is {a} where {b} would be read"
    names = [field.name for field in fields(a) if field.name not in FREE]
    return next((d for n in names if (d := _differs(getattr(a, n), getattr(b, n), f"{name}.{n}"))), None)


def _close(a: Any, b: Any) -> bool:
    numbers = isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool)
    return numbers and math.isclose(a, b, rel_tol=1e-12)


def _short(value: Any) -> str:
    return type(value).__name__ if is_dataclass(value) else str(value)
