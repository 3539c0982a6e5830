# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: rope_parameters and its older spellings, read and written."""

from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.hf.keys import Keys
from hybridlm.layers import Attention, Linear, Llama3, Rope, YaRN


def read(keys: Keys, max_positions: int, theta: float = 10_000.0, fraction: float | None = None) -> Rope:
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


def write(config: Rope, always: bool = False) -> dict[str, Any]:
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


def required(attention: Attention) -> Rope:
    """The attention's Rope; ConfigError where the family cannot do without."""
    if attention.rope is None:
        raise ConfigError("blocks: attention without rope (NoPE), where the family has it")
    return attention.rope
