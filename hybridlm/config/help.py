# SPDX-License-Identifier: Apache-2.0
"""The help: everything that can be overridden, what it means and its value now."""

import contextlib
import io
import textwrap
import warnings

import tyro

from hybridlm.config import Config
from hybridlm.config.find import config_families, pod_names
from hybridlm.config.keys import hint_of, leaf_paths, value_at, variant_paths
from hybridlm.fields import type_name, variants

WIDTH = 100
"""Columns of what is laid out here."""


def help_text(config: Config, prog: str) -> str:
    """All overrides with their meanings, types and values."""
    return (_by_tyro(config, prog) or _plain(config)) + "\n" + _choices(config)


def _choices(config: Config) -> str:
    """What is chosen by name, keys of the same alternatives together."""
    keys_of: dict[tuple[str, ...], list[str]] = {}
    for key in variant_paths(config):
        keys_of.setdefault(tuple(variants(hint_of(config, key))), []).append(key)
    lines = ["Chosen by name, their fields then as --KEY.FIELD; with the choice, --help shows those fields:"]
    for names, keys in keys_of.items():
        for key in keys:
            value = value_at(config, key)
            lines.append(f"  --{key} (now {'None' if value is None else type(value).__name__})")
        lines.append(_wrapped(f"one of {', '.join(names)}", 8))
    symbol = next((key for key in variant_paths(config) if key.startswith("model.blocks.")), None)
    if symbol is not None:
        lines.append("A new symbol for model.pattern is chosen in the same way: --model.blocks.E=MoE")
    return "\n".join(lines) + "\n"


def names_in_columns() -> str:
    """The configs that --config knows by name: single ones, families with their sizes, settings for pods."""
    families = config_families()
    single = "  ".join(name for name, sizes in families.items() if not sizes)
    pods: dict[str, list[str]] = {}
    for name in pod_names():
        stem, _, pod = name.partition(":")
        pods.setdefault(stem, []).append(pod)
    sized = {name: sizes for name, sizes in families.items() if sizes}
    width = 4 + max(map(len, [*sized, *pods]), default=0)
    lines = ["configs:", _wrapped(single, 2), "families, as NAME:SIZE:"]
    lines += [_row(name, sizes, width) for name, sizes in sized.items()]
    lines += ["set for pods, as NAME:POD:", *(_row(name, found, width) for name, found in pods.items())]
    return "\n".join(lines)


def _row(name: str, words: list[str], width: int) -> str:
    return _wrapped("  ".join(words), width, f"  {name}".ljust(width))


def _wrapped(text: str, indent: int, first: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=first or " " * indent, subsequent_indent=" " * indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _by_tyro(config: Config, prog: str) -> str | None:
    """The help as tyro prints it; None for a config with blocks of its own, which no annotation names."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tyro.cli(
                type(config), default=config, args=["--help"], prog=prog,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff), use_underscores=True,
            )  # fmt: skip
        except SystemExit as done:
            return None if done.code else out.getvalue()
    return None


def _plain(config: Config) -> str:
    """A line for each override."""
    keys = leaf_paths(config)
    return "".join(f"  --{k} ({type_name(hint_of(config, k))}; now: {value_at(config, k)})\n" for k in keys)
