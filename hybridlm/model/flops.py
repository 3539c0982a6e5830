# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs per token, counted from the config: two for each multiply-add of a matrix product, nothing else.

Training is three times the forward (each product has two of its size in the backward); what remat computes again is
not counted. Rows are counted as one document each: packing makes attention cheaper than this. The state space scan is
counted as its chunked algorithm (Dao & Gu 2024, section 6) at chunk 128, whatever chunk and implementation run:

| product, per token | FLOPs |
| --- | --- |
| C B^T within the chunk, causal half | G N (Q + 1) |
| (C B^T * decay) x within the chunk, causal half | H P (Q + 1) |
| state of the chunk, B^T x | 2 H P N |
| output of the incoming state, C S | 2 H P N |

The selective scan of Mamba-1 has no matrix products and counts nothing.
"""

from hybridlm.layers import Attention, Block, Mamba1, Mamba2, MoE, Shared
from hybridlm.layers.blocks import parts
from hybridlm.model.config import ModelConfig

SSD_CHUNK = 128
"""Chunk length Q at which the scan is counted."""


def mean_visible(seq_len: int, window: int | None) -> float:
    """Keys that a query sees, itself included, averaged over a row of seq_len tokens."""
    window = min(seq_len, seq_len if window is None else window)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def ssd_flops(n_heads: int, d_head: int, n_groups: int, d_state: int, seq_len: int) -> float:
    """Forward FLOPs per token of the chunked scan."""
    chunk = min(SSD_CHUNK, seq_len)
    within = (chunk + 1) * (n_groups * d_state + n_heads * d_head)
    return within + 4.0 * n_heads * d_head * d_state


def block_flops(block: Block, d_model: int, seq_len: int) -> float:
    """Forward FLOPs per token of one sublayer; of a block of blocks, their sum and what is between them."""
    total = sum(_simple_flops(part, d_model, seq_len) for _, part in parts(block))
    if isinstance(block, Shared):
        d_qkv = (block.attention.n_heads + 2 * block.attention.kv_heads) * block.attention.d_head
        d_mlp = (2 if block.mlp.gated else 1) * block.mlp.d_ff
        total += 2.0 * d_model * d_qkv + 2.0 * d_model * d_model  # the attention's input is twice as wide; the link
        total += 2.0 * (block.attention_adapter or 0) * (6 * d_model + d_qkv)
        total += 2.0 * (block.mlp_adapter or 0) * (d_model + d_mlp)
    return total


def _simple_flops(block, d_model: int, seq_len: int) -> float:
    if isinstance(block, Mamba1):
        d_inner, rank = block.inner(d_model), block.rank(d_model)
        low = rank + 2 * block.d_state  # of each head, from its own channels: as many products as from all at once
        return 2.0 * d_inner * (3 * d_model + block.d_conv + low + rank)
    if isinstance(block, Mamba2):
        n_heads = block.heads(d_model)
        d_inner, d_bc = n_heads * block.d_head, 2 * block.n_groups * block.d_state
        projections = 2.0 * d_model * (2 * d_inner + d_bc + n_heads) + 2.0 * d_inner * d_model
        conv = 2.0 * block.d_conv * (d_inner + d_bc)
        return projections + conv + ssd_flops(n_heads, block.d_head, block.n_groups, block.d_state, seq_len)
    if isinstance(block, Attention):
        d_queries, d_keys = block.n_heads * block.d_head, block.kv_heads * block.d_head
        gate = {"elementwise": d_queries, "head": block.n_heads, None: 0}[block.gate]
        projections = 2.0 * d_model * (2 * d_queries + 2 * d_keys + gate)
        return projections + 4.0 * d_queries * mean_visible(seq_len, block.window)
    n_matrices = 3 if block.gated else 2
    if isinstance(block, MoE):
        shared = 0.0 if block.shared is None else _simple_flops(block.shared, d_model, seq_len)
        projections = 2.0 * d_model * (block.n_experts + block.shared_gate + 2 * (block.d_latent or 0))
        width = block.router.top_k * (block.d_latent or d_model)
        return projections + shared + 2.0 * n_matrices * width * block.d_ff
    return 2.0 * n_matrices * d_model * block.d_ff


def forward_flops(model: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs per token of the whole model; the embedding is a lookup and counts nothing, the logits count."""
    blocks = sum(block_flops(model.blocks[symbol], model.d_model, seq_len) for symbol in model.pattern)
    return blocks + 2.0 * model.d_model * model.vocab_size


def train_flops(model: ModelConfig, seq_len: int) -> float:
    """FLOPs per token of forward and backward."""
    return 3.0 * forward_flops(model, seq_len)
