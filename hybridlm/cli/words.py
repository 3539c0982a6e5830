# SPDX-License-Identifier: Apache-2.0
"""Words of a command line that has options of its own beside those of a config."""

from hybridlm import storage
from hybridlm.errors import require


def split_overrides(words: list[str], own: str | None = None) -> tuple[list[str], list[str]]:
    """(words of the command, overrides of the config): an override's name has a dot, and its values follow it.

    own: names that begin so are the command's all the same, "--cache.".
    """
    mine: list[str] = []
    overrides: list[str] = []
    into = mine
    for word in words:
        if word.startswith("--"):
            mine_too = own is not None and word.startswith(own)
            into = overrides if "." in word.partition("=")[0] and not mine_too else mine
        into.append(word)
    return mine, overrides


def split_section(words: list[str], section: str) -> tuple[list[str], list[str]]:
    """(words of a section of the config, the others): `--mesh.tensor=2`, or `--mesh.tensor` with its values behind."""
    of_section: list[str] = []
    others: list[str] = []
    into = others
    for word in words:
        if word.startswith("--"):
            into = of_section if word.startswith(f"--{section}.") else others
        into.append(word)
    return of_section, others


def check_figure(text: str) -> None:
    """ConfigError where --figure names no kind of drawing that `study.figures.as_file` makes."""
    require(text.endswith((".png", ".svg")), f"--figure ({text}) must end in .png or .svg")


def check_file(text: str | None, name: str) -> None:
    """ConfigError, before anything is computed, where no file can be written; None is none."""
    if text is None:
        return
    file = storage.as_path(text)
    folder = file.parent
    require(storage.in_bucket(folder) or folder.is_dir(), f"{name} ({text}): there is no folder {folder}")
    require(storage.in_bucket(folder) or not file.is_dir(), f"{name} ({text}) is a folder: name a file in it")
    storage.check(folder, name, write=True)


def check_apart(files: dict[str, str | None]) -> None:
    """ConfigError where two options (name: file) name one file; None is none."""
    by_file: dict[str, str] = {}
    for name, text in files.items():
        if text is not None:
            first = by_file.setdefault(str(storage.absolute(storage.as_path(text))), name)
            require(first == name, f"{first} and {name} ({text}) are one file: name two")
