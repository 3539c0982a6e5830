# SPDX-License-Identifier: Apache-2.0
"""A pure Mamba-2: 48 blocks of width 2048, state 128, an untied vocabulary of 128,256 tokens.

Command: python train.py --config mamba2_1b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: one accelerator with 80 GB (4 rows of 4,096 tokens a step). For 65,536 tokens a step: --data.batch_size=16
--optim.accumulate=8 --model.remat=none (sums of gradients take 7 GB of it).
Expected: 1.77 B parameters, of which 0.53 B are embedding and output projection.
"""

from hybridlm.config import Config, DataConfig, Mamba2, ModelConfig, OptimConfig, RunConfig


def config() -> Config:
    return Config(
        name="mamba2_1b",
        model=ModelConfig(
            vocab_size=128_256,
            d_model=2048,
            pattern="M" * 48,
            blocks={"M": Mamba2(d_state=128, d_head=64)},
            tie_embeddings=False,
            remat="kernels",
        ),
        data=DataConfig(seq_len=4096, batch_size=4),
        optim=OptimConfig(lr=3e-4, warmup_steps=1000),
        run=RunConfig(steps=20_000, eval_every=1000, eval_batches=32, save_every=1000, sample_tokens=256),
    )
