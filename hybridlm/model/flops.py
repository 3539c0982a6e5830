# SPDX-License-Identifier: Apache-2.0
"""Model FLOPs per token, counted from the config: two for each multiply-add of a matrix product, nothing else.

Training is three times the forward (each product has two of its size in the backward); what remat computes again is
not counted. Rows are counted as one document each: packing makes attention cheaper than this.
"""

from hybridlm.layers.block import of_streams
from hybridlm.model.config import ModelConfig


def forward_flops(model: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs per token of the whole model; the embedding is a lookup and counts nothing, the logits count.
    Prefix tokens count as the tokens of a row that they are."""
    blocks = sum(model.blocks[symbol].flops(model.width(symbol), seq_len) for symbol in model.pattern)
    if (streams := model.streams) is not None:
        readers = sum(not of_streams(model.blocks[symbol]) for symbol in model.pattern)
        blocks += readers * streams.flops(model.d_model) + streams.flops(model.d_model, adds=False)
    return (2 if model.complement else 1) * (blocks + 2.0 * model.d_model * model.vocab_size)


def train_flops(model: ModelConfig, seq_len: int) -> float:
    """FLOPs per token of forward and backward."""
    return 3.0 * forward_flops(model, seq_len)
