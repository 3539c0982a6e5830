# SPDX-License-Identifier: Apache-2.0
"""Titans (Behrouz, Zhong and Mirrokni 2024, arXiv:2501.00663): a memory that learns while it reads, with attention.

Command: python train.py --config titans:mac --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: a packed row goes through the memory token by token: slow on every device. tiny-mac, tiny-mag and tiny-mal:
two CPU cores.
Expected: mac, memory as context; mag, memory as gate; mal, memory as layer; each with 16 persistent tokens.
"""

from hybridlm.config import (
    MLP,
    Attention,
    Branch,
    Config,
    DataConfig,
    MemoryAsContext,
    ModelConfig,
    OptimConfig,
    Parallel,
    RunConfig,
    Titans,
)

SIZES = {
    "mac": ("", "mac"), "mag": ("", "mag"), "mal": ("", "mal"),
    "tiny-mac": ("tiny-", "mac"), "tiny-mag": ("tiny-", "mag"), "tiny-mal": ("tiny-", "mal"),
}  # fmt: skip
WIDTHS = {"": (768, 12, 12, 2048, 512, 16, 50_304, 4096, 128), "tiny-": (64, 2, 2, 128, 32, 4, 320, 128, 8)}
"""Width, layers, heads, MLP, window, persistent tokens, vocabulary, tokens of a row, rows."""


def config(size: str) -> Config:
    prefix, kind = SIZES[size]
    d_model, n_layers, n_heads, d_ff, window, n_persistent, vocab_size, seq_len, batch_size = WIDTHS[prefix]
    memory, attention = Titans(n_heads), Attention(n_heads, d_head=d_model // n_heads, window=window)
    patterns = {"mac": "C-", "mag": "G-", "mal": "M*-"}
    blocks = {
        "mac": {"C": MemoryAsContext(memory, Attention(n_heads, d_head=d_model // n_heads, window=2 * window))},
        "mag": {
            "G": Parallel(
                {"attention": Branch(attention, norm=True), "memory": Branch(memory, norm=True)}, merge="gate"
            )
        },
        "mal": {"M": memory, "*": attention},
    }
    return Config(
        name=f"titans_{size}",
        model=ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            pattern=patterns[kind] * n_layers,
            blocks={**blocks[kind], "-": MLP(d_ff)},
            prefix_tokens=n_persistent,
        ),
        data=DataConfig(seq_len=seq_len, batch_size=batch_size),
        optim=OptimConfig(lr=4e-4 if not prefix else 3e-3, warmup_steps=20 if prefix else 1000),
        run=RunConfig(steps=300) if prefix else RunConfig(steps=30_000, eval_every=2000, save_every=1000),
    )
