# SPDX-License-Identifier: Apache-2.0
"""Whether a mesh can split a config's model and batch."""

import math
from collections.abc import Sequence

from jax.sharding import Mesh

from hybridlm.config import Config
from hybridlm.errors import require
from hybridlm.model.init import check_model
from hybridlm.sharding import RULES


def check_config(config: Config, mesh: Mesh) -> None:
    """ConfigError for the first size of the model or of the batch that the mesh cannot split."""
    check_model(config.model, mesh)
    micro = config.optim.accumulate
    rows = "data.batch_size" if micro == 1 else "data.batch_size / optim.accumulate"
    _check_split(rows, config.data.batch_size // micro, RULES["batch"], mesh)
    _check_split("data.seq_len", config.data.seq_len, RULES["tokens"], mesh)


def _check_split(name: str, size: int, axes: Sequence[str], mesh: Mesh) -> None:
    """Axes that most runs do without, those of slices and of experts, are named where they split something."""
    shards = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    named = [axis for axis in axes if axis not in ("slice", "expert") or mesh.shape.get(axis, 1) > 1]
    require(size % shards == 0, f"{name} ({size}) not divisible by mesh.{' * mesh.'.join(named)} ({shards})")
