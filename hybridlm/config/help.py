# SPDX-License-Identifier: Apache-2.0
"""The help: everything that can be overridden, what it means and its value now."""

import contextlib
import io
import warnings

import tyro

from hybridlm.config import Config
from hybridlm.config.keys import hint_of, leaf_paths, value_at, variant_paths
from hybridlm.fields import type_name, variants


def help_text(config: Config, prog: str) -> str:
    """All overrides with their meanings, types and values."""
    lines = ["", "Chosen by name, their fields then as --KEY.FIELD:"]
    for key in variant_paths(config):
        value = value_at(config, key)
        now = "None" if value is None else type(value).__name__
        lines.append(f"  --{key} {{{','.join(variants(hint_of(config, key)))}}} (now: {now})")
    return (_by_tyro(config, prog) or _plain(config)) + "\n".join(lines) + "\n"


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


def _plain(config: Config) -> str:
    """A line for each override."""
    keys = leaf_paths(config)
    return "".join(f"  --{k} ({type_name(hint_of(config, k))}; now: {value_at(config, k)})\n" for k in keys)
