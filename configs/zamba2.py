# SPDX-License-Identifier: Apache-2.0
"""Zamba2 (Glorioso et al. 2024, "The Zamba2 Suite"): Mamba-2 with shared attention and MLP blocks behind adapters.

Command: python train.py --config zamba2:1.2b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 19, 43 and 118 GB.
Expected: 1,215,064,704, 2,662,214,560 and 7,356,749,648 parameters; 38, 54 and 81 Mamba-2 layers, of which 6, 9 and 13
are behind one (1.2b) or two shared blocks.
"""

from hybridlm.config import Config
from hybridlm.config.published import published


def layers(depth: int, hybrid: list[int]) -> list[str]:
    """Kinds of the layers: those behind a shared block, and the others."""
    return ["hybrid" if i in hybrid else "mamba" for i in range(depth)]


SIZES = {
    "1.2b": {
        "hidden_size": 2048, "num_hidden_layers": 38, "layers_block_type": layers(38, [5, 11, 17, 23, 29, 35]),
        "n_mamba_heads": 64, "mamba_ngroups": 1, "mamba_d_state": 128, "num_mem_blocks": 1, "use_mem_rope": True,
        "use_shared_attention_adapter": True,
    },
    "2.7b": {
        "hidden_size": 2560, "num_hidden_layers": 54,
        "layers_block_type": layers(54, [6, 12, 18, 24, 30, 36, 42, 47, 51]),
        "n_mamba_heads": 80, "mamba_ngroups": 1, "mamba_d_state": 64, "num_mem_blocks": 2, "use_mem_rope": False,
        "use_shared_attention_adapter": False,
    },
    "7b": {
        "hidden_size": 3584, "num_hidden_layers": 81,
        "layers_block_type": layers(81, [6, 11, *range(17, 78, 6)]),
        "n_mamba_heads": 112, "mamba_ngroups": 2, "mamba_d_state": 64, "num_mem_blocks": 2, "use_mem_rope": True,
        "use_shared_attention_adapter": False,
    },
}  # fmt: skip
COMMON = {
    "model_type": "zamba2", "vocab_size": 32_000, "num_attention_heads": 32, "adapter_rank": 128, "mamba_d_conv": 4,
    "mamba_expand": 2, "add_bias_linear": False, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}  # fmt: skip


def config(size: str) -> Config:
    return published("zamba2", size, COMMON | SIZES[size])
