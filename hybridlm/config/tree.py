# SPDX-License-Identifier: Apache-2.0
"""A config as a tree: its nodes by name, the types that a node can have, its JSON form."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from hybridlm.errors import require


def children(node) -> dict[str, Any]:
    """The nodes right below one: fields of a dataclass, entries of a dict, nothing of a leaf."""
    if dataclasses.is_dataclass(node):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return dict(node) if isinstance(node, dict) else {}


def walk(node, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, node) of everything below a node, a parent before its children."""
    for name, child in children(node).items():
        yield f"{path}{name}", child
        yield from walk(child, f"{path}{name}.")


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """The types of a class's fields by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def old_words(cls: type) -> Mapping[str, Any]:
    """What a class's constructor takes beside its fields: words of earlier versions, and their types."""
    return getattr(cls, "OLD_WORDS", {})


def is_union(hint) -> bool:
    """`A | B` or Union[A, B]."""
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def variants(hint) -> dict[str, Any]:
    """What a field of dataclass type can be set to by name: {'Rope': Rope, 'None': ...}."""
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    classes = {t.__name__: t for t in options if dataclasses.is_dataclass(t)}
    return classes | ({"None": types.NoneType} if classes and types.NoneType in options else {})


def choices(hint) -> tuple | None:
    """The values of a field that has a fixed set of them (a Literal, perhaps or None); None: any."""
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    if not any(typing.get_origin(option) is typing.Literal for option in options):
        return None
    return tuple(value for o in options for value in ((None,) if o is types.NoneType else typing.get_args(o)))


def check_choices(config) -> None:
    """ConfigError for the first value in a config that is none of those of its field."""
    for path, node in [("", config), *walk(config)]:
        if not dataclasses.is_dataclass(node):
            continue
        for name, hint in field_types(type(node)).items():
            allowed = choices(hint)
            value = getattr(node, name)
            if allowed is not None:
                place = f"{path}.{name}".removeprefix(".")
                require(value in allowed, f"{place} ({value!r}) must be one of {', '.join(map(str, allowed))}")


def to_dict(config) -> dict[str, Any]:
    """A config (or a part of it) as plain JSON values; a dataclass that is one of several carries its `type`."""

    def encode(value):
        if dataclasses.is_dataclass(value):
            return {"type": type(value).__name__} | {k: encode(v) for k, v in children(value).items()}
        if isinstance(value, dict):
            return {k: encode(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return [encode(v) for v in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return encode(config)
