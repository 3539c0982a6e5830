# SPDX-License-Identifier: Apache-2.0
"""Leaves of a config replaced by words of the command line or a mapping."""

import contextlib
import dataclasses
import io
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm import storage
from hybridlm.config import Config
from hybridlm.config.keys import choice, hint_of, is_choice, resolve, variant
from hybridlm.config.tree import children
from hybridlm.errors import ConfigError, cut
from hybridlm.fields import type_name, variants


def override(config: Config, overrides: Sequence[str] | Mapping[str, Any]) -> Config:
    """The config with leaves replaced; see load_config."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides ({overrides!r}) must be a list of words or a mapping, not one string")
    pairs = list(_mapping_words(overrides)) if isinstance(overrides, Mapping) else list(_split_words(overrides))
    config = _with_published(config, pairs)
    whole = []
    for key, values in sorted(pairs, key=lambda pair: pair[0].count(".")):  # whole blocks first, outermost first
        if len(values) == 1 and is_choice(config, key, values[0]):
            config = _rebuild(config, {resolve(config, key): choice(config, key, values[0])})
            whole.append((key, values))
    leaves = {}
    for key, values in pairs:
        if (key, values) not in whole:
            path = resolve(config, key)
            leaves[path] = _parse(config, key, path, values)
    return _rebuild(config, leaves)


def _with_published(config: Config, pairs: list[tuple[str, list[str]]]) -> Config:
    """The config with the model, and where it has one the tokenizer, of the checkpoint folder that init.hf names."""
    given = [values for key, values in pairs if key == "init.hf" and values]
    if given:
        config = dataclasses.replace(config, init=dataclasses.replace(config.init, hf=given[-1][-1]))
    if not config.init.hf or config.init.hf == "None":
        return config
    from hybridlm.hf.checkpoint import open_checkpoint, tokenizer_of

    folder = storage.as_path(config.init.hf)
    published = open_checkpoint(folder).config
    kept = {name: getattr(config.model, name) for name in ("compute_dtype", "remat", "remat_span", "unroll")}
    data = config.data
    if data.tokenizer == "byte" and not any(key == "data.tokenizer" for key, _ in pairs):
        data = dataclasses.replace(data, tokenizer=tokenizer_of(folder, published))
    return dataclasses.replace(config, model=dataclasses.replace(published, **kept), data=data)


def _mapping_words(overrides: Mapping[str, Any]):
    for key, value in overrides.items():
        values = value if isinstance(value, tuple | list) else [value]
        yield key, [str(v) for v in values]


def _split_words(words: Sequence[str]):
    """(key, values) of `--key=value`, `--key value ...`, `--flag` and `key=value`."""
    pairs: list[tuple[str, list[str]]] = []
    for word in words:
        is_key = word.startswith("--") and len(word) > 2
        if is_key or (not pairs and "=" in word) or (pairs and "=" in word and "." in word.split("=")[0]):
            key, equals, value = word.removeprefix("--").partition("=")
            pairs.append((key, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            raise ConfigError(f"argument {word!r} is no override: write --section.key=value")
    return pairs


def _parse(config: Config, key: str, path: tuple[str, ...], values: list[str]):
    """The words of one leaf as its annotated type, by tyro's rules."""
    import tyro

    hint = hint_of(config, key)
    if variants(hint):
        variant(config, key, " ".join(values))
    if typing.get_origin(hint) is dict:
        raise ConfigError(f"--{'.'.join(path)} holds blocks: set --{'.'.join(path)}.SYMBOL.FIELD=VALUE")
    if hint is bool and not values:
        values = ["True"]
    if hint is bool:
        values = [{"true": "True", "false": "False"}.get(v.lower(), v) for v in values]
    if hint is int and len(values) == 1:
        values = [values[0].replace("_", "")]
    if not values or (values == [""] and hint is not str):
        raise ConfigError(f"--{'.'.join(path)} needs a value: {type_name(hint)}")
    holder = dataclasses.make_dataclass("Leaf", [("value", hint)])
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            words = ["--value", *values] if len(values) != 1 else [f"--value={values[0]}"]
            value: Any = tyro.cli(holder, args=words, config=(tyro.conf.FlagConversionOff,)).value
    except SystemExit:
        raise ConfigError(f"--{'.'.join(path)}: {cut(' '.join(values), 100)!r} is not {type_name(hint)}") from None
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"--{'.'.join(path)}: nan is not a number to compute with")
    return value


def _rebuild(node, leaves: dict[tuple[str, ...], Any], prefix: str = ""):
    """The tree with the leaves replaced, each dataclass built (and checked) once, children first."""
    if not leaves:
        return node
    if () in leaves:
        return leaves[()]
    below = children(node)
    by_child: dict[str, dict] = {}
    for path, value in leaves.items():
        by_child.setdefault(path[0], {})[path[1:]] = value
    new = {name: _rebuild(below.get(name), sub, f"{prefix}{name}.") for name, sub in by_child.items()}
    if isinstance(node, dict):
        return {**node, **new}
    try:
        return dataclasses.replace(node, **new)
    except ConfigError as error:  # a block does not know its own symbol
        raise ConfigError(f"{prefix}{error}" if prefix.count(".") > 1 else str(error)) from None
