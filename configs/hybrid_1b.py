# SPDX-License-Identifier: Apache-2.0
"""The reference hybrid: 7 Mamba-2 mixers to 1 gated attention, each followed by a SwiGLU MLP, 1.3 B parameters.

Command: python train.py --config hybrid_1b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: as it stands one accelerator with 80 GB (16 rows of 4,096 tokens a step, in 8 microbatches of 2). On a pod:
--mesh.fsdp=64 --data.batch_size=512 --optim.accumulate=1.
Expected: 21 Mamba-2, 3 attention and 24 MLP sublayers.
"""

from hybridlm.config import MLP, Attention, Config, DataConfig, Mamba2, ModelConfig, OptimConfig, RunConfig


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
            remat="kernels",
        ),
        data=DataConfig(seq_len=4096, batch_size=16),
        optim=OptimConfig(lr=3e-4, warmup_steps=1000, accumulate=8),
        run=RunConfig(steps=20_000, eval_every=1000, eval_batches=32, save_every=1000, sample_tokens=256),
    )
