# SPDX-License-Identifier: Apache-2.0
"""Hymba (Dong et al. 2024, arXiv:2411.13676): attention and Mamba side by side in every layer, behind 128 meta tokens.

Command: python train.py --config hymba:1.5b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 1.5b: 25 GB for parameters and AdamW, over all devices, before activations. tiny: two CPU cores.
Expected: attention over all tokens in the first, the middle and the last layer, over 1,024 in the others.
docs/compositions.md says what differs from the published model.
"""

from hybridlm.config import (
    MLP,
    Attention,
    Branch,
    Config,
    DataConfig,
    Mamba1,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Parallel,
    RunConfig,
)

SIZES = {
    "1.5b": (1600, 32, 25, 5, 64, 5504, 1024, 128, 32_001, 2048, 1024),
    "tiny": (96, 5, 3, 1, 32, 192, 64, 8, 320, 256, 16),
}
"""Name -> width, layers, heads, key/value heads, head width, MLP, window, meta tokens, vocabulary, tokens of a row,
rows."""


def config(size: str) -> Config:
    d_model, n_layers, *heads, d_ff, window, n_meta, vocab_size, seq_len, batch_size = SIZES[size]
    large = size != "tiny"

    def side_by_side(window: int | None) -> Parallel:
        attention = Attention(*heads, window=window)
        return Parallel({"attention": Branch(attention, norm=True), "mamba": Branch(Mamba1(), norm=True)})

    layers = ["L"] * n_layers
    for i in (0, (n_layers - 1) // 2, n_layers - 1):
        layers[i] = "G"
    return Config(
        name=f"hymba_{size}",
        model=ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            pattern="".join(f"{layer}-" for layer in layers),
            blocks={"G": side_by_side(None), "L": side_by_side(window), "-": MLP(d_ff)},
            prefix_tokens=n_meta,
            remat="full" if large else "none",
        ),
        data=DataConfig(seq_len=seq_len, batch_size=batch_size),
        optim=OptimConfig(lr=3e-3, warmup_steps=1000 if large else 20),
        mesh=MeshConfig(data=1, fsdp=-1) if large else MeshConfig(),
        run=RunConfig(steps=100_000, eval_every=2000, save_every=1000) if large else RunConfig(steps=300),
    )
