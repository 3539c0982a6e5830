# SPDX-License-Identifier: Apache-2.0
"""Files and objects: found, read by ranges, written whole or not at all."""

import base64
import contextlib
import errno
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from hybridlm.errors import ConfigError
from hybridlm.storage.paths import CLIENTS, as_path, bucket_of, files_of, in_bucket, scheme_of, told

CHECK_SECONDS = 30.0
"""How long `check` waits for an answer."""
ASKED_AT_ONCE = 16
PART_BYTES = 32 << 20
"""Of a large object, this much is asked for at once, several such parts at a time."""
_MAGIC = re.compile(r"[*?\[]")


def check(path: Path, argument: str, *, write: bool = False) -> None:
    """ConfigError, one line with the name of the argument, where the bucket of a path cannot be read or written.

    Nothing is asked of a folder of this machine. write: a small object is written and removed, too.
    """
    if not in_bucket(path):
        return
    bucket, client = bucket_of(path)[0], CLIENTS[str(scheme_of(path))]
    name = f"{scheme_of(path)}://{bucket}"

    def ask() -> None:
        with told(path):
            client.ask(files_of(path), bucket)
        if write:
            probe = path / f".probe-{uuid.uuid4().hex}"
            write_bytes(probe, b"")
            remove(probe)

    try:
        _within(CHECK_SECONDS, ask)
        return
    except FileNotFoundError:
        problem = f"there is no bucket {name}"
    except TimeoutError:
        problem = f"{name} does not answer within {CHECK_SECONDS:.0f} s"
    except OSError as error:
        problem = f"{name} cannot be {'written' if write else 'read'}: {error.strerror}"
        if isinstance(error, PermissionError) or "redential" in problem:
            problem += f"; {client.credentials}"
    raise ConfigError(f"{argument} ({os.fspath(path)}): {problem}")


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Runs an action, whose error is raised here; TimeoutError where it takes longer, and it is left to itself."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="bucket", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    if errors:
        raise errors[0]


def find(pattern: str) -> tuple[Path, list[Path]]:
    """(folder that the pattern starts in, files, sorted) of a file's name, a folder or a glob pattern in a bucket.

    The folder is the file's own, the one named, or those before the first one with a wildcard, which may be `**`.
    """
    path = as_path(pattern)
    with told(path):
        files, name = files_of(path), os.fspath(path)
        if not _MAGIC.search(name):
            if files.isfile(name):
                return path.parent, [path]
            return path, _named(path, files.find(name))
        plain = re.split(r"/(?=[^/]*[*?\[])", name, maxsplit=1)[0]
        found = files.glob(name, detail=True)
        return as_path(plain), _named(path, [at for at, info in found.items() if info["type"] == "file"])


def _named(path: Path, found: Iterable[str]) -> list[Path]:
    """fsspec's names, which lack the scheme, as paths; objects of no name, which stand for folders, are none."""
    return [as_path(f"{scheme_of(path)}://{name}") for name in sorted(found) if not name.endswith("/")]


def version(path: Path) -> tuple[int, int | str]:
    """(bytes, what changes with the content) of a file: its time of change in ns; of an object, its tag."""
    if not in_bucket(path):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    with told(path):
        info = files_of(path).info(os.fspath(path))
    if info["type"] != "file":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    return info["size"], _tag(info)


def listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Name, relative to a folder in a bucket -> (bytes, tag) of each object under it. A tag is what the store says of
    the content: `md5:HEX` where it says that, else something that changes with it."""
    with told(folder):
        found = files_of(folder).find(os.fspath(folder), detail=True)
    start = len("/".join(filter(None, bucket_of(folder)))) + 1
    return {name[start:]: (info["size"], _tag(info)) for name, info in found.items() if name[start:]}


def _tag(info: dict) -> str:
    entity = str(info.get("ETag", "")).strip('"')
    if re.fullmatch("[0-9a-f]{32}", entity):  # of an S3 object that was sent in one part
        return f"md5:{entity}"
    if digest := info.get("md5Hash"):  # of a GCS object that is none of several
        return f"md5:{base64.b64decode(digest).hex()}"
    return str(entity or info.get("crc32c") or info.get("etag") or info.get("LastModified"))


def exists(path: Path) -> bool:
    """Whether there is a file or folder; an object, or one under it."""
    if not in_bucket(path):
        return path.exists()
    with told(path):
        return files_of(path).exists(os.fspath(path))


def names(folder: Path) -> list[str]:
    """Names of the files and folders in a folder, sorted; none where it is not there."""
    if not in_bucket(folder):
        return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    try:
        with told(folder):
            found = files_of(folder).ls(os.fspath(folder), detail=False)
    except FileNotFoundError:
        return []
    return sorted({name.rstrip("/").rpartition("/")[2] for name in found} - {""})


def versions(paths: Iterable[Path]) -> list[tuple[int, int | str]]:
    """`version` of each, in order; buckets are asked many questions at a time."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(version, paths))


def size(path: Path) -> int:
    """Bytes of a file."""
    return version(path)[0]


def open_file(path: Path, buffering: int = -1) -> BinaryIO:
    """A file of this machine, open for reading bytes. OSError for a pipe or a device, which could be waited for for
    ever, or never end. buffering: as `open` takes it."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = os.fstat(number).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "it is a pipe or a device, no file", os.fspath(path))
        return os.fdopen(number, "rb", buffering)
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: Path) -> bytes:
    """The whole content."""
    if not in_bucket(path):
        with open_file(path) as file:
            return file.read()
    with told(path):
        return files_of(path).cat_file(os.fspath(path))


def read_range(path: Path, start: int, stop: int) -> bytearray | bytes:
    """The bytes [start, stop); of an object these alone are sent, large ranges in several parts at a time."""
    if not in_bucket(path):
        with open_file(path) as file:
            file.seek(start)
            return file.read(stop - start)
    starts = list(range(start, stop, PART_BYTES))
    stops = [min(at + PART_BYTES, stop) for at in starts]
    with told(path):
        if len(starts) < 2:
            return files_of(path).cat_file(os.fspath(path), start=start, end=stop) if stop > start else b""
        parts = files_of(path).cat_ranges([os.fspath(path)] * len(starts), starts, stops, on_error="raise")
    return b"".join(parts)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file, open for reading bytes; an object is read ahead, a seek reads anew from there."""
    if not in_bucket(path):
        with open_file(path) as file:
            yield file
        return
    with told(path), files_of(path).open(os.fspath(path), "rb") as file:
        yield file


def make_folder(path: Path) -> None:
    """Makes a folder of this machine and those above it; in a bucket there are none to be made."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing bytes, which is there when the block ends, whole, or is as it was where the block fails.

    A folder gets it by a rename of PATH.part, a bucket as an object sent in parts.
    """
    if not in_bucket(path):
        part = path.with_name(f"{path.name}.part")
        try:
            with part.open("wb") as file:
                yield file
            part.replace(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                error.filename = os.fspath(path)  # of a write, the system does not say it
            raise
        return
    with told(path):
        file = files_of(path).open(os.fspath(path), "wb", autocommit=False)
        try:
            yield file
            file.close()
            file.commit()
        except BaseException:
            file.discard()
            file.closed = True  # or it would be sent after all when it is collected
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; an object by one request."""
    if in_bucket(path):
        with told(path):
            files_of(path).pipe_file(os.fspath(path), content)
        return
    with writing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """write_bytes of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def copy(source: Path, target: Path) -> None:
    """Copies a file between folders and buckets, whole or not at all."""
    with reading(source) as read, writing(target) as written:
        shutil.copyfileobj(read, written, PART_BYTES)


def append(path: Path, content: bytes) -> None:
    """Appends to a small file; an object, of which this process is the only writer, is written anew."""
    if not in_bucket(path):
        with path.open("ab") as file:
            file.write(content)
        return
    try:
        before = read_bytes(path)
    except FileNotFoundError:
        before = b""
    write_bytes(path, before + content)


def remove(path: Path) -> None:
    """Removes a file or an object."""
    if not in_bucket(path):
        path.unlink()
        return
    with told(path):
        files_of(path).rm_file(os.fspath(path))
