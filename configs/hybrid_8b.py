# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H-8B's published layer order and widths (Blakeman et al. 2025, "Nemotron-H", table 1).

Command: python train.py --config hybrid_8b:v5p:8x8x16 --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a pod, one of PODS; 8.1 B float32 parameters with AdamW take 130 GB over all devices before activations.
Expected: 24 Mamba-2, 24 squared-ReLU MLP and 4 attention sublayers; 8,100,852,736 parameters.
"""

from hybridlm.config import (
    MLP,
    Attention,
    Config,
    DataConfig,
    Mamba2,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    Wsd,
)  # fmt: skip
from hybridlm.config.pods import Pod

PODS = {
    "v5p:8x8x16": Pod(MeshConfig(data=1, fsdp=128, tensor=8), batch_size=768),
    "v5p:4x4x8": Pod(MeshConfig(data=1, fsdp=128), batch_size=768, accumulate=3),
    "2xv5p:4x4x8": Pod(MeshConfig(data=1, fsdp=128, slice=2), batch_size=768, accumulate=3),
    "v6e:16x16": Pod(MeshConfig(data=1, fsdp=256), batch_size=768, accumulate=3),
    "tpu7x:4x4x8": Pod(MeshConfig(data=1, fsdp=256), batch_size=768),
}
"""Rows of 8,192 tokens: 6.3 million tokens a step on all of them."""


def config() -> Config:
    return Config(
        name="hybrid_8b",
        model=ModelConfig(
            vocab_size=131_072,
            d_model=4096,
            pattern="M-M-M-M*-" + "M-M-M-M-M*-" * 3 + "M-M-M-M-M-",
            blocks={
                "M": Mamba2(n_heads=128, d_head=64, d_state=128, n_groups=8),
                "*": Attention(n_heads=32, n_kv_heads=8, d_head=128, rope=None),
                "-": MLP(d_ff=21_504, activation="relu2"),
            },
            tie_embeddings=False,
            remat="full",
        ),
        data=DataConfig(seq_len=8192, batch_size=768),
        optim=OptimConfig(lr=8e-4, schedule=Wsd(final_lr_ratio=0.01), warmup_steps=1000),
        run=RunConfig(steps=100_000, eval_every=2000, eval_batches=32, save_every=1000, sample_tokens=256),
    )
