# SPDX-License-Identifier: Apache-2.0
"""Configs from names and files, overrides from the command line, and the JSON form stored with a run."""

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from hybridlm.config import Config
from hybridlm.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent


def config_folders() -> list[Path]:
    """Where configs are found by name: ./configs, the checkout's, and those inside an installed package."""
    return [Path("configs"), PACKAGE.parent / "configs", PACKAGE / "configs"]


def config_names() -> list[str]:
    """Names of all configs that can be given to --config; those of a file with sizes are `file:size`."""
    files: dict[str, Path] = {}
    for folder in reversed(config_folders()):
        files |= {f.stem: f for f in folder.glob("*.py") if not f.name.startswith("_")}
    names = []
    for stem, file in files.items():
        text = file.read_text(encoding="utf-8", errors="replace")
        if "def config(size" in text:
            names += [f"{stem}:{size}" for size in _sizes(file)]
        elif "def config(" in text:
            names.append(stem)
    return sorted(names)


def load_config(name_or_path: str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """The config of a name (`hybrid_tiny`, `mamba2:130m`) or a file (`path/to/file.py`), with leaves replaced.

    overrides: command-line words (`["--model.d_model=512", "--optim.lr", "3e-4"]`, the dashes optional) or a mapping
    from dotted names to values (`{"model.d_model": 512}`). Raises ConfigError, one line, for an unknown name or key, a
    value of the wrong type, and a combination that cannot work.
    """
    return override(read_config(name_or_path), overrides)


def read_config(name_or_path: str) -> Config:
    """The config of a name or a file as it stands; a file with sizes is followed by `:` and one of them."""
    stem, colon, size = name_or_path.partition(":")
    path = Path(stem)
    if path.suffix != ".py":
        files = [f for folder in config_folders() if (f := folder / f"{stem}.py").is_file()]
        if not files:
            names = config_names()
            near = difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"no config named {name_or_path!r}: {hint}known: {', '.join(names)}")
        path = files[0]
    if not path.is_file():
        raise ConfigError(f"no config file {stem}")
    try:
        module = _module(path)
        sizes = getattr(module, "SIZES", None)
        if sizes is not None and size not in sizes:
            raise ConfigError(
                f"size ({size or 'none'}) must be one of {', '.join(sizes)}: {path.stem}:{next(iter(sizes))}"
            )
        if sizes is None and colon:
            raise ConfigError(f"size ({size}) is given, but this config has no sizes")
        config = module.config() if sizes is None else module.config(size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # whatever a user's file raises becomes one line that names the file
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: config() returned {type(config).__name__}, not hybridlm.config.Config")
    return config


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(f"_hybridlm_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _sizes(path: Path) -> list[str]:
    """Sizes of a config file; none where it cannot be read (asking for it says why)."""
    try:
        return list(_module(path).SIZES)
    except Exception:
        return []


# Overrides ----------------------------------------------------------------------------------------------------------


def override(config: Config, overrides: Sequence[str] | Mapping[str, Any]) -> Config:
    """The config with leaves replaced; see load_config."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides ({overrides!r}) must be a list of words or a mapping, not one string")
    pairs = list(_mapping_words(overrides)) if isinstance(overrides, Mapping) else list(_split_words(overrides))
    config = _with_published(config, pairs)
    variants = []
    for key, values in sorted(pairs, key=lambda pair: pair[0].count(".")):  # whole blocks first, outermost first
        if len(values) == 1 and values[0][:1].isupper() and _variants(_hint(config, key)):
            config = _rebuild(config, {_resolve(config, key): _variant(config, key, values[0])()})
            variants.append((key, values))
    leaves = {}
    for key, values in pairs:
        if (key, values) not in variants:
            path = _resolve(config, key)
            leaves[path] = _parse(config, key, path, values)
    return _rebuild(config, leaves)


def _with_published(config: Config, pairs: list[tuple[str, list[str]]]) -> Config:
    """The config with the model, and where it has one the tokenizer, of the checkpoint folder that init.hf names."""
    given = [values for key, values in pairs if key == "init.hf" and values]
    if given:
        config = dataclasses.replace(config, init=dataclasses.replace(config.init, hf=given[-1][-1]))
    if not config.init.hf or config.init.hf == "None":
        return config
    from hybridlm.hf.load import read_model

    folder = Path(config.init.hf).expanduser()
    published = read_model(folder)[1]
    kept = {name: getattr(config.model, name) for name in ("compute_dtype", "remat")}
    data = config.data
    if data.tokenizer == "byte" and (folder / "tokenizer.json").is_file():
        data = dataclasses.replace(data, tokenizer=str(folder))
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


def _children(node) -> dict[str, Any]:
    if dataclasses.is_dataclass(node):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return dict(node) if isinstance(node, dict) else {}


def leaf_paths(config: Config) -> list[str]:
    """Dotted names of everything that can be overridden."""

    def walk(node, prefix):
        for name, child in _children(node).items():
            path = f"{prefix}{name}"
            if dataclasses.is_dataclass(child) or isinstance(child, dict):
                yield from walk(child, path + ".")
            else:
                yield path

    return list(walk(config, ""))


def _unknown(config: Config, key: str) -> ConfigError:
    near = difflib.get_close_matches(key, leaf_paths(config), n=1, cutoff=0.6)
    tail = [p for p in leaf_paths(config) if p.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = f"did you mean --{(near or tail)[0]}?" if near or tail else "see --help for all keys"
    return ConfigError(f"unknown key --{key}: {hint}")


def _resolve(config: Config, key: str) -> tuple[str, ...]:
    """Path of a dotted key; `-` and `_` are alike but for block symbols. A new block symbol is allowed last."""
    node, path = config, []
    parts = key.split(".")
    for i, part in enumerate(parts):
        children = _children(node)
        name = part if part in children else part.replace("-", "_")
        if name not in children:
            if isinstance(node, dict) and i == len(parts) - 1 and len(part) == 1:
                return (*path, part)
            raise _unknown(config, key)
        path.append(name)
        node = children[name]
    return tuple(path)


def _hint(config: Config, key: str):
    """Annotation of the field that a key names."""
    node, hint = config, Config
    for name in _resolve(config, key):
        hint = typing.get_args(hint)[1] if isinstance(node, dict) else typing.get_type_hints(type(node))[name]
        node = _children(node).get(name)
    return hint


def _variants(hint) -> dict[str, Any]:
    """What a field of dataclass type can be set to by name: {'Rope': Rope, 'None': ...}."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    options = typing.get_args(hint) if union else (hint,)
    classes = {t.__name__: t for t in options if dataclasses.is_dataclass(t)}
    return classes | ({"None": types.NoneType} if classes and types.NoneType in options else {})


def _variant(config: Config, key: str, name: str):
    variants = _variants(_hint(config, key))
    if name not in variants:
        path = "--" + ".".join(_resolve(config, key))
        raise ConfigError(f"{path}: {name!r} is none of {', '.join(variants)}; a field is set as {path}.FIELD=VALUE")
    return variants[name]


def _type_name(hint) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    args = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_type_name(a) for a in args)
    if typing.get_origin(hint) is tuple:
        if args[-1] is Ellipsis:
            return f"any number of {_type_name(args[0])}"
        return f"{len(args)} values, each {_type_name(args[0])}"
    names = {types.NoneType: "None", bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _parse(config: Config, key: str, path: tuple[str, ...], values: list[str]):
    """The words of one leaf as its annotated type, by tyro's rules."""
    hint = _hint(config, key)
    if _variants(hint):
        _variant(config, key, " ".join(values))
    if typing.get_origin(hint) is dict:
        raise ConfigError(f"--{'.'.join(path)} holds blocks: set --{'.'.join(path)}.SYMBOL.FIELD=VALUE")
    if hint is bool and not values:
        values = ["True"]
    if hint is bool:
        values = [{"true": "True", "false": "False"}.get(v.lower(), v) for v in values]
    if hint is int and len(values) == 1:
        values = [values[0].replace("_", "")]
    if not values or (values == [""] and hint is not str):
        raise ConfigError(f"--{'.'.join(path)} needs a value: {_type_name(hint)}")
    holder = dataclasses.make_dataclass("Leaf", [("value", hint)])
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            words = ["--value", *values] if len(values) != 1 else [f"--value={values[0]}"]
            value = tyro.cli(holder, args=words, config=(tyro.conf.FlagConversionOff,)).value
    except SystemExit:
        raise ConfigError(f"--{'.'.join(path)}: {' '.join(values)!r} is not {_type_name(hint)}") from None
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"--{'.'.join(path)}: nan is not a number to compute with")
    return value


def _rebuild(node, leaves: dict[tuple[str, ...], Any], prefix: str = ""):
    """The tree with the leaves replaced, each dataclass built (and checked) once, children first."""
    if not leaves:
        return node
    if () in leaves:
        return leaves[()]
    children = _children(node)
    by_child: dict[str, dict] = {}
    for path, value in leaves.items():
        by_child.setdefault(path[0], {})[path[1:]] = value
    new = {name: _rebuild(children.get(name), sub, f"{prefix}{name}.") for name, sub in by_child.items()}
    if isinstance(node, dict):
        return {**node, **new}
    try:
        return dataclasses.replace(node, **new)
    except ConfigError as error:  # a block does not know its own symbol
        raise ConfigError(f"{prefix}{error}" if prefix.count(".") > 1 else str(error)) from None


def help_text(config: Config, prog: str) -> str:
    """All overrides with their defaults, as tyro prints them."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        tyro.cli(
            type(config), default=config, args=["--help"], prog=prog,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff), use_underscores=True,
        )  # fmt: skip
    lines = ["", "Chosen by name, their fields then as --KEY.FIELD:"]
    for key in variant_paths(config):
        node = config
        for name in key.split("."):
            node = _children(node)[name]
        now = "None" if node is None else type(node).__name__
        lines.append(f"  --{key} {{{','.join(_variants(_hint(config, key)))}}} (now: {now})")
    return out.getvalue() + "\n".join(lines) + "\n"


def variant_paths(config: Config) -> list[str]:
    """Dotted names of fields whose value is one of several dataclasses, or none."""

    def walk(node, prefix):
        for name, child in _children(node).items():
            if len(_variants(_hint(config, prefix + name))) > 1:
                yield prefix + name
            yield from walk(child, f"{prefix}{name}.")

    return list(walk(config, ""))


# JSON ---------------------------------------------------------------------------------------------------------------


def to_dict(config) -> dict[str, Any]:
    """A config (or a part of it) as plain JSON values; a dataclass that is one of several carries its `type`."""

    def encode(value):
        if dataclasses.is_dataclass(value):
            return {"type": type(value).__name__} | {k: encode(v) for k, v in _children(value).items()}
        if isinstance(value, dict):
            return {k: encode(v) for k, v in value.items()}
        if isinstance(value, tuple):
            return [encode(v) for v in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return encode(config)


def from_dict(values: Mapping[str, Any], hint=Config):
    """The inverse of to_dict. Raises ConfigError for a key that this version does not know."""
    variants = _variants(hint)
    if variants:
        if values is None:
            return None
        kind = values.get("type", next(iter(variants)))
        if kind not in variants:
            raise ConfigError(f"stored config has a {kind!r} where this version knows {', '.join(variants)}")
        cls = variants[kind]
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
        for name in dict.fromkeys([*_children(a), *_children(b)]):
            x, y = _children(a).get(name), _children(b).get(name)
            if x == y:
                continue
            if _children(x) and _children(y) and type(x) is type(y):
                yield from walk(x, y, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", (x, y)

    return dict(walk(old, new, ""))
