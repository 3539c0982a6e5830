# SPDX-License-Identifier: Apache-2.0
"""What families have in common: keys of widths, layers, attention and the Mambas, and the blocks of a pattern."""

from dataclasses import replace
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.hf.keys import Keys
from hybridlm.layers import (
    MLP,
    Attention,
    GatedConv,
    GatedDeltaNet,
    GatedNorm,
    KimiDelta,
    LatentAttention,
    LinearAttention,
    Mamba1,
    Mamba2,
    MoE,
    Parallel,
    Shared,
)
from hybridlm.model.config import ModelConfig

GATED = {
    "silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh",
    "relu": "reglu", "relu2": "reglu2",
}  # fmt: skip
"""hidden_act of gated MLPs -> our activation; the first of those that mean the same is what is written."""
PLAIN = {
    "relu2": "relu2", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "relu": "relu",
}  # fmt: skip
"""hidden_act of MLPs without a gate."""
TYPES = {
    Mamba1: "linear_attention", Mamba2: "linear_attention", Attention: "full_attention", MLP: "mlp", MoE: "moe",
    Shared: "hybrid", Parallel: "hybrid", GatedDeltaNet: "linear_attention",
    KimiDelta: "linear_attention", LatentAttention: "full_attention",
    GatedConv: "conv", LinearAttention: "linear_attention",
}  # fmt: skip
"""Block -> layer type, as files write it."""
LEGACY_TYPES = {"mamba": "linear_attention", "attention": "full_attention"}
"""Layer types as older files write them."""


def name_of(choices: dict[str, str], activation: str) -> str:
    """The first published name of an activation; ConfigError where there is none."""
    for name, ours in choices.items():
        if ours == activation:
            return name
    raise ConfigError(f"activation ({activation!r}) is none of {', '.join(choices.values())}")


def block(config: ModelConfig, kind: type, default: Any = None, **but: Any) -> Any:
    """The one block of a kind in the pattern; `default` where there is none, ConfigError where they differ.

    but: fields that may differ, and what they are in the result.
    """
    found = list(dict.fromkeys(replace(b, **but) for s in config.pattern if isinstance(b := config.blocks[s], kind)))
    if len(found) > 1:
        raise ConfigError(f"blocks: more than one kind of {kind.__name__}, where the family has one")
    if not found and default is None:
        raise ConfigError(f"blocks: no {kind.__name__} in the pattern, where the family has one")
    return found[0] if found else default


def expect(block: Any, kind: type) -> Any:
    """The block, which has to be of a kind; ConfigError where it is not."""
    if not isinstance(block, kind):
        raise ConfigError(f"blocks: {type(block).__name__}, where the family has {kind.__name__}")
    return block


def kinds(config: ModelConfig) -> list[str]:
    """Of each sublayer its layer type; of a block that no family has its name in lower case."""
    types = [type(config.blocks[symbol]) for symbol in config.pattern]
    return [TYPES.get(kind, kind.__name__.lower()) for kind in types]


def widths(keys: Keys, eps: str, eps_default: float, vocab: int, tied: bool, d_model: int = 4096) -> dict[str, Any]:
    """ModelConfig's fields that every family has. eps: the key of the norms' epsilon; others: the class's defaults."""
    return {
        "vocab_size": keys("vocab_size", vocab),
        "d_model": keys("hidden_size", d_model),
        "norm_eps": keys(eps, eps_default),
        "tie_embeddings": keys("tie_word_embeddings", tied),
        "init_std": keys("initializer_range", 0.02),
    }


