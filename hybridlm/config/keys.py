# SPDX-License-Identifier: Apache-2.0
"""What can be overridden: dotted keys, the values that they name and the types that those have."""

import dataclasses
import difflib
import typing
from typing import Any

from hybridlm.config import Config
from hybridlm.config.tree import children, old_words, walk
from hybridlm.errors import ConfigError
from hybridlm.fields import field_types, variants


def leaf_paths(config: Config) -> list[str]:
    """Dotted names of everything that can be overridden."""
    return [path for path, node in walk(config) if not (dataclasses.is_dataclass(node) or isinstance(node, dict))]


def variant_paths(config: Config) -> list[str]:
    """Dotted names of fields whose value is one of several dataclasses, or none."""
    return [path for path, _ in walk(config) if len(variants(hint_of(config, path))) > 1]


def _unknown(config: Config, key: str) -> ConfigError:
    known = [*leaf_paths(config), *variant_paths(config)]
    known += [f"{path}.{word}" for path, node in walk(config) for word in old_words(type(node))]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    tail = [p for p in known if p.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = f"did you mean --{(near or tail)[0]}?" if near or tail else "see --help for all keys"
    return ConfigError(f"unknown key --{key}: {hint}")


def resolve(config: Config, key: str) -> tuple[str, ...]:
    """Path of a dotted key; `-` and `_` are alike but for block symbols. A new block symbol is allowed last."""
    node: Any = config
    path: list[str] = []
    parts = key.split(".")
    for i, part in enumerate(parts):
        below = children(node)
        name = part if part in below else part.replace("-", "_")
        if name in old_words(type(node)) and i == len(parts) - 1:
            return (*path, name)
        if name not in below:
            if isinstance(node, dict) and i == len(parts) - 1 and len(part) == 1:
                return (*path, part)
            raise _unknown(config, key)
        path.append(name)
        node = below[name]
    return tuple(path)


def hint_of(config: Config, key: str):
    """Annotation of the field that a key names."""
    node: Any = config
    hint: Any = Config
    for name in resolve(config, key):
        if isinstance(node, dict):
            hint = typing.get_args(hint)[1]
        else:
            kind: Any = type(node)
            hint = {**old_words(kind), **field_types(kind)}[name]
        node = children(node).get(name)
    return hint


def value_at(config: Config, key: str):
    """The value at a dotted name as leaf_paths and variant_paths give it."""
    node = config
    for name in key.split(".") if key else ():
        node = children(node)[name]
    return node


def is_choice(config: Config, key: str, word: str) -> bool:
    """Whether a key is set to a class by its name."""
    return _takes_names(config, key) or (word[:1].isupper() and bool(variants(hint_of(config, key))))


def choice(config: Config, key: str, word: str):
    """The value of the class that the word names: the word itself where the class above builds its parts by name."""
    return word if _takes_names(config, key) else variant(config, key, word)()


def _takes_names(config: Config, key: str) -> bool:
    *above, name = resolve(config, key)
    holder = value_at(config, ".".join(above))
    return name in getattr(type(holder), "BY_NAME", ())


def variant(config: Config, key: str, name: str) -> type:
    """The class that a key can be set to by its name. ConfigError where there is none of that name."""
    known = variants(hint_of(config, key))
    if name not in known:
        path = "--" + ".".join(resolve(config, key))
        raise ConfigError(f"{path}: {name!r} is none of {', '.join(known)}; a field is set as {path}.FIELD=VALUE")
    return known[name]
