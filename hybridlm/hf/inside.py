# SPDX-License-Identifier: Apache-2.0
"""Files of a published folder: those that lie in it, and nothing else.

A folder from elsewhere may hold links to files of this machine, pipes and devices. None is followed or opened, with one
exception: in a snapshot of the Hugging Face cache, every file is a link to a blob of the same repository.
"""

import stat
from pathlib import Path

from hybridlm import storage
from hybridlm.errors import ConfigError, require


def has_file(folder: Path, name: str) -> bool:
    """Whether a published folder has a file; ConfigError where what it has of that name is none to be read."""
    file = folder / name
    if storage.in_bucket(folder):
        return file.is_file()
    try:
        kind = file.lstat().st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    if stat.S_ISLNK(kind):
        require(
            _is_blob(folder, file),
            f"{file} is a link: links in published folders are not followed, put the file itself there",
        )
        return file.is_file()
    require(stat.S_ISREG(kind), f"{file} is no file")
    return True


def check_file(file: Path) -> Path:
    """The file, which lies in its published folder; ConfigError where it is missing or none to be read."""
    require(has_file(file.parent, file.name), f"{file} is missing")
    return file


def files_like(folder: Path, *patterns: str) -> list[Path]:
    """The files of a published folder whose names match, sorted; ConfigError as for has_file, but folders are left
    out."""
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    is_link = lambda file: not storage.in_bucket(folder) and file.is_symlink()
    return [file for file in sorted(found) if (is_link(file) or not file.is_dir()) and has_file(folder, file.name)]


def _is_blob(folder: Path, file: Path) -> bool:
    """Whether a link is one of the Hugging Face cache: models--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH."""
    snapshot = folder.resolve()
    repository = snapshot.parent.parent
    cached = snapshot.parent.name == "snapshots" and "--" in repository.name
    return cached and file.resolve().parent == repository / "blobs"
