# SPDX-License-Identifier: Apache-2.0
"""What families have in common: keys of rope, attention, MLP and Mamba-2, and the tables of their weights."""

from dataclasses import replace
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.hf.family import Keys
from hybridlm.layers import MLP, Attention, GatedNorm, Linear, Llama3, Mamba1, Mamba2, Parallel, Rope, Shared, YaRN
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
    """Of each sublayer what it is: linear_attention, full_attention, mlp, hybrid, or the block's name in lower case."""
    names = {Mamba1: "linear_attention", Mamba2: "linear_attention", Attention: "full_attention", MLP: "mlp"}
    names |= {Shared: "hybrid", Parallel: "hybrid"}
    types = [type(config.blocks[symbol]) for symbol in config.pattern]
    return [names.get(kind, kind.__name__.lower()) for kind in types]


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


def top(embedding: str, norm: str) -> dict[str, str]:
    """The table of what is outside of layers, with the names of the embedding and of the last norm."""
    return {
        f"{embedding}.weight": "embedding: V D",
        f"{norm}.weight": "norm.weight: D",
        "lm_head.weight": "output: V D",
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


# Rotary embedding ---------------------------------------------------------------------------------------------------


def rope(keys: Keys, max_positions: int, theta: float = 10_000.0, fraction: float | None = None) -> Rope:
    """rope_parameters, or the older rope_theta and rope_scaling. max_positions: the class's default of
    max_position_embeddings; fraction: what partial_rotary_factor is without being said (None: it must be 1)."""
    scaling, current = keys("rope_scaling", None), keys("rope_parameters", None)
    values = dict(scaling or current or {})
    theta = keys.some("rope_theta", theta)
    length = keys.some("max_position_embeddings", max_positions)
    outer = keys.only("partial_rotary_factor", 1.0 if fraction is None else fraction, None) or fraction or 1.0
    inner = Keys(values, f"{keys.where}: rope_parameters")
    legacy = inner("type", "default")
    kind = inner.only("rope_type", "default", "linear", "yarn", "llama3", default=legacy)
    partial = inner.some("partial_rotary_factor", outer)
    inner.require(fraction is not None or partial == 1, f"partial_rotary_factor ({partial}) is not supported")
    made = Rope(float(inner.some("rope_theta", theta)), float(partial), _scaling(inner, kind, length))
    if kind == "default":
        inner.carry("factor", "original_max_position_embeddings")
    inner.finish()
    return made


def _scaling(keys: Keys, kind: str, length: int) -> YaRN | Llama3 | Linear | None:
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(keys("factor"))
    original = keys.some("original_max_position_embeddings", length)
    if kind == "llama3":
        return Llama3(keys("factor"), keys("low_freq_factor"), keys("high_freq_factor"), original)
    factor = keys.some("factor", length / original)
    scale, both = keys("attention_factor", None), (keys("mscale", None), keys("mscale_all_dim", None))
    if scale is None and all(both):
        once = YaRN(factor)
        scale = once.scale_times(both[0]) / once.scale_times(both[1])
    fast, slow = keys("beta_fast", None) or 32.0, keys("beta_slow", None) or 1.0
    return YaRN(factor, original, fast, slow, scale, keys.some("truncate", True))


def write_rope(config: Rope, always: bool = False) -> dict[str, Any]:
    """rope_parameters of a Rope; always: with the rotated fraction even where that is one."""
    values: dict[str, Any] = {"rope_theta": config.theta, "rope_type": "default"}
    if always or config.fraction != 1:
        values["partial_rotary_factor"] = config.fraction
    match config.scaling:
        case Linear(factor):
            values |= {"rope_type": "linear", "factor": factor}
        case Llama3(factor, low, high, original):
            values |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            values["original_max_position_embeddings"] = original
        case YaRN(factor, original, fast, slow, scale, truncate):
            values |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            values |= {"beta_fast": fast, "beta_slow": slow, "truncate": truncate}
            values |= {} if scale is None else {"attention_factor": scale}
    return values


def needs_rope(attention: Attention) -> Rope:
    """The attention's Rope; ConfigError where the family cannot do without."""
    if attention.rope is None:
        raise ConfigError("blocks: attention without rope (NoPE), where the family has it")
    return attention.rope


# Attention ----------------------------------------------------------------------------------------------------------


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


ATTENTION = {
    "q_proj.weight": "mixer.w_q: (H P) D -> D H P",
    "k_proj.weight": "mixer.w_k: (K P) D -> D K P",
    "v_proj.weight": "mixer.w_v: (K P) D -> D K P",
    "q_proj.bias": "mixer.b_q: (H P) -> H P",
    "k_proj.bias": "mixer.b_k: (K P) -> K P",
    "v_proj.bias": "mixer.b_v: (K P) -> K P",
    "q_norm.weight": "mixer.q_norm.weight: P",
    "k_norm.weight": "mixer.k_norm.weight: P",
    "o_proj.weight": "mixer.w_o: D (H P) -> H P D",
    "o_proj.bias": "mixer.b_o: D",
}
"""Attention as separate projections."""

# MLP ----------------------------------------------------------------------------------------------------------------

GATED_MLP = {
    "gate_proj.weight": "mixer.w_in: F D -> D 0 F",
    "up_proj.weight": "mixer.w_in: F D -> D 1 F",
    "gate_proj.bias": "mixer.b_in: F -> 0 F",
    "up_proj.bias": "mixer.b_in: F -> 1 F",
    "down_proj.weight": "mixer.w_out: D F -> F D",
    "down_proj.bias": "mixer.b_out: D",
}
"""A gated MLP as three matrices."""
FUSED_MLP = {
    "input_linear.weight": "mixer.w_in: (c F) D -> D c F",
    "output_linear.weight": "mixer.w_out: D F -> F D",
}
"""A gated MLP whose first two matrices stand one above the other."""
PLAIN_MLP = {
    "up_proj.weight": "mixer.w_in: F D -> D F",
    "up_proj.bias": "mixer.b_in: F",
    "down_proj.weight": "mixer.w_out: D F -> F D",
    "down_proj.bias": "mixer.b_out: D",
}
"""An MLP without a gate."""

# Mamba-2 ------------------------------------------------------------------------------------------------------------

MAMBA2 = {
    "in_proj.weight": [
        "mixer.in_zx: (c H P) D -> D c H P", "mixer.in_BC: (c G N) D -> D c G N", "mixer.in_dt: H D -> D H",
    ],
    "in_proj.bias": ["mixer.in_zx_bias: (c H P) -> c H P", "mixer.in_BC_bias: (c G N) -> c G N", "mixer.in_dt_bias: H"],
    "conv1d.weight": ["mixer.conv_x: (H P) 1 W -> H P W", "mixer.conv_BC: (c G N) 1 W -> c G N W"],
    "conv1d.bias": ["mixer.conv_x_bias: (H P) -> H P", "mixer.conv_BC_bias: (c G N) -> c G N"],
    "dt_bias": "mixer.dt_bias: H",
    "A_log": "mixer.A_log: H",
    "D": "mixer.D: H",
    "norm.weight": "mixer.norm: (H P) -> H P",
    "out_proj.weight": "mixer.out: D (H P) -> H P D",
    "out_proj.bias": "mixer.out_bias: D",
}  # fmt: skip
"""Mamba-2, all families."""

# Mamba-1 ------------------------------------------------------------------------------------------------------------

MAMBA1 = {
    "in_proj.weight": "mixer.in_xz: (c H P) D -> D c H P",
    "in_proj.bias": "mixer.in_xz_bias: (c H P) -> c H P",
    "conv1d.weight": "mixer.conv: (H P) 1 W -> H P W",
    "conv1d.bias": "mixer.conv_bias: (H P) -> H P",
    "x_proj.weight": "mixer.x_proj: R (H P) -> P H R",
    "dt_proj.weight": "mixer.dt_proj: (H P) R -> R H P",
    "dt_proj.bias": "mixer.dt_bias: (H P) -> H P",
    "A_log": "mixer.A_log: (H P) N -> H P N",
    "D": "mixer.D: (H P) -> H P",
    "dt_layernorm.weight": "mixer.dt_norm.weight: R",
    "b_layernorm.weight": "mixer.B_norm.weight: N",
    "c_layernorm.weight": "mixer.C_norm.weight: N",
    "out_proj.weight": "mixer.out: D (H P) -> H P D",
    "out_proj.bias": "mixer.out_bias: D",
}
"""Mamba-1 of one head."""


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
    """The clamp of dt; null and a missing key: none."""
    low, high = keys.some(name, (0.0, float("inf")))
    return float(low), float(high)


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


def at(prefix: str, table: dict[str, Any], own: str = "") -> dict[str, Any]:
    """A table with `prefix` before its names and, where given, `own` in place of `mixer` in its paths."""

    def moved(spec):
        if isinstance(spec, list):
            return [moved(s) for s in spec]
        return own + spec.removeprefix("mixer") if own else spec

    return {prefix + name: moved(spec) for name, spec in table.items()}
