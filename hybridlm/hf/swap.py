# SPDX-License-Identifier: Apache-2.0
"""A folder replaced as a whole: the new one is written beside it and takes its place in one step.

Linux and macOS exchange the names of two folders at once, on file systems that can (ext4, xfs, btrfs, tmpfs, APFS).
Where that cannot be (some network file systems), the old folder is moved out of the way first, and for a moment there
is none of its name; the next call puts it back if that was the last thing that happened.
"""

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_EXCHANGE = 2
"""The flag, on both systems."""
NEW, OLD = ".{}.hybridlm-new-", ".{}.hybridlm-old"
"""Names, in the folder above, of what is written (a random end follows) and of what is in the way."""
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class CannotSwap(Exception):
    """The folder cannot be replaced as a whole: it is a mount point, or the one above it cannot be written."""


@contextmanager
def replaced(folder: Path, is_old: Callable[[str], bool]) -> Iterator[Path]:
    """A new, empty folder to write into, which takes the place of `folder` once the block has ended.

    What is in `folder` stays, but for names that are written anew and those for which is_old(name) holds. At each
    moment `folder` is the old one or the new one, whole. CannotSwap, before the block, where that cannot be done.
    """
    folder = folder.resolve()
    _clear(folder)
    if folder.is_mount() or Path.cwd().is_relative_to(folder):
        raise CannotSwap(f"{folder} is a mount point, or this process works in it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=NEW.format(folder.name), dir=folder.parent))
    except OSError as error:
        raise CannotSwap(f"{folder.parent} cannot be written: {error.strerror}") from error
    held = os.open(new, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield new
        _take_along(folder, new, is_old)
        _to_disk(new)
        _exchange(new, folder)
    finally:
        os.close(held)
        shutil.rmtree(new, ignore_errors=True)  # what was written, or what it has replaced


def _take_along(folder: Path, new: Path, is_old: Callable[[str], bool]) -> None:
    """The other files of the old folder in the new one, as second names of the same files where that can be."""
    there = folder.is_dir()
    new.chmod(folder.stat().st_mode & 0o7777 if there else 0o777 & ~_mask())
    for entry in sorted(folder.iterdir()) if there else ():
        if (new / entry.name).exists() or is_old(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source, target) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _to_disk(folder: Path) -> None:
    """What was written, on the disk: a name that is there after a power cut has its content."""
    for path in [*folder.iterdir(), folder]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _exchange(new: Path, folder: Path) -> None:
    """Gives `new` the name of `folder`, whose content, if it has any, is then found under the name of `new`."""
    with suppress(OSError):
        os.rename(new, folder)  # where it is not there, or empty
        return
    if _exchanged(new, folder):
        return
    old = folder.with_name(OLD.format(folder.name))
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchanges two names at once; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "renameat2", None) or getattr(library, "renameatx_np", None)  # Linux, macOS
    if function is None:
        return False
    if function(-1, os.fsencode(a), -1, os.fsencode(b), _EXCHANGE) == 0:  # -1: no folder, the paths are absolute
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(b))


def _clear(folder: Path) -> None:
    """Puts right what a call that was killed has left beside the folder."""
    old = folder.with_name(OLD.format(folder.name))
    if old.is_dir() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)
    pattern = f"{NEW.format(glob.escape(folder.name))}*"
    for left in folder.parent.glob(pattern) if folder.parent.is_dir() else ():
        with suppress(OSError):
            number = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another call writes there
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(number)


def _mask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
