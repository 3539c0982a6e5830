# SPDX-License-Identifier: Apache-2.0
"""Documents out of files: the embedded corpus, text files, JSON lines, Parquet and FASTA, one document at a time.

A new format is a row of FORMATS and its reader.

A document is `(id, text)`. Its id is the file's name relative to the folder that the pattern starts in, in posix form
(`json/decoder.py`), followed by `:index` where a file holds many (`a.jsonl:16`). Ids and their order do not depend on
where the folder lies, so every machine derives the same split from them.

Memory: JSON lines are read line by line, FASTA record by record and Parquet row group by row group; a text file is one
document and is read whole.
"""

import codecs
import dataclasses
import glob
import hashlib
import importlib
import os
import string
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hybridlm import storage
from hybridlm.data.identity import content_hashes
from hybridlm.data.records import explained, lines, no_field, not_utf8, parse_record, text_of
from hybridlm.data.template import Rendered
from hybridlm.errors import ConfigError

BINARY_SUFFIXES = frozenset((
    ".7z", ".array_record", ".arrow", ".avro", ".bin", ".bz2", ".db", ".docx", ".feather", ".gif", ".gz", ".h5",
    ".hdf5", ".jpeg", ".jpg", ".msgpack", ".npy", ".npz", ".orc", ".pdf", ".pickle", ".pkl", ".png", ".pt", ".pth",
    ".safetensors", ".sqlite", ".tar", ".tfrecord", ".tgz", ".xlsx", ".xz", ".zip", ".zst",
))  # fmt: skip
"""What is refused by its name rather than read as text."""
EMBEDDED_SKIPS = frozenset({"site-packages", "dist-packages", "__pycache__"})


class Document(NamedTuple):
    """One document: a stable id and its text, which always encodes as UTF-8."""

    id: str
    text: str


class Conversation(NamedTuple):
    """A document of several turns: a stable id, and what a chat template made of them."""

    id: str
    rendered: Rendered

    @property
    def text(self) -> str:
        """All of it."""
        return self.rendered.text


class SourceFile(NamedTuple):
    """A file, of this machine or in a bucket, and its name relative to the folder that its pattern starts in."""

    path: Path
    name: str


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file, known by its name."""

    suffixes: tuple[str, ...]
    """Ends of names in lower case."""
    named: str
    """The most usual of them, for errors that say what can be read."""
    read: Callable[[SourceFile, str], Iterator[Document]]
    """(file, data.text_key) -> its documents. ConfigError for content that is not of this kind; OSError as it comes."""
    needs: tuple[str, ...] = ()
    """Modules that the reader imports, of packages that not everybody has."""
    records: bool = False
    """Documents are fields of records, which may hold conversations, too."""


@dataclasses.dataclass
class Source:
    """An ordered list of files; iterating reads their documents. Those without a character are left out, and counted
    in `empty`, and so are conversations without an answer, in `unanswered`.

    `lenient` (the embedded corpus, whose files nobody chose) skips files that are unreadable or not UTF-8 and counts
    them in `skipped`; otherwise such a file raises ConfigError.
    """

    files: tuple[SourceFile, ...]
    text_key: str = "text"
    lenient: bool = False
    records: Callable[[SourceFile, str], Iterator] | None = None
    """Reads files of records, see `Format.records`, in the place of their formats' readers; None: they do."""
    skipped: int = 0
    empty: int = 0
    unanswered: int = 0

    def __iter__(self) -> Iterator[Document | Conversation]:
        self.skipped = self.empty = self.unanswered = 0
        for file in self.files:
            try:
                for document in _read_file(file, self.text_key, self.records):
                    if not document.text:
                        self.empty += 1
                    elif isinstance(document, Conversation) and not document.rendered.answers:
                        self.unanswered += 1
                    else:
                        yield document
            except ConfigError:
                if not self.lenient:
                    raise
                self.skipped += 1

    def identity(self, memory: Path | None = None) -> list[tuple[str, str]]:
        """(name, hash of the bytes) of each file: what a cache of their content is keyed by. memory: see
        `content_hashes`."""
        hashes = content_hashes([file.path for file in self.files], memory)
        return [(file.name, digest) for file, digest in zip(self.files, hashes)]


