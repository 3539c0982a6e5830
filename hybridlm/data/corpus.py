# SPDX-License-Identifier: Apache-2.0
"""A tokenised corpus on disk: built once, then memory-mapped.

An entry of the cache is a folder `CACHE_DIR/KEY/` with, for each split, `SPLIT.tokens` (uint16 or uint32) and
`SPLIT.offsets` (int64, where each document starts), and `stats.json`. The key is a hash of the tokenizer, the split and
every file's name, size and modification time; the fingerprint in the stats is a hash of the tokens themselves, so that
machines whose copies differ in time alone agree.

An entry is written in a temporary folder and renamed into place when whole; a lock lets one process build what several
ask for, and where locks do not work the first rename wins. An interrupted build leaves nothing that is ever read.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hybridlm.data.bigram import BigramCounter, cross_entropy_bits
from hybridlm.data.config import DataConfig
from hybridlm.data.formats import Source, open_source
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer
from hybridlm.errors import ConfigError

try:
    import fcntl
except ImportError:  # not a POSIX system: no lock, the first rename wins
    fcntl = None

FORMAT = 1
SPLITS = ("train", "val")
BATCH_CHARACTERS = 4 << 20
BATCH_DOCUMENTS = 4096
LOG_EVERY_SECONDS = 30.0
ABANDONED_SECONDS = 3600.0

logger = logging.getLogger("hybridlm.data")


@dataclasses.dataclass(frozen=True)
class Split:
    """The documents of one split, memory-mapped on first use; pickles as its path, not as its content."""

    folder: Path
    name: str
    dtype: str

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Ids of all documents in a row, [tokens]."""
        return _map(self.folder / f"{self.name}.tokens", self.dtype)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """Where each document starts in `tokens`, and the end: int64 [documents + 1]."""
        return _map(self.folder / f"{self.name}.offsets", "int64")

    def __reduce__(self):
        return Split, (self.folder, self.name, self.dtype)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: its splits, its tokenizer and its counts.

    `stats` is JSON: for "train" and "val" the counts `documents`, `bytes`, `tokens` (bos and eos included), `pairs`
    (targets), `bytes_per_token`, `bytes_per_pair` and a `fingerprint`; `bigram_bits_per_byte` of the validation split
    (None if it is empty); `skipped_files`, `empty_documents`, `tokenizer`, `vocab_size`, `fingerprint`.
    """

    folder: Path
    tokenizer: Tokenizer
    stats: dict

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens of both splits, the same on every machine."""
        return self.stats["fingerprint"]

    def split(self, name: str) -> Split:
        """The documents of "train" or "val"."""
        if name not in SPLITS:
            raise ValueError(f'split ({name!r}) must be "train" or "val"')
        return Split(self.folder, name, self.stats["dtype"])


def open_corpus(config: DataConfig) -> Corpus:
    """The corpus that `config` describes, tokenised now unless the cache holds it.

    Raises:
      ConfigError: the text, the tokenizer or the cache folder cannot be used; nothing half-written stays.
    """
    tokenizer = load_tokenizer(config.tokenizer, bos=config.bos_token, eos=config.eos_token)
    train = open_source(config.path, text_key=config.text_key)
    held_out = None
    if config.val_path:
        held_out = open_source(config.val_path, text_key=config.text_key, argument="data.val_path")
        _leave_out(train, held_out)
    build = functools.partial(_write_entry, train, held_out, config.val_fraction, tokenizer)
    key = _digest(
        [
            FORMAT,
            tokenizer.fingerprint,
            config.text_key,
            train.identity(),
            held_out.identity() if held_out else config.val_fraction,
        ]
    )
    cache = Path(config.cache_dir).expanduser()
    with _cache_errors(cache):
        folder, stats = _find_or_build(cache, key, build)
    return Corpus(folder, tokenizer, stats)


def _leave_out(train: Source, held_out: Source) -> None:
    """No validation file is trained on, even where the pattern of the training files matches it."""
    taken = {file.path.resolve() for file in held_out.files}
    kept = tuple(file for file in train.files if file.path.resolve() not in taken)
    if not kept:
        raise ConfigError("data.path: data.val_path matches all of its files, none is left to train on")
    if len(kept) < len(train.files):
        logger.info("%d files of data.val_path are left out of training", len(train.files) - len(kept))
    train.files = kept


