# SPDX-License-Identifier: Apache-2.0
"""The least that a train step costs a device: what arithmetic and memory ask for, by class of work.

Model FLOPs over the peak of the matrix units, and bytes that must move at least once over the peak of the memory; both
from the data sheets (`pallas_kernels.platform.PEAKS`), which no program reaches.
"""

import math

import jax

from hybridlm.config import Config
from hybridlm.model.flops import train_flops
from hybridlm.model.init import abstract
from hybridlm.optim.optimizer import make_optimizer
from pallas_kernels.platform import peaks

WIDTH = {"bfloat16": 2, "float32": 4}
STREAM_PASSES = 5
"""Times that a sublayer must touch the residual stream: read and write it, and read it, read and write its gradient."""


def floors(config: Config, kind: str, n_devices: int = 1) -> dict[str, float]:
    """Seconds of a step on each of n_devices equal devices; {} for a kind that is not in the table.

    arithmetic: matrix products and the kernels of sequence ops together; element-wise: the residual stream, read and
    written; optimizer: gradients read, parameters and optimizer state read and written.
    """
    peak = peaks(kind)
    if peak is None:
        return {}
    tokens = config.data.batch_size * config.data.seq_len / n_devices
    shapes, info = abstract(config.model).shapes, abstract(config.model).info
    state = jax.eval_shape(make_optimizer(config.optim, config.run.steps, info)[0].init, shapes)
    params = _bytes(shapes)
    stream = STREAM_PASSES * len(config.model.pattern) * config.model.stream_width * WIDTH[config.model.compute_dtype]
    return {
        "arithmetic": train_flops(config.model, config.data.seq_len) * tokens / (peak.tflops * 1e12),
        "element-wise": stream * tokens / (peak.gbs * 1e9),
        "optimizer": (3 * params + 2 * _bytes(state)) / (peak.gbs * 1e9),
    }


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
