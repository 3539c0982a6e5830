# SPDX-License-Identifier: Apache-2.0
"""StripedHyena (Poli et al. 2023, "StripedHyena: Moving Beyond Transformers with Hybrid Signal Processing Models"):
Hyena with filters in modal form, and attention, in turn.

Command: python train.py --config stripedhyena:7b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 7b: 120 GB for parameters and AdamW, over all devices, before activations. tiny: two CPU cores.
Expected: 7b: 16 Hyena, 16 attention and 32 SwiGLU sublayers, 7.5 billion parameters.
"""

from hybridlm.config import (
    MLP,
    Attention,
    Config,
    DataConfig,
    Hyena,
    MeshConfig,
    ModalFilter,
    ModelConfig,
    OptimConfig,
    Rope,
    RunConfig,
)

SIZES = {"7b": (4096, 16, 32, 8, 14_336, 32_000, 4096, 1024), "tiny": (128, 2, 4, 2, 256, 320, 256, 16)}
"""Name -> width, pairs of Hyena and attention, heads, key/value heads, MLP, vocabulary, tokens of a row, rows."""


def config(size: str) -> Config:
    d_model, n_pairs, n_heads, n_kv_heads, d_ff, vocab_size, seq_len, batch_size = SIZES[size]
    large = size == "7b"
    return Config(
        name=f"stripedhyena_{size}",
        model=ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            pattern="H-*-" * n_pairs,
            blocks={
                "H": Hyena(ModalFilter(d_state=2)),
                "*": Attention(n_heads, n_kv_heads, d_model // n_heads, rope=Rope(10_000.0)),
                "-": MLP(d_ff),
            },
            tie_embeddings=False,
            remat="full" if large else "none",
        ),
        data=DataConfig(seq_len=seq_len, batch_size=batch_size),
        optim=OptimConfig(lr=3e-4 if large else 3e-3, warmup_steps=1000 if large else 20),
        mesh=MeshConfig(data=1, fsdp=-1) if large else MeshConfig(),
        run=RunConfig(steps=100_000, eval_every=2000, save_every=1000) if large else RunConfig(steps=300),
    )