def in_validation(document_id: str, fraction: float) -> bool:
    """Whether a document is held out: a hash of its id alone decides, so every machine and every run agrees."""
    digest = hashlib.blake2b(document_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _digest(value) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _map(path: Path, dtype: str) -> np.ndarray:
    # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def _read_entry(folder: Path) -> dict | None:
    """The stats of a whole entry; None if it is missing or any of its files lacks a byte."""
    try:
        stats = json.loads((folder / "stats.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in stats["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return stats if whole else None


def _find_or_build(cache: Path, key: str, build) -> tuple[Path, dict]:
    entry = cache / key
    stats = _read_entry(entry)
    if stats is not None:
        return entry, stats
    cache.mkdir(parents=True, exist_ok=True)
    prefix = f".tmp-{key}-{socket.gethostname()}-"
    with _lock(cache / f"{key}.lock") as locked:
        stats = _read_entry(entry)  # built while this process waited
        if stats is not None:
            return entry, stats
        if locked:  # nobody else on this machine builds this entry: what is there, a killed process left
            for stale in cache.glob(f"{prefix}*"):
                shutil.rmtree(stale, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
        try:
            stats = build(scratch)
            scratch.chmod(0o755)
            _publish(scratch, entry)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    stats = _read_entry(entry)
    if stats is None:
        raise OSError(errno.EIO, "the entry vanished after it was written")
    return entry, stats


def _publish(scratch: Path, entry: Path) -> None:
    try:
        os.replace(scratch, entry)
    except OSError:
        if _read_entry(entry) is not None:
            return  # another machine was faster
        shutil.rmtree(entry, ignore_errors=True)  # a damaged entry
        os.replace(scratch, entry)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock on a file, released by the system if the process dies; False where locks do not work."""
    with open(path, "a") as file:
        locked = False
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                locked = True
            except OSError as error:
                logger.info(
                    "no file locks under %s (%s): several processes may tokenise the same text", path.parent, error
                )
        yield locked


def find_corpus(config: DataConfig, key: str, stats: dict) -> Corpus | None:
    """The corpus that another host has opened, `stats` its own, from this host's cache; None where that lacks it.

    key: name of its folder. Raises ConfigError where this host's tokenizer or entry is another one.
    """
    tokenizer = load_tokenizer(config.tokenizer, bos=config.bos_token, eos=config.eos_token)
    if _fingerprint(tokenizer, stats) != stats["fingerprint"]:
        raise ConfigError(f"data.tokenizer ({config.tokenizer}) is another one on this host than on the first")
    folder = Path(config.cache_dir).expanduser() / key
    found = _read_entry(folder)
    if found is None:
        return None
    if found["fingerprint"] != stats["fingerprint"]:
        raise ConfigError(f"{folder} holds other tokens on this host than on the first: remove it here, or there")
    return Corpus(folder, tokenizer, found)


def copy_corpus(config: DataConfig, key: str, stats: dict, parts: Iterator[tuple[str, bytes]]) -> None:
    """Writes the entry of another host's corpus to this host's cache, whole or not at all.

    parts: (name, the next bytes) of its files, one file after the other. ConfigError where it cannot be written. No
    lock is taken: who waited for one would hold up all that the parts come from.
    """
    cache, prefix = Path(config.cache_dir).expanduser(), f".copy-{key}-{socket.gethostname()}-"
    with _cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        for former in cache.glob(f"{prefix}*"):
            written = max(path.stat().st_mtime for path in [former, *former.iterdir()])
            if time.time() - written > ABANDONED_SECONDS:  # a killed process left it
                shutil.rmtree(former, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
        try:
            with contextlib.ExitStack() as opened:
                files = {name: opened.enter_context(open(scratch / name, "wb")) for name in stats["files"]}
                for name, part in parts:
                    files[name].write(part)
            (scratch / "stats.json").write_text(json.dumps(stats, indent=1))
            scratch.chmod(0o755)
            whole = _read_entry(scratch) is not None
            if whole:
                _publish(scratch, cache / key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if not whole or _read_entry(cache / key) is None:
            raise OSError(errno.EIO, "what the first host sent is not all there")


@contextlib.contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """An OSError inside as the ConfigError that says what to change."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"no space left for the token cache under {cache}: free some or set data.cache_dir"
            ) from error
        raise ConfigError(
            f"cannot write the token cache under {cache} ({error.strerror or error}): set data.cache_dir"
        ) from error


def _fingerprint(tokenizer: Tokenizer, stats: dict) -> str:
    """Identity of the tokens of both splits."""
    return _digest([FORMAT, tokenizer.fingerprint, *(stats[name]["fingerprint"] for name in SPLITS)])


class _SplitWriter:
    """Appends tokenised documents to the two files of a split."""

    def __init__(self, tokens: BinaryIO, offsets: BinaryIO, dtype: np.dtype):
        self._tokens, self._offsets, self._dtype = tokens, offsets, dtype
        self._offsets.write(np.zeros(1, np.int64).tobytes())
        self._hashes = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        self.documents = self.bytes = self.n_tokens = self.pairs = 0
        self.bigrams = BigramCounter()

    def add(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        tokens, lengths = tokenizer.encode_batch(texts)
        raw = tokens.astype(self._dtype).tobytes()
        offsets = (self.n_tokens + np.cumsum(lengths)).astype(np.int64).tobytes()
        self._tokens.write(raw)
        self._offsets.write(offsets)
        self._hashes[0].update(raw)
        self._hashes[1].update(offsets)
        encoded = [text.encode() for text in texts]
        self.bigrams.add(encoded)
        self.documents += len(texts)
        self.bytes += sum(map(len, encoded))
        self.n_tokens += int(lengths.sum())
        self.pairs += int(np.maximum(lengths - 1, 0).sum())

    def stats(self) -> dict:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.n_tokens,
            "pairs": self.pairs,
            "bytes_per_token": self.bytes / max(self.n_tokens, 1),
            "bytes_per_pair": self.bytes / max(self.pairs, 1),
            "fingerprint": self._hashes[0].hexdigest() + self._hashes[1].hexdigest(),
        }


def _write_entry(
    train: Source, held_out: Source | None, val_fraction: float, tokenizer: Tokenizer, folder: Path
) -> dict:
    began = logged = time.monotonic()
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")
    with contextlib.ExitStack() as stack:
        writers = {}
        for name in SPLITS:
            tokens = stack.enter_context(open(folder / f"{name}.tokens", "wb"))
            offsets = stack.enter_context(open(folder / f"{name}.offsets", "wb"))
            writers[name] = _SplitWriter(tokens, offsets, dtype)
        for name, texts in _batches(train, held_out, val_fraction):
            writers[name].add(texts, tokenizer)
            if time.monotonic() - logged > LOG_EVERY_SECONDS:
                logged = time.monotonic()
                done = sum(writer.bytes for writer in writers.values())
                logger.info("tokenised %.0f MB in %.0f s", done / 1e6, logged - began)
    n_documents = sum(writer.documents for writer in writers.values())
    if n_documents == 0:
        raise ConfigError(f"data.path: the {len(train.files)} files hold no text")
    sources = [train, held_out] if held_out else [train]
    stats = {name: writer.stats() for name, writer in writers.items()}
    stats |= {
        "bigram_bits_per_byte": cross_entropy_bits(writers["train"].bigrams, writers["val"].bigrams),
        "skipped_files": sum(source.skipped for source in sources),
        "empty_documents": sum(source.empty for source in sources),
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": _fingerprint(tokenizer, stats),
        "dtype": dtype.name,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / "stats.json").write_text(json.dumps(stats, indent=1))
    n_bytes = sum(writer.bytes for writer in writers.values())
    logger.info("tokenised %d documents, %.1f MB, in %.1f s", n_documents, n_bytes / 1e6, time.monotonic() - began)
    return stats


def _batches(train: Source, held_out: Source | None, val_fraction: float) -> Iterator[tuple[str, list[str]]]:
    """(split, texts) in batches of bounded size, documents in order."""
    pending: dict[str, list[str]] = {name: [] for name in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    for source, fixed in ((train, "train" if held_out else None), (held_out or (), "val")):
        for document_id, text in source:
            name = fixed or ("val" if in_validation(document_id, val_fraction) else "train")
            pending[name].append(text)
            characters[name] += len(text)
            if characters[name] >= BATCH_CHARACTERS or len(pending[name]) >= BATCH_DOCUMENTS:
                yield name, pending[name]
                pending[name], characters[name] = [], 0
    for name in SPLITS:
        if pending[name]:
            yield name, pending[name]
