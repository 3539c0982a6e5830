# SPDX-License-Identifier: Apache-2.0
"""The JSON form of a config that is stored with every run."""

import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridlm.config import Config
from hybridlm.config.tree import children, to_dict, variants
from hybridlm.errors import ConfigError


def from_dict(values: Mapping[str, Any], hint=Config):
    """The inverse of to_dict. Raises ConfigError for a key that this version does not know."""
    known = variants(hint)
    if known:
        if values is None:
            return None
        kind = values.get("type", next(iter(known)))
        if kind not in known:
            raise ConfigError(f"stored config has a {kind!r} where this version knows {', '.join(known)}")
        cls = known[kind]
        hints = typing.get_type_hints(cls)
        unknown = [k for k in values if k != "type" and k not in hints]
        if unknown:
            raise ConfigError(f"stored config has the key {unknown[0]!r}, which {kind} of this version does not know")
        return cls(**{k: from_dict(v, hints[k]) for k, v in values.items() if k != "type"})
    if typing.get_origin(hint) is dict:
        return {k: from_dict(v, typing.get_args(hint)[1]) for k, v in values.items()}
    if isinstance(values, list):
        args = typing.get_args(hint)
        tuples = [a for a in args if typing.get_origin(a) is tuple]
        inner = typing.get_args(tuples[0]) if tuples else args
        return tuple(from_dict(v, inner[0]) for v in values)
    return float(values) if isinstance(values, str) and hint is float else values


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ: {'model.d_model': (256, 512)}."""

    def walk(a, b, prefix):
        for name in dict.fromkeys([*children(a), *children(b)]):
            x, y = children(a).get(name), children(b).get(name)
            if x == y:
                continue
            if children(x) and children(y) and type(x) is type(y):
                yield from walk(x, y, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", (x, y)

    return dict(walk(old, new, ""))
