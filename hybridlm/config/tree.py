# SPDX-License-Identifier: Apache-2.0
"""A config as a tree: its nodes by name, the types that a node can have, its JSON form."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any


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


def old_words(cls: type) -> Mapping[str, Any]:
    """What a class's constructor takes beside its fields: words of earlier versions, and their types."""
    return getattr(cls, "OLD_WORDS", {})


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
