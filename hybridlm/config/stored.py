# SPDX-License-Identifier: Apache-2.0
"""The JSON form of a config that is stored with every run."""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.tree import children, old_words, to_dict, walk
from hybridlm.errors import ConfigError, require
from hybridlm.fields import field_types, fits, variants


def from_dict(values: Mapping[str, Any], hint=Config, like: Config | None = None):
    """The inverse of to_dict, for what this version and those before it wrote.

    like: a config whose classes are known, too: those of a user's own blocks. Raises ConfigError, one line, for a key
    or a class that is not known and for a value that is none of its field's.
    """
    nodes = [] if like is None else [node for _, node in walk(like) if dataclasses.is_dataclass(node)]
    return _read(values, hint, {type(node).__name__: type(node) for node in nodes}, "")


def _read(values, hint, own: Mapping[str, type], at: str):
    """at: the dotted name of what is read, for errors."""
    known = variants(hint)
    if known and not (at and isinstance(values, str)):  # a name: the class above it knows what that is
        require(values is not None or "None" in known, f"stored config: {at} (None) must be {' or '.join(known)}")
        return None if values is None else _read_dataclass(values, known, own, at)
    if typing.get_origin(hint) is dict:
        require(isinstance(values, Mapping), f"stored config: {at} ({values!r:.40}) must be an object")
        return {k: _read(v, typing.get_args(hint)[1], own, f"{at}.{k}") for k, v in values.items()}
    if isinstance(values, list):
        args = typing.get_args(hint)
        tuples = [a for a in args if typing.get_origin(a) is tuple]
        inner = typing.get_args(tuples[0]) if tuples else args
        values = tuple(_read(v, inner[0] if inner else Any, own, f"{at}[{i}]") for i, v in enumerate(values))
    if hint is float and values in ("inf", "-inf", "nan"):
        values = float(values)
    require(
        bool(known) or fits(values, hint), f"stored config: {at} ({values!r:.40}) is of another type than its field"
    )
    return values


def _is_dataclass(cls: Any) -> bool:
    return dataclasses.is_dataclass(cls)


def _read_dataclass(values, known: Mapping[str, Any], own: Mapping[str, type], at: str):
    require(isinstance(values, Mapping), f"stored config: {at or 'it'} ({values!r:.40}) must be an object")
    kind = values.get("type", next(iter(known)))
    require(isinstance(kind, str), f"stored config: {at}.type ({kind!r:.40}) must be a name".replace(" .", " "))
    cls: Any = known.get(kind) or (own.get(kind) if len(known) > 1 else None)
    if not _is_dataclass(cls):
        raise ConfigError(
            f"stored config has a {kind!r}, which is none of {', '.join(known)}: "
            "give the config file that defines it (--config FILE.py)"
        )
    words = {**old_words(cls), **field_types(cls)}
    unknown = [k for k in values if k != "type" and k not in words]
    if unknown:
        raise ConfigError(f"stored config has the key {unknown[0]!r}, which {kind} of this version does not know")
    prefix = f"{at}." if at else ""
    by_name = getattr(cls, "BY_NAME", ())
    for k, v in values.items():
        named = isinstance(v, str) and k in words and variants(words[k])
        require(not named or k in by_name, f"stored config: {prefix}{k} ({v!r:.40}) must be an object")
    fields = {k: _read(v, words[k], own, prefix + k) for k, v in values.items() if k != "type"}
    try:
        return cls(**fields)
    except ConfigError:
        raise
    except Exception as error:  # values of the right types that no check of the class was written for
        raise ConfigError(f"stored config: {at or kind} cannot be built: {error}") from error


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config as JSON, whole or not at all."""
    storage.write_text(path, json.dumps(to_dict(config), indent=2) + "\n")


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
