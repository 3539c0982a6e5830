# SPDX-License-Identifier: Apache-2.0
"""The reference hybrid: 7 Mamba-2 mixers to 1 gated attention, each followed by a SwiGLU MLP, 1.3 B parameters.

Command: python train.py --config hybrid_1b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: as it stands one accelerator with 80 GB (16 rows of 4,096 tokens a step, in 4 microbatches of 4). On a pod:
--config hybrid_1b:v5e:16x16, or another of PODS.
Expected: 21 Mamba-2, 3 attention and 24 MLP sublayers.
"""

from hybridlm.config import MLP, Attention, Config, DataConfig, Mamba2, MeshConfig, ModelConfig, OptimConfig, RunConfig
from hybridlm.config.pods import Pod

PODS = {
    "v5e:16x16": Pod(MeshConfig(data=1, fsdp=256), batch_size=256, remat="kernels"),
    "2xv5e:16x16": Pod(MeshConfig(data=1, fsdp=256, slice=2), batch_size=512, remat="kernels"),
    "v5p:4x4x4": Pod(MeshConfig(data=1, fsdp=64), batch_size=256, remat="kernels"),
    "v6e:16x16": Pod(MeshConfig(data=1, fsdp=256), batch_size=256, remat="kernels"),
    "2xv6e:16x16": Pod(MeshConfig(data=1, fsdp=256, slice=2), batch_size=512, remat="kernels"),
    "tpu7x:4x4x4": Pod(MeshConfig(data=1, fsdp=128), batch_size=256, remat="kernels"),
}
"""Rows of 4,096 tokens: a million tokens a step, two million on two slices."""


def config() -> Config:
    return Config(
        name="hybrid_1b",
        model=ModelConfig(
            vocab_size=50_304,
            d_model=2048,
            pattern="M-M-M-M-M-M-M-*-" * 3,
            blocks={
                "M": Mamba2(d_state=128, d_head=64),
                "*": Attention(n_heads=32, n_kv_heads=8, d_head=64, qk_norm=True, gate="elementwise"),
                "-": MLP(d_ff=4096),
            },
            remat="kernels,sublayer_norm,sublayer_gathered,mlp_hidden,mamba_conv,mamba_norm",
        ),
        data=DataConfig(seq_len=4096, batch_size=16),
        optim=OptimConfig(lr=3e-4, warmup_steps=1000, accumulate=4),
        run=RunConfig(steps=20_000, eval_every=1000, eval_batches=32, save_every=1000, sample_tokens=256),
    )
