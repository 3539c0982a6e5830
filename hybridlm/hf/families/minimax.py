# SPDX-License-Identifier: Apache-2.0
"""MiniMax-01: lightning attention or attention, then a mixture of experts; each normed input goes on as the stream."""

from dataclasses import replace

import numpy as np

from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Constant, Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import Attention, FixedDecay, HeadNorm, LinearAttention, MoE, Router
from hybridlm.model.config import ModelConfig

SYMBOLS = {"linear_attention": "L", "full_attention": "*"}
FACTORS = {"L": "linear_attn", "*": "full_attn", "E": "mlp"}
"""Symbol -> how the keys of its multipliers start."""
BLOCK = 256
"""Tokens a chunk of lightning attention, where the config does not say."""


def read(keys: Keys) -> ModelConfig:
    keys.carry("output_router_logits", "shared_moe_mode")
    keys.only("router_jitter_noise", 0.0, 0)
    keys.only("postnorm", True, None)
    keys.only("shared_intermediate_size", 0, None)
    n_layers, heads = keys("num_hidden_layers", 32), common.heads(keys, 32, 8)
    types = common.layer_types(keys, "layer_types", n_layers=n_layers)
    types = types or ["linear_attention" if i % 2 else "full_attention" for i in range(n_layers)]
    activation, d_head = keys.choose("hidden_act", common.PLAIN, "silu"), heads["d_head"]
    lightning = LinearAttention(
        heads["n_heads"], d_head, d_head, FixedDecay("lightning"), feature_map=activation, value_activation=activation,
        scale=1.0, norm=HeadNorm(per_head=False, weight="channel", eps=1e-6), gate="sigmoid",
        chunk=keys("block_size", BLOCK),
    )  # fmt: skip
    experts = MoE(
        keys("num_local_experts", 8), keys("intermediate_size", 14336), keys.choose("hidden_act", common.GATED, "silu"),
        Router(keys("num_experts_per_tok", 2), renormalise=True),
        balance_weight=keys.some("router_aux_loss_coef", 0.001), z_weight=0.0,
    )  # fmt: skip
    rotary = replace(rope.read(keys, 131072, 1_000_000.0), fraction=keys.some("rotary_dim", d_head) / d_head)
    attention = Attention(**heads, rope=rotary, window=keys("sliding_window", None))
    pattern = "".join(f"{symbol}E" for symbol in common.as_pattern(keys, types, SYMBOLS))
    factors = {
        symbol: tuple(float(keys(f"{name}_{which}_factor", 1)) for which in ("alpha", "beta"))
        for symbol, name in FACTORS.items()
    }
    blocks = {"L": lightning, "*": attention, "E": experts}
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-5, 32000, False), pattern=pattern,
        blocks={symbol: block for symbol, block in blocks.items() if symbol in pattern},
        normed_residual={symbol: both for symbol, both in factors.items() if symbol in pattern},
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    moe, types = common.block(config, MoE), common.kinds(config)[::2]
    lightning = common.block(config, LinearAttention, False)
    attention = common.block(config, Attention, False if lightning else None)
    H, P = (lightning.n_heads, lightning.d_key) if lightning else (attention.n_heads, attention.d_head)
    attention = attention or Attention(H, d_head=P)
    values = {}
    for kind, symbol in {LinearAttention: "L", Attention: "*", MoE: "E"}.items():
        own = next((s for s in config.pattern if isinstance(config.blocks[s], kind)), None)
        alpha, beta = config.normed_residual.get(own, (1.0, 1.0))
        values |= {f"{FACTORS[symbol]}_alpha_factor": alpha, f"{FACTORS[symbol]}_beta_factor": beta}
    return {
        **values,
        **common.write_widths(config, "rms_norm_eps"),
        **common.write_heads(attention),
        **write_rope(attention), "sliding_window": attention.window,
        "block_size": (lightning and lightning.chunk) or BLOCK,
        "hidden_act": common.name_of(common.GATED, moe.activation), "intermediate_size": moe.d_ff,
        "num_local_experts": moe.n_experts, "num_experts_per_tok": moe.router.top_k,
        "router_aux_loss_coef": moe.balance_weight, "num_hidden_layers": len(types), "layer_types": types,
    }  # fmt: skip


def write_rope(attention: Attention) -> dict:
    """Of heads that are rotated in part, the rotated width: MiniMax's own code reads it, transformers 5.24 does not."""
    rotary = rope.required(attention)
    values = {"rope_parameters": rope.write(replace(rotary, fraction=1.0))}
    return values if rotary.fraction == 1 else values | {"rotary_dim": rotary.d_rotated(attention.d_head)}


def constants(config: ModelConfig) -> dict[str, Constant]:
    """The decays within a block that files keep, of each lightning layer: of a query, of a key, of a pair."""
    found, n_layers = {}, len(config.pattern) // 2
    for layer, symbol in enumerate(config.pattern[::2]):
        if symbol == "L":
            block = config.blocks[symbol]
            made = decays(block.n_heads, block.chunk or BLOCK, layer, n_layers)
            found |= {f"model.layers.{layer}.self_attn.{name}": constant for name, constant in made.items()}
    return found


def decays(n_heads: int, block: int, layer: int, n_layers: int) -> dict[str, Constant]:
    """By name; shapes [H, Q, 1] and [1, H, Q, Q]."""
    factor = 1 - layer / (n_layers - 1 + 1e-5) + 1e-5
    rates = (2.0 ** (-8.0 * np.arange(1, n_heads + 1) / n_heads) * factor)[:, None, None]
    place = np.arange(1.0, block + 1)[:, None]
    behind = place - place.T
    of_one = (n_heads, block, 1)
    return {
        "query_decay": Constant(of_one, lambda: np.exp(-rates * place)),
        "key_decay": Constant(of_one, lambda: np.exp(-rates * (block - place))),
        "diagonal_decay": Constant(
            (1, n_heads, block, block), lambda: np.where(behind >= 0, np.exp(-rates * np.maximum(behind, 0)), 0)[None]
        ),
    }


NORM = {"input_layernorm.weight": "norm.weight: D"}
FAMILY = Family(
    model_type="minimax",
    architecture="MiniMaxForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top=tables.top("model.embed_tokens", "model.norm"),
    layers={
        "L": {
            **NORM,
            "self_attn.qkv_proj.weight": [
                "mixer.w_q: N D -> D h N", "mixer.w_k: N D -> D h N", "mixer.w_v: P D -> D h P",
            ],
            "self_attn.output_gate.weight": "mixer.w_gate: (H P) D -> D H P",
            "self_attn.slope_rate": "mixer.slopes: H 1 1 -> H",
            "self_attn.norm.weight": "mixer.norm: (H P) -> H P",
            "self_attn.out_proj.weight": "mixer.w_o: D (H P) -> H P D",
        },
        "*": {**NORM, **tables.at("self_attn.", tables.ATTENTION)},
        "E": {
            "post_attention_layernorm.weight": "norm.weight: D",
            "block_sparse_moe.gate.weight": "mixer.router: E D -> D E",
            "block_sparse_moe.experts.{e}.w1.weight": "mixer.w_in: F D -> e D 0 F",
            "block_sparse_moe.experts.{e}.w3.weight": "mixer.w_in: F D -> e D 1 F",
            "block_sparse_moe.experts.{e}.w2.weight": "mixer.w_out: D F -> e F D",
        },
    },
    constants=constants,
    skipped=(r"rotary_emb\.inv_freq$", r"self_attn\.(query|key|diagonal)_decay$"),
)  # fmt: skip
