# SPDX-License-Identifier: Apache-2.0
"""Values of config classes, checked where they enter: each is one of its field's type, and a number to compute with.

Every config class calls `check_fields` first of all in its `__post_init__`, so a config file, the command line, a
stored config and a published one are held to the same.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from hybridlm.errors import ConfigError, cut, require

MOST = "most"
"""Key of a field's metadata: the largest whole number that it takes; infinite where its class says it."""
WHOLE = 2**31 - 1
"""That of other fields: what counters and indices on devices hold."""
REAL = float.fromhex("0x1.fffffep127")
"""The largest float32."""


@functools.cache
def field_types(cls: type) -> Mapping[str, Any]:
    """The types of a class's fields by name."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def is_union(hint) -> bool:
    """`A | B` or Union[A, B]."""
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


@functools.cache
def variants(hint) -> Mapping[str, Any]:
    """What a field of dataclass type can be set to by name: {'Rope': Rope, 'None': ...}."""
    options = typing.get_args(hint) if is_union(hint) else (hint,)
    classes: dict[str, Any] = {t.__name__: t for t in options if isinstance(t, type) and dataclasses.is_dataclass(t)}
    return classes | ({"None": types.NoneType} if classes and types.NoneType in options else {})


def type_name(hint) -> str:
    """What a value of an annotation is, in words."""
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    args = typing.get_args(hint)
    if is_union(hint):
        return " or ".join(type_name(a) for a in args)
    if typing.get_origin(hint) is tuple:
        if args[-1] is Ellipsis:
            return f"any number of {type_name(args[0])}"
        return f"{len(args)} values, each {type_name(args[0])}"
    names = {types.NoneType: "None", bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def fits(value, hint) -> bool:
    """Whether a value is one of an annotation; of those that are not plain, any is."""
    if is_union(hint):
        return any(fits(value, option) for option in typing.get_args(hint))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        expected = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(expected) and all(map(fits, value, expected))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, types.NoneType) else True


def check_fields(config: Any, at: str = "") -> None:
    """ConfigError, one line, for the first field of a config, or of one inside it, whose value cannot be used.

    A value has to be of its field's type. Whole numbers lie within WHOLE or what the field's metadata say (MOST),
    numbers are float32 and finite, infinite only in fields whose default is; a text holds no NUL. at: put before names.
    """
    for field in dataclasses.fields(config):
        cls: Any = type(config)
        hint = _types(cls).get(field.name, Any)
        _check(getattr(config, field.name), hint, f"{at}{field.name}", field)


def check_positive(config, names: tuple[str, ...]) -> None:
    """ConfigError, naming the field and its value, where one of these fields is neither None nor above 0."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, f"{name} ({value}) must be positive")


@functools.cache
def _types(cls: type) -> Mapping[str, Any]:
    """field_types; none where the names in annotations of a user's class cannot be found any more."""
    try:
        return field_types(cls)
    except (NameError, TypeError):
        return {}


def _check(value, hint, place: str, field: dataclasses.Field) -> None:
    is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
    named, of_names = variants(hint), typing.get_origin(hint) is dict
    if is_config:  # of several, a user's own class may be another one
        right = len(named) != 1 or isinstance(value, tuple(named.values()))
    elif of_names:
        right = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    else:
        right = fits(value, hint) if not named else value is None and "None" in named
    if not right:
        raise ConfigError(f"{place} ({_shown(value)}) must be {type_name(hint)}")
    if is_config:
        check_fields(value, f"{place}.")
    elif of_names:
        for key, below in value.items():
            _check(below, typing.get_args(hint)[1], f"{place}.{key}", field)
    else:
        for leaf in _leaves(value):
            _check_leaf(leaf, place, field)


def _check_leaf(value, place: str, field: dataclasses.Field) -> None:
    if isinstance(value, int):
        most = field.metadata.get(MOST, WHOLE)
        require(-most <= value <= most, f"{place} ({_shown(value)}) must be at most {most}")
    elif isinstance(value, float):
        require(not math.isnan(value), f"{place} (nan) is not a number to compute with")
        infinite = any(isinstance(leaf, float) and math.isinf(leaf) for leaf in _leaves(field.default))
        require(infinite or not math.isinf(value), f"{place} ({value}) must be finite")
        require(math.isinf(value) or abs(value) <= REAL, f"{place} ({value}) must be at most {REAL:.3g}, a float32")
    elif isinstance(value, str):
        require("\0" not in value, f"{place} ({_shown(value)}) must not hold a NUL character")


def _leaves(value) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _shown(value) -> str:
    if isinstance(value, int) and value.bit_length() > 256:  # more digits than Python writes
        return f"a number of {value.bit_length()} bits"
    return cut(repr(value), 60)
