# SPDX-License-Identifier: Apache-2.0
"""HyenaDNA (Nguyen et al. 2023, arXiv:2306.15794): Hyena and MLP on single nucleotides, the published sizes.

Command: python train.py --config hyenadna:tiny-1k --data.path='genomes/*.fa.gz'
Hardware: tiny-1k: two CPU cores. large-1m: 8 H100 with --mesh.context=8, a row of a million tokens on all of them.
Expected: 0.4, 3.3, 6.5, 6.5 and 6.5 million parameters. docs/genomes.md says what differs from the published model.
"""

from hybridlm.config import MLP, Config, DataConfig, Hyena, ImplicitFilter, ModelConfig, OptimConfig, RunConfig

SIZES = {
    "tiny-1k": (128, 2, 1024, 256),
    "small-32k": (256, 4, 32_768, 8),
    "medium-160k": (256, 8, 160_000, 2),
    "medium-450k": (256, 8, 450_000, 1),
    "large-1m": (256, 8, 1_000_000, 1),
}
"""Name -> width, layers, tokens of a row, rows of a step."""


def config(size: str) -> Config:
    d_model, n_layers, seq_len, batch_size = SIZES[size]
    return Config(
        name=f"hyenadna_{size}",
        model=ModelConfig(
            vocab_size=16,
            d_model=d_model,
            pattern="H-" * n_layers,
            blocks={"H": Hyena(ImplicitFilter(max_len=seq_len)), "-": MLP(4 * d_model, "gelu_tanh", bias=True)},
            remat="none" if seq_len <= 32_768 else "full",
        ),
        data=DataConfig(
            path=("genomes/*.fa.gz",), tokenizer="dna", seq_len=seq_len, batch_size=batch_size, packing="split"
        ),
        optim=OptimConfig(lr=6e-4, warmup_steps=100),
        run=RunConfig(steps=10_000, eval_every=1000, eval_batches=32, save_every=1000),
    )
