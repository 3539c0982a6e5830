# SPDX-License-Identifier: Apache-2.0
"""Our own format, for models that belong to no published family: config.json says the blocks as our config does, and
the model's code in plain PyTorch stands beside it (`hybridlm/hf/torch_code`; `trust_remote_code=True`).

Published folders name symbols as the model does; a block's table of weights follows from the block.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridlm.errors import require
from hybridlm.hf.families import tables
from hybridlm.hf.families.values import read_value, write_value
from hybridlm.hf.family import Family, Table
from hybridlm.hf.keys import Keys
from hybridlm.layers import (
    MLP,
    RGLRU,
    Attention,
    Block,
    GatedConv,
    GatedDeltaNet,
    GatedScan,
    KimiDelta,
    Mamba1,
    Mamba2,
    MoE,
    Parallel,
    Shared,
)
from hybridlm.layers.block import passes, sees_ahead, shares, walk
from hybridlm.model.config import ModelConfig

NAMES = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "pattern": "pattern", "norm": "norm", "norm_eps": "norm_eps",
    "final_norm_eps": "final_norm_eps", "norm_bias": "norm_bias", "norm_offset": "norm_offset",
    "norm_before": "norm_before", "norm_after": "norm_after", "tie_embeddings": "tie_word_embeddings",
    "embedding_norm": "embedding_norm", "embedding_multiplier": "embedding_multiplier",
    "channel_scales": "channel_scales", "residual_multiplier": "residual_multiplier",
    "logit_multiplier": "logit_multiplier", "logit_softcap": "logit_softcap", "init_std": "initializer_range",
}  # fmt: skip
"""Fields of ModelConfig, blocks aside -> keys of config.json."""
CODE = Path(__file__).parent.parent / "torch_code"
"""The model in plain PyTorch."""
AUTO_MAP = {
    "AutoConfig": "configuration_hybridlm.HybridLMConfig",
    "AutoModel": "modeling_hybridlm.HybridLMModel",
    "AutoModelForCausalLM": "modeling_hybridlm.HybridLMForCausalLM",
}


def read(keys: Keys) -> ModelConfig:
    """config.json as our config."""
    keys.derived("num_hidden_layers")
    given = {ours: keys(theirs) for ours, theirs in NAMES.items() if theirs in keys.values}
    for name in ("pattern", "hidden_size", "vocab_size"):
        keys(name)
    pattern, blocks = given["pattern"], keys("blocks")
    keys.require(isinstance(pattern, str), f"pattern ({pattern!r:.40}) must be a text")
    keys.require(isinstance(blocks, dict), f"blocks ({blocks!r:.40}) must be an object")
    for symbol in dict.fromkeys(pattern):
        keys.require(symbol in blocks, f"blocks has no {symbol!r}, which pattern names")
    residual = keys.some("normed_residual", {})
    keys.require(isinstance(residual, dict), f"normed_residual ({residual!r:.40}) must be an object")
    config = ModelConfig(
        **given,
        blocks={symbol: read_value(blocks[symbol], Block, f"blocks.{symbol}") for symbol in dict.fromkeys(pattern)},
        normed_residual={symbol: tuple(pair) for symbol, pair in residual.items()},
    )
    require_own(config)
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read`; ConfigError names the block, or the field of the model, that the format has not."""
    require_own(config)
    used = dict.fromkeys(config.pattern)
    return {
        **{theirs: getattr(config, ours) for ours, theirs in NAMES.items()},
        "blocks": {symbol: write_value(config.blocks[symbol].resolved(config.d_model)) for symbol in used},
        "normed_residual": {symbol: list(pair) for symbol, pair in config.normed_residual.items() if symbol in used},
        "num_hidden_layers": len(config.pattern),
        "norm_before": None if config.norm_before is None else "".join(s for s in config.norm_before if s in used),
        "norm_after": "".join(s for s in config.norm_after if s in used),
        "auto_map": AUTO_MAP,
    }


def require_own(config: ModelConfig) -> None:
    """ConfigError, one line, for the first thing of a model that the format has not."""
    for name in ("prefix_tokens", "complement"):
        require(not getattr(config, name), f"model.{name}: the format has none")
    for symbol in dict.fromkeys(config.pattern):
        block = config.blocks[symbol]
        for name, inside in walk(block, f"blocks.{symbol}"):
            kind = type(inside)
            require(kind in KINDS, f"{name} is {kind.__name__}, a block that the format has not")
            require(not passes(inside, config.d_model), f"{name} ({kind.__name__}) hands on from depth to depth")
        require(not (ahead := sees_ahead(block, f"blocks.{symbol}")), ahead)
        unfit = shares(block) and symbol in ":;"
        require(not unfit, f"blocks.{symbol}: a symbol whose depths share weights must be neither : nor ;")


