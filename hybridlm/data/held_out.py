# SPDX-License-Identifier: Apache-2.0
"""The held-out sets that data.val_path names: a word each, NAME=PATTERN or a pattern that gives it its name."""

import re
from collections.abc import Sequence

from hybridlm.data.formats import FORMATS
from hybridlm.errors import require

SUFFIXES = (*(suffix for row in FORMATS for suffix in row.suffixes), ".txt", ".text", ".md", ".bin", ".idx")
"""What is no part of a name."""
NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)", re.DOTALL)
WILDCARDS = re.compile(r"\[[^\]]*\]|[*?]+")


def held_out_sets(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Name -> glob patterns of each set, in the order of the words.

    A word is NAME=PATTERN, and words of one name are one set; or a pattern, named after its file or folder, and after
    the folders above, too, where others are called alike. A relative path with a `=` before its first `/` is written
    with `./` in front. ConfigError where no name tells two patterns apart.
    """
    sets: dict[str, tuple[str, ...]] = {}
    plain = []
    for word in dict.fromkeys(words):
        named = NAMED.fullmatch(word)
        if named:
            sets[named[1]] = (*sets.get(named[1], ()), named[2])
        else:
            plain.append(word)
    own = {pattern: name for pattern, name in zip(plain, _names(plain, taken=set(sets)), strict=True)}
    ordered = [(named[1] if (named := NAMED.fullmatch(word)) else own[word]) for word in words]
    of_plain = {name: (pattern,) for pattern, name in own.items()}
    return {name: sets.get(name) or of_plain[name] for name in dict.fromkeys(ordered)}


def patterns_of(words: Sequence[str]) -> tuple[str, ...]:
    """The patterns of all sets."""
    return tuple(pattern for patterns in held_out_sets(words).values() for pattern in patterns)


def _names(patterns: Sequence[str], taken: set[str]) -> list[str]:
    """As many of each pattern's last parts as tell it from all others."""
    parts = [_parts(pattern) for pattern in patterns]
    names = ["/".join(p[-1:]) for p in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        alike = {name for name in names if names.count(name) > 1 or name in taken}
        names = ["/".join(p[-depth:]) if name in alike else name for p, name in zip(parts, names, strict=True)]
    for pattern, name in zip(patterns, names, strict=True):
        others = names.count(name) > 1 or name in taken
        require(not others, f"data.val_path ({pattern}): another set is called {name!r}, too: give NAME={pattern}")
    return names


def _parts(pattern: str) -> list[str]:
    """The parts of a path that say something, wildcards and the suffix of the last aside."""
    *folders, last = (pattern.partition("://")[2] or pattern).rstrip("/").split("/")
    suffix = max((s for s in SUFFIXES if last.lower().endswith(s)), key=len, default="")
    parts = [*folders, last[: len(last) - len(suffix)]]
    words = [re.sub(r"[^\w.-]+", "-", WILDCARDS.sub("", part)).strip("-_.") for part in parts]
    return [word for word in words if word] or ["val"]
