# SPDX-License-Identifier: Apache-2.0
"""Blocks as values of a config.json, and back: {"type": class, field: value}; a dict is a list, as order counts."""

import math
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from hybridlm.errors import ConfigError, require
from hybridlm.fields import field_types, is_union, variants


def write_value(value: Any) -> Any:
    """A field's value as JSON."""
    if is_dataclass(value):
        inside = {f.name: write_value(getattr(value, f.name)) for f in fields(value)}
        return {"type": type(value).__name__, **inside}
    if isinstance(value, dict):
        return [{"name": name, **write_value(entry)} for name, entry in value.items()]
    if isinstance(value, tuple):
        return [write_value(entry) for entry in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def read_value(value: Any, hint: Any, at: str) -> Any:
    """The inverse, for a field of type `hint`; ConfigError names `at`. What its class checks is not checked here."""
    known = variants(hint)
    if known:
        if value is None and "None" in known:
            return None
        return _read_class(value, known, at)
    if typing.get_origin(hint) is dict:
        named = isinstance(value, list) and all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in value)
        require(named, f"{at} ({value!r:.40}) must be a list of objects with a name")
        entry = typing.get_args(hint)[1]
        items = [(e["name"], {k: v for k, v in e.items() if k != "name"}) for e in value]
        require(len(dict(items)) == len(items), f"{at} names one entry twice")
        return {name: read_value(inside, entry, f"{at}.{name}") for name, inside in items}
    if isinstance(value, list):
        options = typing.get_args(hint) if is_union(hint) else (hint,)
        inner = next((typing.get_args(o) for o in options if typing.get_origin(o) is tuple), ())
        return tuple(read_value(entry, inner[0] if inner else Any, at) for entry in value)
    return float(value) if hint is float and value in ("inf", "-inf") else value


def _read_class(value: Any, known: dict[str, Any], at: str) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    cls = known.get(kind) if isinstance(kind, str) else None
    require(is_dataclass(cls), f"{at} ({value!r:.40}) must be an object whose type is one of {', '.join(known)}")
    types = field_types(cls)
    unknown = [name for name in value if name != "type" and name not in types]
    require(not unknown, f"{at} has {', '.join(unknown[:4])}, which {kind} does not know")
    inside = {name: read_value(v, types[name], f"{at}.{name}") for name, v in value.items() if name != "type"}
    try:
        return cls(**inside)
    except ConfigError as error:
        raise ConfigError(f"{at}.{error}") from error