def open_source(
    path: str | tuple[str, ...] | list[str], *, text_key: str = "text", argument: str = "data.path",
    records: Callable[[SourceFile, str], Iterator] | None = None,
) -> Source:  # fmt: skip
    """The source behind `path`: "" is the embedded corpus, else a file, a folder or a glob pattern, or several of them.

    Raises ConfigError if a pattern matches nothing or a file is of a kind that cannot be read; `argument` is the name
    that the message gives to `path`; records: see Source.
    """
    patterns = [path] if isinstance(path, str) else list(path)
    patterns = [pattern for pattern in patterns if pattern]
    if not patterns:
        return Source(_embedded_files(), text_key, lenient=True)
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        for file in match(pattern, argument):
            found.setdefault(os.path.abspath(file.path), file)
    files = tuple(sorted(found.values(), key=lambda file: (file.name, str(file.path))))
    for file in files:
        _check_kind(file.path)
    return Source(files, text_key, records=records)


def in_validation(document_id: str, fraction: float) -> bool:
    """Whether a document is held out: a hash of its id alone decides, so every machine and every run agrees."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def embedded_folder() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _embedded_files() -> tuple[SourceFile, ...]:
    base = embedded_folder()
    files = [file for file in _walk(base) if file.path.suffix == ".py"]
    if not files:
        raise ConfigError(
            f"data.path is empty and this Python has no standard library source under {base}: set data.path"
        )
    return tuple(sorted(files, key=lambda file: file.name))


def _walk(base: Path) -> Iterator[SourceFile]:
    for folder, subfolders, names in os.walk(base):
        subfolders[:] = [name for name in subfolders if name not in EMBEDDED_SKIPS and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield SourceFile(path, path.relative_to(base).as_posix())


def match(pattern: str, argument: str) -> list[SourceFile]:
    """The files that a file, a folder or a glob pattern names; ConfigError where there is none."""
    expanded = storage.as_path(pattern)
    if storage.in_bucket(expanded):
        files = _match_in_bucket(expanded, pattern, argument)
    elif expanded.is_file():
        return [SourceFile(expanded, expanded.name)]
    elif expanded.is_dir():
        files = list(_walk(expanded))
    else:
        plain = []  # the folders before the first one with a wildcard
        for part in expanded.parts[:-1]:
            if glob.has_magic(part):
                break
            plain.append(part)
        base = Path(*plain)
        matches = (Path(match) for match in glob.glob(str(expanded), recursive=True))
        files = [SourceFile(match, match.relative_to(base).as_posix()) for match in matches if match.is_file()]
    if not files:
        raise ConfigError(f"{argument} ({pattern!r}): no file matches")
    return files


def _match_in_bucket(path: Path, pattern: str, argument: str) -> list[SourceFile]:
    storage.check(path, argument)
    try:
        base, found = storage.find(pattern)
    except OSError as error:
        raise ConfigError(f"{argument} ({pattern!r}) cannot be listed: {error.strerror}") from error
    named = [SourceFile(file, file.relative_to(base).as_posix()) for file in found]
    return [file for file in named if not any(part.startswith(".") for part in file.name.split("/"))]


def _format_of(path: Path) -> Format | None:
    """The format that a file's name says; None: text."""
    return next((row for row in FORMATS if path.name.lower().endswith(row.suffixes)), None)


def _check_kind(path: Path) -> None:
    row = _format_of(path)
    for module in row.needs if row else ():
        try:
            importlib.import_module(module)
        except ImportError as error:
            package = module.partition(".")[0]
            told = f"{path}: reading {path.suffix.lower()} needs {package}: pip install {package}"
            raise ConfigError(told) from error
    if row is None and path.suffix.lower() in BINARY_SUFFIXES:
        raise ConfigError(f'{path}: unknown suffix "{path.suffix}"; {_readable()}')


