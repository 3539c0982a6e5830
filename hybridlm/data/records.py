# SPDX-License-Identifier: Apache-2.0
"""Records in files: lines, whatever they are compressed with, JSON objects and the text in them."""

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hybridlm import storage
from hybridlm.errors import ConfigError


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file and their numbers from 1 on, decompressed by what its name says."""
    with storage.reading(path) as stored, _decompressed(path, stored) as raw_lines:
        numbered = enumerate(raw_lines, start=1)
        while True:
            try:
                number, raw = next(numbered, (0, b""))
            except (EOFError, zlib.error) as error:
                raise ConfigError(f"{path} is not a whole gzip file ({error})") from error
            except OSError as error:
                if path.suffix.lower() != ".zst":
                    raise
                reason = str(error).splitlines()[0]
                raise ConfigError(f"{path} is not a whole zstandard file ({reason})") from error
            if not number:
                return
            yield number, raw


def _decompressed(path: Path, stored: BinaryIO):
    """The lines of an open file as a context manager that iterates over them, decompressed by what its name says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(stored, "rb")
    return _zstandard(stored) if suffix == ".zst" else contextlib.nullcontext(stored)


@contextlib.contextmanager
def _zstandard(stored: BinaryIO) -> Iterator[io.BufferedReader]:
    import pyarrow

    with pyarrow.CompressedInputStream(stored, "zstd") as stream:
        yield io.BufferedReader(stream, 1 << 20)


def parse_record(raw: bytes, where: str, first: bool) -> dict:
    """The object of a line; ConfigError, one line that says where, for what is none. first: of the file."""
    try:
        record = json.loads(raw.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(not_utf8(where, error)) from error
    except RecursionError as error:
        raise ConfigError(f"{where} nests deeper than can be read; give one flat JSON object a line") from error
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}); give one JSON object a line") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where} is a JSON {type(record).__name__}, not an object; give one JSON object a line")
    return record


def text_of(record: dict, where: str, text_key: str) -> str:
    """The text of a record; ConfigError, one line that says where, for one without."""
    if text_key not in record:
        raise ConfigError(no_field(where, text_key, record))
    text = record[text_key]
    if not isinstance(text, str):
        raise ConfigError(
            f'{where}: field "{text_key}" is {"null" if text is None else type(text).__name__}, not a string'
        )
    return _encodable(text)


def _encodable(text: str) -> str:
    """JSON may spell half a surrogate pair, which is no character: it becomes the replacement character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """What Arrow says of a file, in one line."""
    import pyarrow

    try:
        yield
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} is not a readable Parquet file ({reason})") from error


def no_field(where: str, text_key: str, fields) -> str:
    """What to say of a record without the field."""
    names = ", ".join(f'"{name}"' for name in fields) or "none"
    return f'{where}: no field "{text_key}" (fields are {names}); set data.text_key'


def not_utf8(where, error: UnicodeDecodeError) -> str:
    """What to say of bytes that are no text."""
    byte = error.object[error.start]
    return f"{where} is not UTF-8 text (byte 0x{byte:02x} at offset {error.start}); convert it to UTF-8"
