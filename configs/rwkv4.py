# SPDX-License-Identifier: Apache-2.0
"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048), the sizes trained on the Pile.

Command: python train.py --config rwkv4:169m --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 2.7 to 226 GB.
Expected: 169,342,464, 430,397,440, 1,515,106,304, 2,984,627,200, 7,392,649,216 and 14,148,597,760 parameters.
"""

from hybridlm.config import Config
from hybridlm.config.published import published

SIZES = {
    "169m": {"hidden_size": 768, "num_hidden_layers": 12},
    "430m": {"hidden_size": 1024, "num_hidden_layers": 24},
    "1.5b": {"hidden_size": 2048, "num_hidden_layers": 24},
    "3b": {"hidden_size": 2560, "num_hidden_layers": 32},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32},
    "14b": {"hidden_size": 5120, "num_hidden_layers": 40},
}


def config(size: str) -> Config:
    return published("rwkv4", size, {"model_type": "rwkv", "vocab_size": 50_277} | SIZES[size])