# Weights ------------------------------------------------------------------------------------------------------------


def _attention(block: Attention) -> Table:
    table = {**tables.ATTENTION, "sinks": "mixer.sinks: H"}
    of_head = block.gate == "head"
    table["gate_proj.weight"] = "mixer.w_gate: H D -> D H" if of_head else "mixer.w_gate: (H P) D -> D H P"
    table["gate_proj.bias"] = "mixer.b_gate: H" if of_head else "mixer.b_gate: (H P) -> H P"
    if block.qk_norm_over == "all":
        table["q_norm.weight"] = "mixer.q_norm.weight: (H P) -> H P"
        table["k_norm.weight"] = "mixer.k_norm.weight: (K P) -> K P"
    return table


def _mamba2(block: Mamba2) -> Table:
    return {**tables.MAMBA2, "D": "mixer.D: (H P) -> H P"} if block.per_channel_D else tables.MAMBA2


def _mamba1(block: Mamba1) -> Table:
    kept = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "out_proj.weight", "out_proj.bias")
    return {
        **{name: tables.MAMBA1[name] for name in kept},
        "x_proj": "mixer.x_proj: H R P -> P H R",
        "dt_proj": "mixer.dt_proj: H P R -> R H P",
        "dt_bias": "mixer.dt_bias: H P",
        "A_log": "mixer.A_log: H P N",
        "D": "mixer.D: H P",
        "norms.0.weight": "mixer.dt_norm.weight: R",
        "norms.1.weight": "mixer.B_norm.weight: N",
        "norms.2.weight": "mixer.C_norm.weight: N",
    }


def _delta(block: GatedDeltaNet) -> Table:
    return {
        "q_proj.weight": "mixer.in_q: (G N) D -> D G N",
        "k_proj.weight": "mixer.in_k: (G N) D -> D G N",
        "v_proj.weight": "mixer.in_v: (H P) D -> D H P",
        "z_proj.weight": "mixer.in_z: (H P) D -> D H P",
        "b_proj.weight": "mixer.in_ba: H D -> D 0 H",
        "a_proj.weight": "mixer.in_ba: H D -> D 1 H",
        **tables.CONV_QKV,
        "A_log": "mixer.A_log: H",
        "dt_bias": "mixer.dt_bias: H",
        "o_norm.weight": "mixer.norm: P",
        "o_proj.weight": "mixer.out: D (H P) -> H P D",
    }


def _kimi(block: KimiDelta) -> Table:
    table = {**tables.KIMI_DELTA, "A_log": "mixer.A_log: H"}
    for name, ours, rank in (("f_proj", "decay", block.decay_rank), ("g_proj", "gate", block.gate_rank)):
        if rank is None:
            table[f"{name}.weight"] = f"mixer.{ours}: (H P) D -> D H P"
        else:
            table[f"{name}.0.weight"] = f"mixer.in_{ours}: R D -> D R"
            table[f"{name}.1.weight"] = f"mixer.{ours}: (H P) R -> R H P"
    return table


def _gated_conv(block: GatedConv) -> Table:
    return tables.named(tables.GATED_CONV, conv="conv1d")


def _scan(block: GatedScan) -> Table:
    return {
        "conv1d.weight": "mixer.conv: D 1 W -> D W",
        "conv1d.bias": "mixer.conv_bias: D",
        "in_proj.weight": "mixer.w_in: (c F) D -> D c F",
        "lower_bound": "mixer.lower_bound: F",
        "norm.weight": "mixer.norm: F",
        "out_proj.weight": "mixer.w_out: D F -> F D",
    }


def _rglru(block: RGLRU) -> Table:
    return {
        "linear_y.weight": "mixer.w_in: (H P) D -> D 0 H P",
        "linear_x.weight": "mixer.w_in: (H P) D -> D 1 H P",
        "linear_y.bias": "mixer.b_in: (H P) -> 0 H P",
        "linear_x.bias": "mixer.b_in: (H P) -> 1 H P",
        "conv1d.weight": "mixer.conv: (H P) 1 W -> H P W",
        "conv1d.bias": "mixer.conv_bias: (H P) -> H P",
        "gate_weights": "mixer.w_gates: c H Q P -> Q c H P",
        "gate_biases": "mixer.b_gates: c H P",
        "decay": "mixer.decay: H P",
        "linear_out.weight": "mixer.w_out: D (H P) -> H P D",
        "linear_out.bias": "mixer.b_out: D",
    }


def _mlp(block: MLP) -> Table:
    return tables.GATED_MLP if block.gated else tables.PLAIN_MLP


