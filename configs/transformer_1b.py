# SPDX-License-Identifier: Apache-2.0
"""The attention-only baseline of hybrid_1b: same width, data and steps, 24 attention and 24 SwiGLU sublayers.

Command: python train.py --config transformer_1b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: one accelerator with 80 GB; see hybrid_1b for a pod.
Expected: 1.3 B parameters.
"""

import dataclasses

from hybridlm.config import MLP, Attention, Config
from hybridlm.config.find import read_config


def config() -> Config:
    hybrid = read_config("hybrid_1b")
    return dataclasses.replace(
        hybrid,
        name="transformer_1b",
        model=dataclasses.replace(
            hybrid.model,
            pattern="*-" * 24,
            remat="kernels,sublayer_norm,mlp_hidden,attention_rotated",
            blocks={"*": Attention(n_heads=32, n_kv_heads=8, d_head=64, qk_norm=True), "-": MLP(d_ff=6400)},
        ),
    )
