# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding: rope_parameters and its older spellings, read and written."""

from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.hf.keys import Keys
from hybridlm.layers import NTK, Attention, Linear, Llama3, Proportional, Rope, YaRN


def read(
    keys: Keys, max_positions: int, theta: float = 10_000.0, fraction: float | None = None, ntk: bool = False
) -> Rope:
    """rope_parameters, or the older rope_theta and rope_scaling. max_positions: the class's default of
    max_position_embeddings; fraction: what partial_rotary_factor is without being said (None: it must be 1); ntk:
    whether the class knows the type "dynamic" with an alpha, which is fixed."""
    scaling, current = keys("rope_scaling", None), keys("rope_parameters", None)
    values = dict(scaling or current or {})
    theta = keys.some("rope_theta", theta)
    length = keys.some("max_position_embeddings", max_positions)
    outer = keys.only("partial_rotary_factor", 1.0 if fraction is None else fraction, None) or fraction or 1.0
    inner = Keys(values, f"{keys.where}: rope_parameters")
    legacy = inner("type", "default")
    known = ("default", "linear", "yarn", "llama3", "proportional", *(("dynamic",) if ntk else ()))
    kind = inner.only("rope_type", *known, default=legacy)
    partial = inner.some("partial_rotary_factor", outer)
    partial_ok = fraction is not None or partial == 1 or kind == "proportional"
    inner.require(partial_ok, f"partial_rotary_factor ({partial}) is not supported")
    made = Rope(float(inner.some("rope_theta", theta)), float(partial), _scaling(inner, kind, length))
    if kind == "default":
        inner.carry("factor", "original_max_position_embeddings")
    inner.finish()
    return made


def read_each(
    keys: Keys, max_positions: int, defaults: dict[str, Rope], fraction: float | None = None
) -> dict[str, Rope]:
    """rope_parameters by layer type. defaults: the class's, where none are given; the others as of `read`."""
    given, length = keys("rope_parameters", None), keys.some("max_position_embeddings", max_positions)
    if given is None:
        return defaults
    ropes = {}
    for kind in defaults:
        if given.get(kind) is not None:
            of_kind = {"rope_parameters": given[kind], "max_position_embeddings": length}
            inner = Keys(of_kind, f"{keys.where}: rope_parameters.{kind}")
            ropes[kind] = read(inner, max_positions, fraction=fraction)
            inner.finish()
    unknown = [kind for kind, value in given.items() if kind not in (*defaults, "rope_type") and value is not None]
    keys.require(not unknown, f"rope_parameters ({', '.join(unknown)}): only {', '.join(defaults)}")
    return ropes


def _scaling(keys: Keys, kind: str, length: int) -> YaRN | Llama3 | Linear | NTK | Proportional | None:
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(keys("factor"))
    if kind == "proportional":
        return Proportional(keys.some("factor", 1.0))
    if kind == "dynamic":
        keys.carry("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings")
        return NTK(float(keys("alpha")))
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
        case Proportional(factor):
            values |= {"rope_type": "proportional", "partial_rotary_factor": config.fraction}
            values |= {} if factor == 1 else {"factor": factor}
        case NTK(alpha):
            values |= {"rope_type": "dynamic", "alpha": alpha, "factor": 1.0}
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
