# SPDX-License-Identifier: Apache-2.0
"""A config as a tree: its nodes by name, the types that a node can have, its JSON form."""

import dataclasses
import math
import types
import typing
from typing import Any


def children(node) -> dict[str, Any]:
    if dataclasses.is_dataclass(node):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return dict(node) if isinstance(node, dict) else {}


def variants(hint) -> dict[str, Any]:
    """What a field of dataclass type can be set to by name: {'Rope': Rope, 'None': ...}."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if union else (hint,)
    classes = {t.__name__: t for t in options if dataclasses.is_dataclass(t)}
    return classes | ({"None": types.NoneType} if classes and types.NoneType in options else {})


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
