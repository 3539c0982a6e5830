# SPDX-License-Identifier: Apache-2.0
"""The JSON form of a config that is stored with every run."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridlm.config import Config
from hybridlm.config.tree import children, field_types, old_words, to_dict, variants, walk
from hybridlm.errors import ConfigError


def from_dict(values: Mapping[str, Any], hint=Config, like: Config | None = None):
    """The inverse of to_dict, for what this version and those before it wrote.

    like: a config whose classes are known, too: those of a user's own blocks. Raises ConfigError, one line, for a key
    or a class that is not known.
    """
    nodes = [] if like is None else [node for _, node in walk(like) if dataclasses.is_dataclass(node)]
    return _read(values, hint, {type(node).__name__: type(node) for node in nodes})


def _read(values, hint, own: Mapping[str, type]):
    known = variants(hint)
    if known and values is not None and not isinstance(values, str):  # a name: the class above it knows what that is
        return _read_dataclass(values, known, own)
    if typing.get_origin(hint) is dict:
        return {k: _read(v, typing.get_args(hint)[1], own) for k, v in values.items()}
    if isinstance(values, list):
        args = typing.get_args(hint)
        tuples = [a for a in args if typing.get_origin(a) is tuple]
        inner = typing.get_args(tuples[0]) if tuples else args
        return tuple(_read(v, inner[0], own) for v in values)
    return float(values) if isinstance(values, str) and hint is float else values


def _read_dataclass(values: Mapping[str, Any], known: Mapping[str, Any], own: Mapping[str, type]):
    kind = values.get("type", next(iter(known)))
    cls = known.get(kind) or (own.get(kind) if len(known) > 1 else None)
    if cls is None:
        raise ConfigError(
            f"stored config has a {kind!r}, which is none of {', '.join(known)}: "
            "give the config file that defines it (--config FILE.py)"
        )
    words = {**old_words(cls), **field_types(cls)}
    unknown = [k for k in values if k != "type" and k not in words]
    if unknown:
        raise ConfigError(f"stored config has the key {unknown[0]!r}, which {kind} of this version does not know")
    return cls(**{k: _read(v, words[k], own) for k, v in values.items() if k != "type"})


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config as JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def differences(old, new) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ between two configs, or two parts of the same class: {'d_model': (256, 512)}."""

    def compare(a, b, prefix):
        for name in dict.fromkeys([*children(a), *children(b)]):
            x, y = children(a).get(name), children(b).get(name)
            if x == y:
                continue
            if children(x) and children(y) and type(x) is type(y):
                yield from compare(x, y, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", (x, y)

    return dict(compare(old, new, ""))
