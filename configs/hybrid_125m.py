# SPDX-License-Identifier: Apache-2.0
"""A 125M-class hybrid for ablations: 10 Mamba-2 and 2 gated attention mixers, each followed by a SwiGLU MLP.

Command: python train.py --config hybrid_125m --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: one accelerator with 48 GB or more (40 GB: --optim.accumulate=2, 24 GB: --optim.accumulate=4); --mesh.fsdp=8
or the default data parallelism on a host of eight.
Expected: 130 million parameters; 10,000 steps of 65,536 tokens are 0.66 billion tokens.
"""

from hybridlm.config import MLP, Attention, Config, DataConfig, Mamba2, MeshConfig, ModelConfig, OptimConfig, RunConfig
from hybridlm.config.pods import Pod

PODS = {
    "v5e:2x4": Pod(MeshConfig(data=1, fsdp=8), batch_size=32, remat="mixer"),
    "v5p:2x2x1": Pod(MeshConfig(data=1, fsdp=4), batch_size=32, accumulate=4, remat="mixer"),
}
"""Rows of 2,048 tokens: 65,536 tokens a step, as on one device."""


def config() -> Config:
    return Config(
        name="hybrid_125m",
        model=ModelConfig(
            vocab_size=50_304,
            d_model=768,
            pattern="M-M-M-M-M-*-" * 2,
            blocks={
                "M": Mamba2(d_state=128, d_head=64),
                "*": Attention(n_heads=12, n_kv_heads=4, d_head=64, qk_norm=True, gate="elementwise"),
                "-": MLP(d_ff=1792),
            },
            remat="none",
        ),
        data=DataConfig(seq_len=2048, batch_size=32),
        optim=OptimConfig(lr=6e-4, warmup_steps=500, accumulate=1),
        run=RunConfig(steps=10_000, eval_every=1000, save_every=1000, sample_tokens=256),
    )
