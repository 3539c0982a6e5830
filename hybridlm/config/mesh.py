# SPDX-License-Identifier: Apache-2.0
"""Whether a mesh can split a config's model and batch."""

import math

from jax.sharding import Mesh

from hybridlm.config import Config
from hybridlm.errors import require
from hybridlm.model.init import check_model
from hybridlm.sharding import RULES


def check_config(config: Config, mesh: Mesh) -> None:
    """ConfigError for the first size of the model or of the batch that the mesh cannot split."""
    check_model(config.model, mesh)
    rows = config.data.batch_size // config.optim.accumulate
    axes = [axis for axis in RULES["batch"] if axis != "expert" or mesh.shape.get(axis, 1) > 1]
    shards = math.prod(mesh.shape.get(axis, 1) for axis in axes)
    name = "data.batch_size" if config.optim.accumulate == 1 else "data.batch_size / optim.accumulate"
    require(rows % shards == 0, f"{name} ({rows}) not divisible by mesh.{' * mesh.'.join(axes)} ({shards})")
    tokens, shards = config.data.seq_len, mesh.shape.get("context", 1)
    require(tokens % shards == 0, f"data.seq_len ({tokens}) not divisible by mesh.context ({shards})")
