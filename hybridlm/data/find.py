# SPDX-License-Identifier: Apache-2.0
"""Whether patterns name text or tokens, and which files and folders of tokens they name."""

import dataclasses
import glob
from collections.abc import Sequence
from pathlib import Path

from hybridlm import storage
from hybridlm.data.formats import match
from hybridlm.data.shards import MANIFEST, SUFFIX
from hybridlm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Found:
    """Tokens that patterns name; none of either: the patterns name text."""

    shards: tuple[Path, ...] = ()
    """Folders of hybridlm tokenize."""
    files: tuple[Path, ...] = ()
    """`.bin` files."""

    @property
    def tokens(self) -> bool:
        """Whether there are any."""
        return bool(self.shards or self.files)


def find(patterns: Sequence[str], argument: str) -> Found:
    """What patterns name. ConfigError where some of it is text and some tokens, or a pattern matches nothing."""
    shards: dict[Path, None] = {}
    files: dict[Path, None] = {}
    text = None
    for pattern in filter(None, patterns):
        folders = _folders(pattern)
        shards.update(dict.fromkeys(folders))
        if folders:
            continue
        for path in _files(pattern, argument):
            if path.suffix == SUFFIX or path.name == MANIFEST or path.suffix == ".index":
                shards[path.parent] = None
            elif path.suffix == ".bin":
                files[path] = None
            elif path.suffix != ".idx":
                text = text or path
    found = Found(tuple(sorted(shards)), tuple(sorted(files)))
    if found.tokens and text is not None:
        first = (found.shards + found.files)[0]
        mixed = ", with data.weights" if argument == "data.path" else ""
        raise ConfigError(f"{argument} names text ({text}) and tokens ({first}): give them as two patterns{mixed}")
    return _copied(found)


def _copied(found: Found) -> Found:
    """Tokens are mapped: those in a bucket are copied to this machine, unless their copies are there."""
    try:
        shards = [storage.mirror(folder) if storage.in_bucket(folder) else folder for folder in found.shards]
        files = [_copied_file(file) if storage.in_bucket(file) else file for file in found.files]
    except OSError as error:
        raise ConfigError(f"cannot copy {error.filename} to this machine: {error.strerror}") from error
    return Found(tuple(shards), tuple(files))


def _copied_file(file: Path) -> Path:
    beside = file.with_suffix(".idx").name
    there = storage.names(file.parent)
    return storage.mirror(file.parent, [file.name, *([beside] if beside in there else [])]) / file.name


def _folders(pattern: str) -> list[Path]:
    """Folders with a manifest of shards."""
    path = storage.as_path(pattern)
    if storage.in_bucket(path):  # of patterns, `find` sees the manifests themselves
        there = storage.names(path) if not glob.has_magic(pattern) else []
        return [path] if MANIFEST in there and any(name.endswith(SUFFIX) for name in there) else []
    matches = [path] if path.is_dir() else [Path(match) for match in glob.glob(str(path), recursive=True)]
    return [match for match in matches if (match / MANIFEST).is_file() and any(match.glob(f"*{SUFFIX}"))]


def _files(pattern: str, argument: str) -> list[Path]:
    """Files; of Megatron's `.bin` and `.idx` the common part of their names, too."""
    prefix = storage.as_path(pattern)
    pair = [prefix.with_name(prefix.name + end) for end in (".bin", ".idx")]
    if not glob.has_magic(pattern) and not storage.exists(prefix) and all(map(storage.exists, pair)):
        return pair[:1]
    return [file.path for file in match(pattern, argument)]
