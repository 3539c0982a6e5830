# SPDX-License-Identifier: Apache-2.0
"""Caduceus (Schiff et al. 2024, arXiv:2403.03234): bidirectional Mamba for DNA, trained on masked nucleotides.

Command: python train.py --config caduceus:ps-1k --data.path='genomes/*.fa.gz'
Hardware: ps-1k and ph-1k: two CPU cores. The others: one GPU of 80 GB a row.
Expected: ps (parameter sharing): a row's reverse complement gets the reverse complement of its logits, whatever the
parameters; ph (post hoc): one strand, and documents of either strand while it learns.
"""

from hybridlm.config import (
    Bidirectional,
    Config,
    DataConfig,
    Mamba1,
    Masked,
    ModelConfig,
    OptimConfig,
    RunConfig,
)  # fmt: skip

SIZES = {
    "ps-1k": (118, 4, 1024, 128),
    "ph-1k": (118, 4, 1024, 128),
    "ps-131k": (256, 16, 131_072, 8),
    "ph-131k": (256, 16, 131_072, 8),
}
"""Name -> width, layers, tokens of a row, rows of a step."""
COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)
"""Of the tokens of data.tokenizer=dna: A pairs with T, C with G."""


def config(size: str) -> Config:
    (d_model, n_layers, seq_len, batch_size), shared = SIZES[size], size.startswith("ps")
    return Config(
        name=f"caduceus_{size}",
        model=ModelConfig(
            vocab_size=16,
            d_model=d_model,
            pattern="B" * n_layers,
            blocks={"B": Bidirectional(Mamba1())},
            complement=COMPLEMENT if shared else (),
            remat="none" if seq_len <= 1024 else "full",
        ),
        data=DataConfig(
            path=("genomes/*.fa.gz",), tokenizer="dna", reverse_complement=not shared, seq_len=seq_len,
            batch_size=batch_size,
        ),
        optim=OptimConfig(lr=8e-3, objective=Masked(), warmup_steps=500),
        run=RunConfig(steps=10_000, eval_every=1000, eval_batches=32, save_every=1000),
    )  # fmt: skip
