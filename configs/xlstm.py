# SPDX-License-Identifier: Apache-2.0
"""xLSTM 7B (Beck et al. 2025, arXiv:2503.13427): mLSTM and a gated MLP in each of 32 layers.

Command: python train.py --config xlstm:7b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 110 GB.
Expected: 6,865,424,896 parameters.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8, "qk_dim_factor": 0.5, "v_dim_factor": 1.0,
        "ffn_proj_factor": 2.667, "ffn_round_up_to_multiple_of": 64,
    },
}  # fmt: skip


def config(size: str) -> Config:
    return published("xlstm", size, {"model_type": "xlstm", "vocab_size": 50_304} | SIZES[size])
