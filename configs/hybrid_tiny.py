# SPDX-License-Identifier: Apache-2.0
"""Minutes on a laptop: a byte-level hybrid that learns to write Python from the standard library's source.

Command: make train, or python train.py --config hybrid_tiny
Hardware: two CPU cores, about two minutes.
"""

from hybridlm.config import MLP, Attention, Config, DataConfig, Mamba2, ModelConfig, Muon, OptimConfig, RunConfig, Wsd


def config() -> Config:
    return Config(
        name="hybrid_tiny",
        model=ModelConfig(
            vocab_size=320,
            d_model=128,
            pattern="M-M-M-*-",
            blocks={
                "M": Mamba2(d_state=32, d_head=32, expand=2),
                "*": Attention(n_heads=4, n_kv_heads=2, d_head=32, qk_norm=True, gate="elementwise"),
                "-": MLP(d_ff=256),
            },
            compute_dtype="float32",
        ),
        data=DataConfig(seq_len=256, batch_size=16),
        optim=OptimConfig(
            lr=3e-3, rule=Muon(lr=0.02, grouped=True), schedule=Wsd(final_lr_ratio=0.02), warmup_steps=20
        ),
        run=RunConfig(
            steps=300, log_every=10, eval_every=150, eval_batches=16, save_every=150,
            sample_prompt="def ", sample_tokens=300,
        ),
    )  # fmt: skip
