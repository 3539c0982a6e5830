# SPDX-License-Identifier: Apache-2.0
"""From a model into a pattern with less attention: the same weights, brought back to the whole model's logits.

Command: hybridlm study layers --run RUN --task NAME --distill FOLDER
Hardware: what trained the model; here, two CPU cores and a model of 0.5 M parameters, minutes.
The model is that of RUN in the pattern that the study proposes; of this file, rows, optimizer and steps are taken.
"""

from hybridlm.config import Config, Cosine, DataConfig, OptimConfig, RunConfig


def config() -> Config:
    return Config(
        name="distill",
        data=DataConfig(seq_len=512, batch_size=16),
        optim=OptimConfig(lr=3e-4, schedule=Cosine(final_lr_ratio=0.05), warmup_steps=20, weight_decay=0.0),
        run=RunConfig(steps=300, log_every=10),
    )