def write_widths(config: ModelConfig, eps: str) -> dict[str, Any]:
    """The inverse of `widths`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        eps: config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def layer_types(keys: Keys, *names: str, n_layers: int) -> list[str] | None:
    """The first of the keys `names` that is given, older type names made new; None where none is. ConfigError where
    it is not as long as n_layers."""
    given = next((value for name in names if (value := keys(name, None)) is not None), None)
    if given is None:
        return None
    keys.require(
        len(given) == n_layers, f"num_hidden_layers ({n_layers}) is not the length of {names[0]} ({len(given)})"
    )
    return [LEGACY_TYPES.get(kind, kind) for kind in given]


def as_pattern(keys: Keys, types: list[str], symbols: dict[str, str]) -> str:
    """A pattern of layer types; ConfigError for a type that the family has not."""
    names = ("layers_block_type", "layer_types", "hybrid_override_pattern")
    name = next((name for name in names if keys.values.get(name)), names[0])
    for kind in types:
        keys.require(kind in symbols, f"{name} ({kind!r}) is not supported: only {', '.join(symbols)}")
    return "".join(symbols[kind] for kind in types)


def heads(keys: Keys, n_heads: int = 32, n_kv_heads: int | None = None, d_head: int | None = None) -> dict[str, Any]:
    """Attention's numbers of heads and their width, biases apart. Arguments: the class's defaults; d_head None: the
    model width over the heads. head_dim may be given wherever the published attention looks for it."""
    H, D = keys("num_attention_heads", n_heads), keys("hidden_size", 4096)
    keys.only("attention_dropout", 0.0, 0, None)
    P = keys("head_dim", d_head)
    return {"n_heads": H, "n_kv_heads": keys("num_key_value_heads", n_kv_heads) or H, "d_head": P or D // H}


def write_heads(attention: Attention) -> dict[str, Any]:
    """The inverse of `heads`."""
    return {
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.d_head,
    }


def mamba_prefixed(keys: Keys, eps: float) -> Mamba2:
    """Mamba-2 of the families (Bamba, Granite, Falcon-H1) whose keys start with mamba_, with their class's defaults.

    eps: default of rms_norm_eps."""
    D, H = keys("hidden_size", 4096), keys("mamba_n_heads", 128)
    d_inner = keys("mamba_d_ssm", 1024) if keys.values.get("model_type") == "falcon_h1" else None
    expand = keys.some("mamba_expand", 2)
    d_inner = int(expand * D) if d_inner is None else d_inner
    P = keys("mamba_d_head", "auto")
    P = d_inner // H if P == "auto" else P
    keys.require(d_inner == P * H, f"mamba_d_head ({P}) * mamba_n_heads ({H}) is not the inner width ({d_inner})")
    return Mamba2(
        d_state=keys("mamba_d_state", 256), d_head=P, n_heads=H, n_groups=keys("mamba_n_groups", 1),
        d_conv=keys("mamba_d_conv", 4), conv_bias=keys("mamba_conv_bias", True),
        activation=keys.choose("hidden_act", PLAIN, "silu"), proj_bias=keys("mamba_proj_bias", False),
        gated_norm=GatedNorm(eps=keys("rms_norm_eps", eps)),
        dt_limit=dt_limit(keys), chunk=keys.some("mamba_chunk_size", 256),
    )  # fmt: skip


def write_mamba_prefixed(mamba: Mamba2, config: ModelConfig) -> dict[str, Any]:
    """The inverse of `mamba_prefixed`."""
    H = mamba.heads(config.d_model)
    return {
        "mamba_d_state": mamba.d_state, "mamba_d_head": mamba.d_head, "mamba_n_heads": H,
        "mamba_n_groups": mamba.n_groups, "mamba_d_conv": mamba.d_conv, "mamba_conv_bias": mamba.conv_bias,
        "mamba_proj_bias": mamba.proj_bias, "mamba_expand": whole(H * mamba.d_head / config.d_model),
        "mamba_chunk_size": mamba.chunk or 256, "time_step_limit": list(mamba.dt_limit),
    }  # fmt: skip


def dt_limit(keys: Keys, name: str = "time_step_limit") -> tuple[float, float]:
    """The clamp of dt; null, for either limit too, and a missing key: none."""
    limits = keys.some(name, (None, None))
    keys.require(len(limits) == 2, f"{name} ({limits}) must have a lower and an upper limit")
    low, high = limits
    return 0.0 if low is None else float(low), float("inf") if high is None else float(high)


def dt_init(keys: Keys) -> dict[str, float]:
    """Fields of Mamba-1 and Mamba-2 that say how step sizes start; the lowest no higher than the highest."""
    high = keys("time_step_max", 0.1)
    low = min(max(keys("time_step_min", 1e-3), 1e-12), high)
    return {"dt_min": low, "dt_max": high, "dt_init_floor": keys("time_step_floor", 1e-4)}


def write_dt(mamba: Mamba2) -> dict[str, Any]:
    """The inverse of `dt_init` and `dt_limit`."""
    return {
        "time_step_min": mamba.dt_min, "time_step_max": mamba.dt_max, "time_step_floor": mamba.dt_init_floor,
        "time_step_limit": list(mamba.dt_limit),
    }  # fmt: skip


def inverse(number: float) -> float:
    """1 / number, the shortest decimal of those that are all but that."""
    return float(f"{1 / number:.15g}")


def whole(number: float) -> int | float:
    """An int where the number is one."""
    return int(number) if number == int(number) else number