def _moe(block: MoE) -> Table:
    firsts = {"gate_proj": " 0", "up_proj": " 1"} if block.gated else {"up_proj": ""}
    return {
        "router.weight": "mixer.router: E D -> D E",
        "selection_bias": "mixer.selection_bias: E",
        **{f"experts.{{e}}.{name}.weight": f"mixer.w_in: F D -> e D{side} F" for name, side in firsts.items()},
        "experts.{e}.down_proj.weight": "mixer.w_out: D F -> e F D",
        "latent_in.weight": "mixer.latent_in: R D -> D R",
        "latent_in.bias": "mixer.latent_in_bias: R",
        "latent_out.weight": "mixer.latent_out: D R -> R D",
        "latent_out.bias": "mixer.latent_out_bias: D",
        **({} if block.shared is None else tables.at("shared_expert.", _mlp(block.shared), "mixer.shared")),
        "shared_expert_gate.weight": "mixer.shared_gate: 1 D -> D 0",
    }


def _parallel(block: Parallel) -> Table:
    table = {}
    for name, branch in block.branches.items():
        table |= tables.at(f"branch_{name}.", table_of(branch.mixer), f"mixer.branches.{name}")
        table[f"norm_{name}.weight"] = f"mixer.norms.{name}.weight: D"
    return table


def _shared(block: Shared) -> Table:
    """Of each depth's own mixer; the rest stands in `_link` and `_top`."""
    return table_of(block.mixer)


KINDS: dict[type, Callable[[Any], Table]] = {
    Attention: _attention, Mamba2: _mamba2, Mamba1: _mamba1, MLP: _mlp, MoE: _moe, GatedDeltaNet: _delta,
    KimiDelta: _kimi, GatedConv: _gated_conv, GatedScan: _scan, RGLRU: _rglru, Parallel: _parallel, Shared: _shared,
}  # fmt: skip
"""Blocks of the format -> the table of their weights; CODE has a class of the same name."""


def table_of(block: Block) -> Table:
    """The weights of a block's mixer, behind `mixer.`."""
    return KINDS[type(block)](block)


def _link(block: Shared) -> Table:
    names = {name: "(H P) R -> R H P" for name in "qkv"} | {
        "mlp": "(c F) R -> R c F" if block.mlp.gated else "F R -> R F"
    }
    table = {"link.linear.weight": "link.linear: E D -> D E"}
    for name, axes in names.items():
        table[f"link.adapters.{name}.0.weight"] = f"link.adapters.{name}.a: R D -> D R"
        table[f"link.adapters.{name}.1.weight"] = f"link.adapters.{name}.b: {axes}"
    return table


def _sublayer(block: Block) -> Table:
    return {
        **tables.norm("norm"),
        **tables.norm("after_norm", "after_norm"),
        "scales.weight": "scales.scale: c D",
        "scales.bias": "scales.bias: c D",
        **tables.at("mixer.", table_of(block)),
        **(_link(block) if shares(block) else {}),
    }


TOP = {
    **tables.top("model.embed_tokens", "model.norm"),
    **tables.norm("model.embed_norm", "embedding_norm"),
    "model.embed_scales.weight": "embedding_scales.scale: c D",
    "model.embed_scales.bias": "embedding_scales.bias: c D",
}


def _top(config: ModelConfig) -> Table:
    """What is outside of layers, what depths share included."""
    table, sharing = dict(TOP), [s for s in dict.fromkeys(config.pattern) if shares(config.blocks[s])]
    for i, symbol in enumerate(sharing):
        block, ours, theirs = config.blocks[symbol], f"shared.{symbol}", f"model.shared.{i}."
        table |= tables.norm(f"{theirs}norm", f"{ours}.norm") | tables.norm(f"{theirs}mlp_norm", f"{ours}.mlp_norm")
        table |= tables.at(f"{theirs}attention.", table_of(block.attention), f"{ours}.attention")
        table |= tables.at(f"{theirs}mlp.", table_of(block.mlp), f"{ours}.mlp")
    return table


def of_model(config: ModelConfig, published_pattern: str) -> Family:
    """The family with the tables of a model, by the symbols of a published pattern."""
    layers = {theirs: _sublayer(config.blocks[ours]) for theirs, ours in zip(published_pattern, config.pattern)}
    return replace(FAMILY, layers=layers, top=_top(config), of_model=None)


def code(config: ModelConfig) -> Mapping[str, str]:
    """The files of CODE by name: all of them, whatever the blocks, as transformers takes folders of one name for the
    same code."""
    return {file.name: file.read_text(encoding="utf-8") for file in sorted(CODE.glob("*_hybridlm.py"))}


FAMILY = Family(
    model_type="hybridlm",
    architecture="HybridLMForCausalLM",
    read=read,
    write=write,
    layers={},
    top=TOP,
    of_model=of_model,
    code=code,
)
