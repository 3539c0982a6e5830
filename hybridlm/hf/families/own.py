# SPDX-License-Identifier: Apache-2.0
"""Our own format, for models that belong to no published family: config.json says the blocks as our config does, and
the model's code in plain PyTorch stands beside it (`hybridlm/hf/torch_code`; `trust_remote_code=True`).

Published folders name symbols as the model does; a block's table of weights follows from the block.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hybridlm.errors import require
from hybridlm.hf.families import tables
from hybridlm.hf.families.own_tables import KINDS, table_of
from hybridlm.hf.families.values import read_value, write_value
from hybridlm.hf.family import Family, Table
from hybridlm.hf.keys import Keys
from hybridlm.layers import Block, Shared
from hybridlm.layers.block import sees_ahead, shares, walk
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
    for name in ("prefix_tokens", "complement", "streams"):
        require(not getattr(config, name), f"model.{name}: the format has none")
    for symbol in dict.fromkeys(config.pattern):
        block = config.blocks[symbol]
        for name, inside in walk(block, f"blocks.{symbol}"):
            kind = type(inside)
            require(kind in KINDS, f"{name} is {kind.__name__}, a block that the format has not")
        require(not (ahead := sees_ahead(block, f"blocks.{symbol}")), ahead)
        unfit = shares(block) and symbol in ":;"
        require(not unfit, f"blocks.{symbol}: a symbol whose depths share weights must be neither : nor ;")


# Weights ------------------------------------------------------------------------------------------------------------


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
