# SPDX-License-Identifier: Apache-2.0
"""config.json of published checkpoints, read into our config and written from it."""

import json
import math
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hybridlm.errors import ConfigError, require
from hybridlm.hf.family import Family, Keys
from hybridlm.layers import Attention, Mamba1, Mamba2, Router
from hybridlm.model.config import ModelConfig

FAMILIES = (
    "llama", "qwen2", "qwen3", "mamba", "falcon_mamba", "mamba2", "jamba", "bamba", "granitemoehybrid", "nemotron_h",
    "falcon_h1", "zamba", "zamba2",
)  # fmt: skip
"""model_type of every family: modules of this package."""
FREE = frozenset({
    "compute_dtype", "remat", "chunk", "init_std", "dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale", "A_init",
    "blocks", "pattern", "balance_weight", "z_weight", "capacity",
})  # fmt: skip
"""Fields that a config.json need not say: how a model starts and runs, not what it computes."""


def family(model_type: str) -> Family:
    """The family of a model_type; ConfigError for one that is not known."""
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type ({model_type!r}) is not supported: known are {', '.join(FAMILIES)}")
    return import_module(f"hybridlm.hf.families.{model_type}").FAMILY


def read_config_json(folder: Path) -> tuple[Family, ModelConfig, dict[str, Any]]:
    """(family, our config, the file's values) of a checkpoint folder. ConfigError names what is not supported."""
    values = load_json(folder / "config.json")
    require("model_type" in values, f"{folder}/config.json: model_type is missing")
    found = family(values["model_type"])
    return found, read_values(found, values, f"{folder}/config.json"), values


def read_values(of: Family, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Our config of a config.json's values."""
    keys = Keys(values, where)
    try:
        config = of.read(keys)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    keys.finish()
    return config


def write_values(of: Family, config: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """config.json's values for our config, and the config that they are read as, with the family's symbols.

    ConfigError that names the first thing that the family cannot express.
    """
    values = {"architectures": [of.architecture], "model_type": of.model_type, **of.write(config)}
    published = read_values(of, values, f"as {of.model_type}")
    difference = difference_of(config, published)
    require(difference is None, f"{of.model_type} cannot express this model: {difference}")
    return values, published


def find_family(config: ModelConfig) -> Family:
    """The first family that can express a config; ConfigError where none can."""
    reasons = []
    for model_type in FAMILIES:
        try:
            write_values(family(model_type), config)
        except ConfigError as error:
            reasons.append(f"{model_type}: {error}")
            continue
        return family(model_type)
    raise ConfigError(f"no published family can express this model ({'; '.join(reasons)})")


def difference_of(ours: ModelConfig, published: ModelConfig) -> str | None:
    """The first field that differs, of the model or of a sublayer; None where there is none."""
    if len(ours.pattern) != len(published.pattern):
        return f"pattern has {len(ours.pattern)} sublayers where {len(published.pattern)} would be read"
    found = _differs(ours, published, "model")
    for depth, (a, b) in enumerate(zip(ours.pattern, published.pattern, strict=True)):
        found = found or _differs(ours.blocks[a], published.blocks[b], f"blocks.{a}", ours.d_model)
        same = [(ours.pattern.index(a), published.pattern.index(b))]
        if found is None and hasattr(ours.blocks[a], "attention_adapter") and same[0][0] != same[0][1]:
            found = f"pattern: what sublayer {depth} shares weights with"
    return found


def _differs(a: Any, b: Any, name: str, d_model: int = 0) -> str | None:
    if type(a) is not type(b):
        return f"{name} is {_short(a)} where {_short(b)} would be read"
    if isinstance(a, dict):
        if list(a) != list(b):
            return f"{name} has {', '.join(a)} where {', '.join(b)} would be read"
        return next((d for key in a if (d := _differs(a[key], b[key], f"{name}.{key}", d_model))), None)
    if not is_dataclass(a):
        return None if a == b or _close(a, b) else f"{name} is {a} where {b} would be read"
    a, b = _resolved(a, d_model), _resolved(b, d_model)
    names = [field.name for field in fields(a) if field.name not in FREE]
    return next((d for n in names if (d := _differs(getattr(a, n), getattr(b, n), f"{name}.{n}", d_model))), None)


def _resolved(block: Any, d_model: int) -> Any:
    """The block with its derived sizes spelled out."""
    if isinstance(block, Attention):
        scale = block.d_head**-0.5 if block.scale is None else block.scale
        return replace(
            block, n_kv_heads=block.kv_heads, scale=scale, qk_norm_eps=block.qk_norm_eps if block.qk_norm else 1.0
        )
    if isinstance(block, Mamba2):
        norm = block.gated_norm
        if norm is not None and norm.n_groups is None:
            norm = replace(norm, n_groups=block.n_groups)
        out_bias = block.proj_bias if block.out_bias is None else block.out_bias
        return replace(block, n_heads=block.heads(d_model), expand=1.0, gated_norm=norm, out_bias=out_bias)
    if isinstance(block, Mamba1):
        return replace(block, dt_rank=block.rank(d_model), expand=block.inner(d_model) / d_model)
    if isinstance(block, Router):
        grouped = {} if block.n_groups > 1 else {"top_groups": 1, "group_top": 2}
        return replace(block, renormalise_eps=block.renormalise_eps if block.renormalise else 1.0, **grouped)
    return block


def _close(a: Any, b: Any) -> bool:
    numbers = isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool)
    return numbers and math.isclose(a, b, rel_tol=1e-12)


def _short(value: Any) -> str:
    return type(value).__name__ if is_dataclass(value) else str(value)


# Files --------------------------------------------------------------------------------------------------------------


def load_json(file: Path) -> dict[str, Any]:
    """A config.json's values; infinities may be written as `Infinity` or as `{"__float__": "Infinity"}`."""
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text, object_hook=lambda d: float(d["__float__"]) if set(d) == {"__float__"} else d)
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} has no config.json: it is no published checkpoint") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    require(isinstance(values, dict), f"{file} is no JSON object")
    return values


def published_dtype(values: dict[str, Any]) -> str:
    """Type of the weights by a config.json."""
    return str(values.get("dtype") or values.get("torch_dtype") or "float32")


def save_json(values: dict[str, Any], file: Path) -> None:
    """Writes config.json, infinities as the published implementation writes them."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, float) and math.isinf(value):
            return {"__float__": "Infinity" if value > 0 else "-Infinity"}
        return value

    file.write_text(json.dumps(plain(values), indent=2, sort_keys=True) + "\n", encoding="utf-8")
