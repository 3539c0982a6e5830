# SPDX-License-Identifier: Apache-2.0
"""Every config of our own builds abstractly, with the parameter count that its widths give by hand."""

import jax
import pytest
from flax import nnx

import hybridlm
from hybridlm.config import MLP, Attention, Mamba2, ModelConfig
from hybridlm.config.find import config_names

PUBLISHED = {
    "hybrid_8b": 8_100_852_736,  # Nemotron-H-8B-Base: 8.1 B
    "mamba2_1b": 1_766_104_064,  # 48 blocks of width 2048, untied 128,256 tokens: 1.77 B
    "hybrid_1b": 1_293_935_168,
    "transformer_1b": 1_298_502_656,
}


def count_by_hand(model: ModelConfig) -> int:
    """From the shapes of the papers: matrices, then biases, norms and per-head numbers."""
    d = model.d_model
    total = model.vocab_size * d * (1 if model.tie_embeddings else 2) + d
    for symbol in model.pattern:
        block = model.blocks[symbol]
        total += d  # the pre-norm
        if isinstance(block, Mamba2):
            heads = block.n_heads or int(block.expand * d) // block.d_head
            inner, shared = heads * block.d_head, 2 * block.n_groups * block.d_state
            total += d * (2 * inner + shared + heads) + inner * d  # in (z, x, B, C, dt) and out
            total += (inner + shared) * (block.d_conv + block.conv_bias)
            total += 3 * heads + (inner if block.gated_norm else 0)  # A_log, dt_bias, D; gated norm
        elif isinstance(block, Attention):
            q, kv = block.n_heads * block.d_head, block.kv_heads * block.d_head
            gate = {None: 0, "head": block.n_heads, "elementwise": q}[block.gate]
            total += d * (q + 2 * kv + gate) + q * d + (2 * block.d_head if block.qk_norm else 0)
        elif isinstance(block, MLP):
            total += (3 if block.activation in ("swiglu", "geglu") else 2) * d * block.d_ff
    return total


@pytest.mark.parametrize("name", [name for name in config_names() if ":" not in name])
def test_parameter_count(name):
    config = hybridlm.load_config(name)
    model = nnx.eval_shape(lambda: hybridlm.HybridLM(config.model, rngs=nnx.Rngs(0)))
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    count = sum(p.size for p in parameters)
    assert count == count_by_hand(config.model)
    assert count == PUBLISHED.get(name, count)
    assert {p.dtype.name for p in parameters} == {"float32"}


def test_hybrid_1b_is_seven_to_one():
    model = hybridlm.load_config("hybrid_1b").model
    mixers = [s for s in model.pattern if s != "-"]
    assert mixers.count("M") == 7 * mixers.count("*")
    assert all(a != "-" and b == "-" for a, b in zip(model.pattern[::2], model.pattern[1::2]))


def test_hybrid_8b_has_the_published_order():
    pattern = hybridlm.load_config("hybrid_8b").model.pattern
    assert len(pattern) == 52
    assert [i for i, s in enumerate(pattern) if s == "*"] == [7, 18, 29, 40]
    assert pattern.count("M") == 24 and pattern.count("-") == 24
