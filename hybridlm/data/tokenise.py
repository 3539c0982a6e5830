# SPDX-License-Identifier: Apache-2.0
"""Text into tokens: documents by batches of bounded size, and the entry of the cache that holds them.

Such an entry has, for each split, `SPLIT.tokens` (uint16 or uint32) and `SPLIT.offsets` (int64, where each document
starts).
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hybridlm.data.bigram import BigramCounter, cross_entropy_bits
from hybridlm.data.formats import Source, in_validation
from hybridlm.data.identity import digest_of
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError

SPLITS = ("train", "val")
BATCH_CHARACTERS = 4 << 20
BATCH_DOCUMENTS = 4096
LOG_EVERY_SECONDS = 30.0
FINGERPRINT = 1

logger = logging.getLogger("hybridlm.data")


class Counts:
    """What is counted of a split while it is tokenised."""

    def __init__(self):
        self.documents = self.bytes = self.tokens = self.pairs = 0
        self.bigrams = BigramCounter()

    def add_texts(self, texts: Sequence[str]) -> None:
        """Documents."""
        self.bigrams.add(texts)
        self.documents += len(texts)
        self.bytes = self.bigrams.n_bytes

    def add_lengths(self, lengths: np.ndarray) -> None:
        """How many tokens each document has."""
        self.tokens += int(lengths.sum())
        self.pairs += int(np.maximum(lengths - 1, 0).sum())

    def stats(self) -> dict:
        """As JSON."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "pairs": self.pairs,
            "bytes_per_token": self.bytes / max(self.tokens, 1),
            "bytes_per_pair": self.bytes / max(self.pairs, 1),
        }


class _SplitWriter:
    """Appends tokenised documents to the two files of a split."""

    def __init__(self, tokens: BinaryIO, offsets: BinaryIO, dtype: np.dtype):
        self._tokens, self._offsets, self._dtype = tokens, offsets, dtype
        self._offsets.write(np.zeros(1, np.int64).tobytes())
        self._hashes = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        self.counts = Counts()

    def add(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        lengths = []
        for tokens, ended in encode(texts, tokenizer):
            raw = tokens.astype(self._dtype).tobytes()
            self._tokens.write(raw)
            self._hashes[0].update(raw)
            lengths.append(ended)
        lengths = np.concatenate(lengths)
        offsets = (self.counts.tokens + np.cumsum(lengths)).astype(np.int64).tobytes()
        self._offsets.write(offsets)
        self._hashes[1].update(offsets)
        self.counts.add_texts(texts)
        self.counts.add_lengths(lengths)

    def stats(self) -> dict:
        return self.counts.stats() | {"fingerprint": self._hashes[0].hexdigest() + self._hashes[1].hexdigest()}


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """What holds every id."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths of the documents that end with them), of whole documents with bos and eos; a document beyond
    BATCH_CHARACTERS comes in pieces where the tokenizer can cut it."""
    if len(texts) > 1 or len(texts[0]) <= BATCH_CHARACTERS:
        yield tokenizer.encode_batch(texts)
        return
    n_tokens, piece = 0, None
    for following in tokenizer.encode_pieces(texts[0], BATCH_CHARACTERS):
        if piece is not None:
            yield piece, np.zeros(0, np.int64)
        piece, n_tokens = following, n_tokens + len(following)
    yield piece, np.array([n_tokens])


def write_texts(
    train: Source, held_out: Source | None, val_fraction: float, tokenizer: Tokenizer, argument: str, folder: Path
) -> dict:
    """Writes the files of a cache's entry and returns its stats. ConfigError for what cannot be read.

    argument: what names the training files, in errors."""
    began = logged = time.monotonic()
    dtype = token_type(tokenizer)
    with contextlib.ExitStack() as stack:
        writers = {}
        for name in SPLITS:
            tokens = stack.enter_context(open(folder / f"{name}.tokens", "wb"))
            offsets = stack.enter_context(open(folder / f"{name}.offsets", "wb"))
            writers[name] = _SplitWriter(tokens, offsets, dtype)
        for name, texts in batches(train, held_out, val_fraction):
            writers[name].add(texts, tokenizer)
            if time.monotonic() - logged > LOG_EVERY_SECONDS:
                logged = time.monotonic()
                done = sum(writer.counts.bytes for writer in writers.values())
                logger.info("tokenised %.0f MB in %.0f s", done / 1e6, logged - began)
    n_documents = sum(writer.counts.documents for writer in writers.values())
    if n_documents == 0:
        raise ConfigError(f"{argument}: the {len(train.files)} files hold no text")
    sources = [train, held_out] if held_out else [train]
    stats = {name: writer.stats() for name, writer in writers.items()}
    bigrams = [writers[name].counts.bigrams for name in SPLITS]
    fingerprint = digest_of([FINGERPRINT, tokenizer.fingerprint, *(stats[name]["fingerprint"] for name in SPLITS)])
    n_bytes = sum(stats[name]["bytes"] for name in SPLITS)
    logger.info("tokenised %d documents, %.1f MB, in %.1f s", n_documents, n_bytes / 1e6, time.monotonic() - began)
    return stats | {
        "bigram_bits_per_byte": cross_entropy_bits(*bigrams),
        "skipped_files": sum(source.skipped for source in sources),
        "empty_documents": sum(source.empty for source in sources),
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": fingerprint,
        "dtype": dtype.name,
    }


def batches(train: Source, held_out: Source | None, val_fraction: float) -> Iterator[tuple[str, list[str]]]:
    """(split, texts) in batches of bounded size, documents of a split in order."""
    pending: dict[str, list[str]] = {name: [] for name in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    for source, fixed in ((train, "train" if held_out else None), (held_out or (), "val")):
        for document_id, text in source:
            name = fixed or ("val" if in_validation(document_id, val_fraction) else "train")
            if pending[name] and characters[name] + len(text) > BATCH_CHARACTERS:
                yield name, pending[name]
                pending[name], characters[name] = [], 0
            pending[name].append(text)
            characters[name] += len(text)
            if characters[name] >= BATCH_CHARACTERS or len(pending[name]) >= BATCH_DOCUMENTS:
                yield name, pending[name]
                pending[name], characters[name] = [], 0
    for name in SPLITS:
        if pending[name]:
            yield name, pending[name]