def _readable() -> str:
    first, last = ", ".join(row.named for row in FORMATS[:-1]), FORMATS[-1].named
    return f"give UTF-8 text (.txt, .md, .py, ...), {first} or {last}"


def _read_file(file: SourceFile, text_key: str, records: Callable | None) -> Iterator[Document | Conversation]:
    row = _format_of(file.path)
    try:
        read = records if records and row and row.records else row and row.read
        yield from read(file, text_key) if read else _read_text(file)
    except OSError as error:  # gzip.BadGzipFile has no strerror
        raise ConfigError(f"cannot read {file.path}: {error.strerror or error}") from error


def _read_text(file: SourceFile) -> Iterator[Document]:
    raw = storage.read_bytes(file.path)
    if b"\0" in raw[:4096]:
        raise ConfigError(f"{file.path} is not text (it holds zero bytes); {_readable()}")
    try:
        yield Document(file.name, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(not_utf8(file.path, error)) from error


def _read_json_lines(file: SourceFile, text_key: str) -> Iterator[Document]:
    index = 0
    for number, raw in lines(file.path):
        if raw.strip():
            where = f"line {number} of {file.path}"
            yield Document(f"{file.name}:{index}", text_of(parse_record(raw, where, number == 1), where, text_key))
            index += 1


SEQUENCE = string.ascii_letters.encode() + b"*-."
"""What a line of a FASTA record is made of: letters of bases or residues, a stop, gaps."""


def _read_fasta(file: SourceFile, text_key: str) -> Iterator[Document]:
    """A document a record: its sequence, lines joined, as it is written; what stands behind `>` is no part of it."""
    index, parts = -1, []
    for number, raw in lines(file.path):
        line = raw.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else raw.strip()
        if line.startswith(b">"):
            if index >= 0:
                yield Document(f"{file.name}:{index}", b"".join(parts).decode("ascii"))
            index, parts = index + 1, []
        elif line and not line.startswith(b";"):  # a comment
            if index < 0:
                raise ConfigError(f"line {number} of {file.path} stands before the first record (no > line)")
            if strange := line.translate(None, SEQUENCE):
                raise ConfigError(f"line {number} of {file.path} holds {chr(strange[0])!a}, no letter of a sequence")
            parts.append(line)
    if index >= 0:
        yield Document(f"{file.name}:{index}", b"".join(parts).decode("ascii"))


def _read_parquet(file: SourceFile, text_key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    with explained(file.path), storage.reading(file.path) as stored, pyarrow.parquet.ParquetFile(stored) as table:
        schema = table.schema_arrow
        if text_key not in schema.names:
            raise ConfigError(no_field(str(file.path), text_key, schema.names))
        kind = schema.field(text_key).type
        value_kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if str(value_kind) not in ("string", "large_string", "string_view"):
            raise ConfigError(f'{file.path}: column "{text_key}" is {kind}, not a string')
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            try:
                texts = batch.column(0).to_pylist()
            except UnicodeDecodeError as error:
                raise ConfigError(not_utf8(_first_not_utf8(batch.column(0), index, file.path), error)) from error
            for text in texts:
                if text is None:
                    raise ConfigError(f'row {index + 1} of {file.path}: column "{text_key}" is null, not a string')
                yield Document(f"{file.name}:{index}", text)
                index += 1


def _first_not_utf8(column, index: int, path: Path) -> str:
    """Which row of a batch, whose first one has this number, is no text."""
    for number, value in enumerate(column, start=index + 1):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return f"row {number} of {path}"
    return str(path)


FORMATS = (
    Format(
        (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz", ".ndjson.gz"),
        ".jsonl, .jsonl.gz",
        _read_json_lines,
        records=True,
    ),
    Format((".jsonl.zst", ".json.zst", ".ndjson.zst"), ".jsonl.zst", _read_json_lines, ("pyarrow",), records=True),
    Format((".parquet",), ".parquet", _read_parquet, ("pyarrow.parquet",), records=True),
    Format((".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz"), ".fa, .fasta, .fa.gz", _read_fasta),
)
"""Every format but text, which a file of any other name is taken for."""
