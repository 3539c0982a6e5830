# SPDX-License-Identifier: Apache-2.0
"""Paths of folders and buckets, the clients that speak to buckets, and their errors in one line."""

import contextlib
import errno
import functools
import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from hybridlm.errors import ConfigError


class Client(NamedTuple):
    """What speaks to the buckets of one scheme."""

    module: str
    """Also the name of its package."""
    extra: str
    """Of this project, that brings it."""
    credentials: str
    """How it is given them."""
    ask: Callable[[Any, str], object]
    """(file system, bucket): looks for one object in the bucket."""
    defaults: dict[str, Any]
    """Of its fsspec file system, unless the user's fsspec settings say otherwise. Listings are not kept: other hosts,
    and other libraries of this one, write to the same bucket."""


CLIENTS = {
    "s3": Client(
        "s3fs", "s3", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        lambda files, bucket: files.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1),
        {
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 4, "mode": "standard"},
            },
        },
    ),
    "gs": Client(
        "gcsfs", "gs", "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
        lambda files, bucket: files.call("GET", "b/{}/o", bucket, maxResults=1, json_out=True),
        {"use_listings_cache": False},
    ),
}  # fmt: skip
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/|$)")
_ANY_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def as_path(text: str | os.PathLike) -> Path:
    """The path that a user's text names; a path is given back as it is.

    ConfigError for a scheme that is not known, for a bucket without a name and where the client of a bucket is not
    installed.
    """
    text = os.fspath(text)
    match = _ANY_SCHEME.match(text)
    if match is None:
        return Path(text).expanduser()
    scheme = match[1].lower()
    rest = text[match.end() :]
    if scheme == "file":
        if not rest.startswith("/"):
            raise ConfigError(f"{text} names a host: a folder of this machine is file:///FOLDER")
        return Path(unquote(rest))
    if scheme not in CLIENTS:
        known = ", ".join(f"{name}://" for name in ("file", *CLIENTS))
        raise ConfigError(f"{text}: paths of {scheme}:// are not known, but folders, {known}")
    if not _BUCKET.match(rest):
        raise ConfigError(f"{text} names no bucket: give {scheme}://BUCKET/FOLDER")
    _prepare(scheme)
    from etils import epath

    return epath.Path(f"{scheme}://{rest}")


def scheme_of(path: Path) -> str | None:
    """The key in CLIENTS of a path in a bucket; None of a path on this machine."""
    match = _ANY_SCHEME.match(os.fspath(path))
    return match[1] if match else None


def in_bucket(path: Path) -> bool:
    """Whether a path that as_path gave lies in a bucket."""
    return scheme_of(path) is not None


def absolute(path: Path) -> Path:
    """The path, of a folder with its links followed: the same file has the same."""
    return path if in_bucket(path) else path.resolve()


def bucket_of(path: Path) -> tuple[str, str]:
    """(bucket, key) of a path in a bucket."""
    bucket, _, key = os.fspath(path).partition("://")[2].partition("/")
    return bucket, key.strip("/")


@functools.cache
def _prepare(scheme: str) -> None:
    """Imports the client of a scheme and sets its defaults, once."""
    client = CLIENTS[scheme]
    os.environ.setdefault("EPATH_USE_TF", "false")  # etils would reach buckets through TensorFlow where that is there
    try:
        importlib.import_module(client.module)
    except ImportError as error:
        needs = f"paths of {scheme}:// need {client.module} ({error}): pip install 'hybridlm[{client.extra}]'"
        raise ConfigError(needs) from error
    import fsspec

    settings = fsspec.config.conf.setdefault({"gs": "gcs"}.get(scheme, scheme), {})
    for name, value in client.defaults.items():
        settings.setdefault(name, value)


def files_of(path: Path):
    """The fsspec file system of a path's bucket, the one that etils uses."""
    from etils.epath import backend

    return backend.fsspec_backend.fs(path)


_CLIENTS_OF = ("botocore", "aiobotocore", "s3fs", "gcsfs", "google", "aiohttp", "fsspec")


def reason(error: BaseException) -> str | None:
    """What the client of a bucket says, in one line; None for an error that is not of one."""
    seen = []
    at: BaseException | None = error
    while at is not None:
        seen.append(at)
        at = at.__cause__ or at.__context__
    if not any(type(e).__module__.partition(".")[0] in _CLIENTS_OF for e in seen):
        return None
    return " ".join(str(seen[0]).split())[:200] or type(seen[0]).__name__


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """OSError with a one-line strerror and a file's name, for whatever the client of a path's bucket raises inside.

    Errors of this machine (its disk is full) and those that are told already pass as they are.
    """
    try:
        yield
    except Exception as error:
        why = reason(error)
        ours = isinstance(error, OSError) and error.errno is not None and why is None
        if ours or _ANY_SCHEME.match(str(getattr(error, "filename", ""))):
            raise
        if why is None and not isinstance(error, OSError):
            raise
        raise _os_error(error, os.fspath(path)) from error


def _os_error(error: Exception, name: str) -> OSError:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
    match error:
        case FileNotFoundError():
            return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        case FileExistsError():
            return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        case PermissionError():
            return PermissionError(errno.EACCES, f"access denied ({text})", name)
    return OSError(errno.EIO, text, name)
