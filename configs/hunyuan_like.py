# SPDX-License-Identifier: Apache-2.0
"""Like Hunyuan-TurboS (Tencent Hunyuan Team 2025, arXiv:2505.15431): Mamba-2 and a little attention, each with an MoE.

Command: python train.py --config hunyuan_like:560b --data.path='texts/*.jsonl' --data.tokenizer=tokenizer.json
Hardware: 560b: 9 TB for parameters and AdamW, over all devices, before activations. tiny: two CPU cores.
Expected: 560b: 57 Mamba-2, 7 attention and 64 MoE sublayers of 32 experts and one that is shared. The weights are not
published: what the report leaves open, as where the attention stands, is chosen here.
"""

from hybridlm.config import (
    MLP,
    Attention,
    Config,
    DataConfig,
    Mamba2,
    MeshConfig,
    ModelConfig,
    MoE,
    OptimConfig,
    Router,
    RunConfig,
)

SIZES = {
    "560b": (5120, 64, 9, 64, 8, 128, 128, 32, 17_920, 128_512, 4096, 1024),
    "tiny": (96, 4, 4, 4, 2, 32, 16, 4, 64, 320, 256, 16),
}
"""Name -> width, layers, one of how many is attention, heads, key/value heads, head width, Mamba-2's state, experts,
width of one, vocabulary, tokens of a row, rows."""


def config(size: str) -> Config:
    d_model, n_layers, every, *heads, d_state, n_experts, d_ff, vocab_size, seq_len, batch_size = SIZES[size]
    large = size != "tiny"
    layers = ["*" if i % every == every // 2 else "M" for i in range(n_layers)]
    return Config(
        name=f"hunyuan_like_{size}",
        model=ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            pattern="".join(f"{layer}E" for layer in layers),
            blocks={
                "M": Mamba2(d_state=d_state, d_head=heads[2], n_groups=heads[1] if large else 1),
                "*": Attention(*heads),
                "E": MoE(n_experts=n_experts, d_ff=d_ff, router=Router(2), shared=MLP(d_ff)),
            },
            remat="full" if large else "none",
        ),
        data=DataConfig(seq_len=seq_len, batch_size=batch_size),
        optim=OptimConfig(lr=3e-4 if large else 3e-3, warmup_steps=1000 if large else 20),
        mesh=MeshConfig(data=1, fsdp=-1, expert=8) if large else MeshConfig(),
        run=RunConfig(steps=100_000, eval_every=2000, save_every=1000) if large else RunConfig(steps=300),
    )
