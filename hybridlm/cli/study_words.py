# SPDX-License-Identifier: Apache-2.0
"""What the words of studies have in common: options of their own beside those of a config and of a task."""

from collections.abc import Sequence
from typing import Any

from hybridlm.cli.probe import chosen
from hybridlm.errors import require

OF_CONFIG = ("data", "mesh", "model", "optim", "run")
"""Sections of a config that words with a dot may be of; all others are of the task."""


def split(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(options of the command, those of a config, those of the task), each with its values."""
    own: list[str] = []
    of_config: list[str] = []
    of_task: list[str] = []
    into = own
    for word in words:
        if word.startswith("--"):
            section, dot, _ = word[2:].partition("=")[0].partition(".")
            into = own if not dot else of_config if section in OF_CONFIG else of_task
        into.append(word)
    return own, of_config, of_task


def check_settable(words: Sequence[str], may: Sequence[str], what: str) -> None:
    """ConfigError for a word of a config that is none of these names, or of what ends in a dot."""
    for word in words:
        if not word.startswith("--"):
            continue
        key = word[2:].partition("=")[0]
        fits = any(key.startswith(name) if name.endswith(".") else key == name for name in may)
        names = ", ".join(name + "KEY" if name.endswith(".") else name for name in may)
        require(fits, f"--{key} is no option of {what}: of a config, {names} are")


def task_of(name: str, words: Sequence[str]) -> Any:
    """The task of a name, with the numbers that words give it; what is read of held-out text is none."""
    from hybridlm.probes import PROBES

    require(name in PROBES, f"--task ({name}): no task of that name: there are {', '.join(PROBES)}")
    return chosen([name], words)[name]
