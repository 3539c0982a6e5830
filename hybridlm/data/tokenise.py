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
from hybridlm.data.chat import TYPE, Chat, trained
from hybridlm.data.formats import Conversation, Document, Source, in_validation
from hybridlm.data.identity import digest_of
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError

SPLITS = ("train", "val")
BATCH_CHARACTERS = 4 << 20
BATCH_DOCUMENTS = 4096
LOG_EVERY_SECONDS = 30.0
FINGERPRINT = 1

logger = logging.getLogger("hybridlm.data")


def counts(documents: int, n_bytes: int, tokens: int, pairs: int, trained: Sequence[int] | None = None) -> dict:
    """What is said of a split, as JSON. trained: (targets, bytes) of conversations; None: all is trained on."""
    of_pairs = (pairs, n_bytes) if trained is None else trained
    return {
        "documents": documents,
        "bytes": n_bytes,
        "tokens": tokens,
        "pairs": pairs,
        "bytes_per_token": n_bytes / max(tokens, 1),
        "bytes_per_pair": of_pairs[1] / max(of_pairs[0], 1),
        **({} if trained is None else {"trained": list(trained)}),
    }


class Counts:
    """What is counted of a split while it is tokenised."""

    def __init__(self, chat: Chat | None = None):
        """chat: what is trained on is counted, too."""
        self.documents = self.bytes = self.tokens = self.pairs = 0
        self.bigrams = BigramCounter()
        self.trained = None if chat is None else (0, 0)
        self._bytes_of_id = None if chat is None else chat.tokenizer.byte_lengths()

    def add_texts(self, documents: Sequence[Document | Conversation]) -> None:
        """Documents."""
        self.bigrams.add([document.text for document in documents])
        self.documents += len(documents)
        self.bytes = self.bigrams.n_bytes

    def add_ids(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Whole documents, of which some ids may be READ_ONLY; without conversations, their lengths alone count."""
        if self.trained is not None:
            counted = trained(ids, lengths, self._bytes_of_id)
            self.trained = tuple(a + b for a, b in zip(self.trained, counted))
        self.add_lengths(lengths)

    def add_lengths(self, lengths: np.ndarray) -> None:
        """How many tokens each document has."""
        self.tokens += int(lengths.sum())
        self.pairs += int(np.maximum(lengths - 1, 0).sum())

    def stats(self) -> dict:
        """As JSON."""
        return counts(self.documents, self.bytes, self.tokens, self.pairs, self.trained)


class _SplitWriter:
    """Appends tokenised documents to the two files of a split."""

    def __init__(self, tokens: BinaryIO, offsets: BinaryIO, dtype: np.dtype, chat: Chat | None):
        self._tokens, self._offsets, self._dtype, self._chat = tokens, offsets, dtype, chat
        self._offsets.write(np.zeros(1, np.int64).tobytes())
        self._hashes = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
        self.counts = Counts(chat)

    def add(self, documents: Sequence[Document | Conversation], tokenizer: Tokenizer) -> None:
        lengths, before = [], self.counts.tokens
        for tokens, ended in encode(documents, tokenizer, self._chat):
            raw = tokens.astype(self._dtype).tobytes()
            self._tokens.write(raw)
            self._hashes[0].update(raw)
            self.counts.add_ids(tokens, ended)
            lengths.append(ended)
        offsets = (before + np.cumsum(np.concatenate(lengths))).astype(np.int64).tobytes()
        self._offsets.write(offsets)
        self._hashes[1].update(offsets)
        self.counts.add_texts(documents)

    def stats(self) -> dict:
        return self.counts.stats() | {"fingerprint": self._hashes[0].hexdigest() + self._hashes[1].hexdigest()}


def token_type(tokenizer: Tokenizer, chat: Chat | None = None) -> np.dtype:
    """What holds every id, and of conversations its mark."""
    return TYPE if chat else np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")


def encode(
    documents: Sequence[Document | Conversation], tokenizer: Tokenizer, chat: Chat | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths of the documents that end with them), of whole documents with bos and eos; a document beyond
    BATCH_CHARACTERS comes in pieces where the tokenizer can cut it. chat: what encodes conversations."""
    if chat is not None:
        yield chat.encode(documents)
        return
    texts = [document.text for document in documents]
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
    train: Source,
    held_out: Source | None,
    val_fraction: float,
    tokenizer: Tokenizer,
    chat: Chat | None,
    argument: str,
    folder: Path,
) -> dict:
    """Writes the files of a cache's entry and returns its stats. ConfigError for what cannot be read.

    argument: what names the training files, in errors."""
    began = logged = time.monotonic()
    dtype = token_type(tokenizer, chat)
    with contextlib.ExitStack() as stack:
        writers = {}
        for name in SPLITS:
            tokens = stack.enter_context(open(folder / f"{name}.tokens", "wb"))
            offsets = stack.enter_context(open(folder / f"{name}.offsets", "wb"))
            writers[name] = _SplitWriter(tokens, offsets, dtype, chat)
        for name, documents in batches(train, held_out, val_fraction):
            writers[name].add(documents, tokenizer)
            if time.monotonic() - logged > LOG_EVERY_SECONDS:
                logged = time.monotonic()
                done = sum(writer.counts.bytes for writer in writers.values())
                logger.info("tokenised %.0f MB in %.0f s", done / 1e6, logged - began)
    n_documents = sum(writer.counts.documents for writer in writers.values())
    if n_documents == 0:
        what = f"conversation with an answer ({train.unanswered} without)" if train.unanswered else "text"
        raise ConfigError(f"{argument}: the {len(train.files)} files hold no {what}")
    sources = [train, held_out] if held_out else [train]
    stats = {name: writer.stats() for name, writer in writers.items()}
    bigrams = [writers[name].counts.bigrams for name in SPLITS]
    fingerprint = digest_of([FINGERPRINT, tokenizer.fingerprint, *(stats[name]["fingerprint"] for name in SPLITS)])
    n_bytes = sum(stats[name]["bytes"] for name in SPLITS)
    logger.info("tokenised %d documents, %.1f MB, in %.1f s", n_documents, n_bytes / 1e6, time.monotonic() - began)
    return (
        stats
        | {
            "bigram_bits_per_byte": None if chat else cross_entropy_bits(*bigrams),
            "skipped_files": sum(source.skipped for source in sources),
            "empty_documents": sum(source.empty for source in sources),
            "tokenizer": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": fingerprint,
            "dtype": dtype.name,
        }
        | ({"unanswered_documents": sum(source.unanswered for source in sources)} if chat else {})
    )


def batches(
    train: Source, held_out: Source | None, val_fraction: float
) -> Iterator[tuple[str, list[Document | Conversation]]]:
    """(split, documents) in batches of bounded size, documents of a split in order."""
    pending: dict[str, list[Document | Conversation]] = {name: [] for name in SPLITS}
    characters = dict.fromkeys(SPLITS, 0)
    for source, fixed in ((train, "train" if held_out else None), (held_out or (), "val")):
        for document in source:
            name, size = fixed or ("val" if in_validation(document.id, val_fraction) else "train"), len(document.text)
            if pending[name] and characters[name] + size > BATCH_CHARACTERS:
                yield name, pending[name]
                pending[name], characters[name] = [], 0
            pending[name].append(document)
            characters[name] += size
            if characters[name] >= BATCH_CHARACTERS or len(pending[name]) >= BATCH_DOCUMENTS:
                yield name, pending[name]
                pending[name], characters[name] = [], 0
    for name in SPLITS:
        if pending[name]:
            yield name, pending[name]
