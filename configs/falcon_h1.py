# SPDX-License-Identifier: Apache-2.0
"""Falcon-H1 (Zuo et al. 2025, "Falcon-H1"): Mamba-2 and attention side by side in each layer, then an MLP.

The published multipliers are constants over widths: `values` writes them so. The rule gives every published number of
0.5b, 1.5b-deep, 7b and 34b; for 1.5b and 3b it is the source.

Command: python train.py --config falcon_h1:0.5b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 16 bytes a parameter for AdamW in float32, over all devices, before activations: 8 to 538 GB.
Expected: 521,411,104, 1,554,863,488, 1,554,874,768, 3,149,392,384, 7,585,654,880 and 33,642,516,224 parameters.
"""

from hybridlm.config import Config
from hybridlm.config.published import published


def values(d: int, layers: int, ff: int, heads: int, ssm_heads: int, **other) -> dict:
    """Values of a size, the multipliers among them; `other` has those that are not the same for most sizes."""
    own = {
        "hidden_size": d, "num_hidden_layers": layers, "intermediate_size": ff, "num_attention_heads": heads,
        "num_key_value_heads": 2, "head_dim": 128, "mamba_n_heads": ssm_heads, "mamba_d_head": 128,
        "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_rms_norm": True,
    } | other  # fmt: skip
    d_attention, d_ssm = heads * own["head_dim"], ssm_heads * own["mamba_d_head"]
    return own | {
        "mamba_d_ssm": d_ssm,
        "embedding_multiplier": 32**0.5,
        "lm_head_multiplier": 40 / d,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 491_520 / (d * d_attention),
        "key_multiplier": 409_600 * (64 / own["head_dim"]) ** 0.5 / d**2,
        "ssm_in_multiplier": 1280 / d,
        "ssm_out_multiplier": 256 * 2**0.5 / d_ssm,
        "ssm_multipliers": [8**-0.5, 0.25, 32 * 2**0.5 / own["mamba_d_state"], 0.5, 8**-0.5],
        "mlp_multipliers": [640 * 2**0.5 / d, 1_228_800 / (d * ff)],
    }


SIZES = {
    "0.5b": values(
        1024, 36, 2048, 8, 24,
        vocab_size=32_784, head_dim=64, mamba_d_head=64, mamba_d_state=128, mamba_rms_norm=False,
    ),
    "1.5b": values(2048, 24, 4608, 8, 48, vocab_size=65_537, mamba_d_head=64),
    "1.5b-deep": values(1280, 66, 3072, 6, 24, vocab_size=65_537, mamba_d_head=64),
    "3b": values(2560, 32, 6144, 10, 32, vocab_size=65_537),
    "7b": values(3072, 44, 12_288, 12, 24, vocab_size=130_049),
    "34b": values(5120, 72, 21_504, 20, 32, vocab_size=261_120, num_key_value_heads=4, mamba_n_groups=2),
}  # fmt: skip
COMMON = {
    "model_type": "falcon_h1", "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "mamba_norm_before_gate": False, "rms_norm_eps": 1e-5, "rope_theta": 1e11, "tie_word_embeddings": False,
}  # fmt: skip


def config(size: str) -> Config:
    return published("falcon_h1", size, COMMON | SIZES[size])
