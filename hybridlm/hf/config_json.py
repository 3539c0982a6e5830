# SPDX-License-Identifier: Apache-2.0
"""config.json of published checkpoints, read into our config and written from it."""

import json
import math
import re
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.errors import ConfigError, require
from hybridlm.hf.compare import difference_of, differences
from hybridlm.hf.families import KNOWN
from hybridlm.hf.family import Family
from hybridlm.hf.inside import has_file
from hybridlm.hf.keys import Keys
from hybridlm.model.config import ModelConfig


def read_values(of: Family, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Our config of a config.json's values."""
    keys = Keys(values, where)
    try:
        config = of.read(keys)
    except Exception as error:  # a value of another type than the family's class has there can fail anywhere
        raise ConfigError(_told(of, keys, error)) from (None if isinstance(error, ConfigError) else error)
    keys.finish()
    return config


def _told(of: Family, keys: Keys, error: Exception) -> str:
    """An error of reading a config.json, in words that name the key."""
    text = str(error).removeprefix(keys.where).removeprefix(": ")
    if isinstance(error, ConfigError) and any(re.search(rf"\b{re.escape(key)}\b", text) for key in keys.values):
        return f"{keys.where}: {text}"
    key = _culprit(of, keys, error)
    reason = text if isinstance(error, ConfigError) else f"it cannot be used ({type(error).__name__}: {text[:100]})"
    shown = "" if key is None else f"{key} ({keys.values[key]!r:.60}): "
    return f"{keys.where}: {shown}{reason}"


def _culprit(of: Family, keys: Keys, error: Exception) -> str | None:
    """The key without which a config.json can be read, or else is read to another error; None where there is none."""
    changes = None
    for key in keys.values:
        try:
            of.read(Keys({name: value for name, value in keys.values.items() if name != key}, keys.where))
            return key
        except Exception as other:
            if changes is None and str(other) != str(error):
                changes = key
    return changes


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
    """The first family that can express a config, the last of which is our own format; ConfigError, one line, where
    that cannot either: why, and what keeps the model out of the nearest published family."""
    for family in _written():
        try:
            write_values(family, config)
        except ConfigError as error:
            reason = error
            continue
        return family
    raise ConfigError(f"no published family can express this model{_near(config)}; {family.model_type}: {reason}")


def nearest(config: ModelConfig) -> tuple[str, str] | None:
    """model_type of the published family that a config differs from in the fewest blocks, then fields, and the first
    of these; None where it has blocks that no family has."""
    found = []
    for family in _written():
        if family.of_model is not None:
            continue
        try:
            values = {"architectures": [family.architecture], "model_type": family.model_type, **family.write(config)}
            read = read_values(family, values)
        except ConfigError:
            continue
        fields = list(dict.fromkeys(differences(config, read)))
        if fields:
            found.append(((*_kinds_apart(config, read), len(fields)), family.model_type, fields[0]))
    return min(found, key=lambda near: near[0])[1:] if found else None


def _kinds_apart(ours: ModelConfig, read: ModelConfig) -> tuple[int, int]:
    """How many sublayers two models differ by, and at how many depths one has a block of another class."""
    pairs = zip(ours.pattern, read.pattern, strict=False)
    return abs(len(ours.pattern) - len(read.pattern)), sum(
        type(ours.blocks[a]) is not type(read.blocks[b]) for a, b in pairs
    )


def explained(error: ConfigError, config: ModelConfig, family: Family) -> ConfigError:
    """Why a family that was asked for cannot express a config, and what can."""
    try:
        instead = f"; family {find_family(config).model_type} can"
    except ConfigError:
        instead = _near(config, but=family.model_type)
    return ConfigError(f"{error}{instead}")


def _near(config: ModelConfig, but: str = "") -> str:
    """The nearest family and the field that keeps the config out of it, unless that is `but`."""
    near = nearest(config)
    return "" if near is None or near[0] == but else f" (nearest: {near[0]}, but {near[1]})"


def _written() -> list[Family]:
    """The families that models are written as."""
    return [family for family in KNOWN.values() if family.written_as is None]


def load_json(file: Path) -> dict[str, Any]:
    """A config.json's values; infinities may be written as `Infinity` or as `{"__float__": "Infinity"}`."""
    absent = f"{file.parent} has no config.json: it is no published checkpoint"
    try:
        require(has_file(file.parent, file.name), absent)
        text = storage.read_bytes(file).decode("utf-8")
        values = json.loads(text, object_hook=lambda d: float(d["__float__"]) if set(d) == {"__float__"} else d)
    except FileNotFoundError:
        raise ConfigError(absent) from None
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    require(isinstance(values, dict), f"{file} is no JSON object")
    return values


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

    storage.write_text(file, json.dumps(plain(values), indent=2, sort_keys=True) + "\n")
