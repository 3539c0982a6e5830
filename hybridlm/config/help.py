# SPDX-License-Identifier: Apache-2.0
"""The help: everything that can be overridden, what it means and its value now."""

import contextlib
import io

import tyro

from hybridlm.config import Config
from hybridlm.config.keys import hint_of, variant_paths
from hybridlm.config.tree import children, variants


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
            node = children(node)[name]
        now = "None" if node is None else type(node).__name__
        lines.append(f"  --{key} {{{','.join(variants(hint_of(config, key)))}}} (now: {now})")
    return out.getvalue() + "\n".join(lines) + "\n"
