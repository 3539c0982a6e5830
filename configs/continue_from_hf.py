# SPDX-License-Identifier: Apache-2.0
"""Training on from a published checkpoint: its model, its weights, its tokenizer.

Command: python train.py --config configs/continue_from_hf.py --init.hf=FOLDER --data.path='texts/*.jsonl'
Hardware: an accelerator with 16 bytes a parameter (float32 parameters and AdamW); --mesh.fsdp=8 shares them out.
Expected: the first step's loss is that of the published model on the text. `hybridlm convert to-hf RUN FOLDER` writes
the result as a checkpoint of the same family.
"""

from hybridlm.config import Config, DataConfig, InitConfig, LinearDecay, ModelConfig, OptimConfig, RunConfig


def config() -> Config:
    return Config(
        name="continue_from_hf",
        model=ModelConfig(remat="mixer"),
        init=InitConfig(hf=""),
        data=DataConfig(seq_len=4096, batch_size=16),
        optim=OptimConfig(lr=2e-5, schedule=LinearDecay(final_lr_ratio=0.0), warmup_steps=200, accumulate=8),
        run=RunConfig(steps=2000, eval_every=500, eval_batches=32, save_every=500, sample_tokens=256),
    )
