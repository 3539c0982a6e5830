# SPDX-License-Identifier: Apache-2.0
"""Tokens that other programs wrote: Megatron's `.bin` with its `.idx`, and nanoGPT's `.bin`.

Megatron's index says where documents end. nanoGPT's files are one stream: of uint16 without a header, or with the later
one (256 int32: magic 20240520, version 1, count; magic 20240801, version 7 for uint32). There a document starts at each
bos of the tokenizer if the file starts with one, else it ends after each eos.

The tokens stay where they are and are mapped; the cache holds what was found by reading them once: where documents
start, the counts, and by the hash of the content, for which they are read at each start, that they are the same.
"""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hybridlm import storage
from hybridlm.data.documents import Piece
from hybridlm.data.identity import threads
from hybridlm.data.numbers import Numbers
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError

MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
NANOGPT_HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
HEADER_BYTES = 1024
CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of tokens, and how to find its documents."""

    path: Path
    dtype: str
    header: int
    n_tokens: int
    find_documents: Callable[[Tokenizer], np.ndarray]
    """int64 [documents + 1]: where each starts, and the end of the last."""
    beside: tuple[Path, ...] = ()
    """Files that belong to it."""

    def piece(self, start: int, stop: int) -> Piece:
        """Some of the tokens."""
        return Piece(self.path, self.dtype, start, stop - start, self.header)


def open_token_file(path: Path) -> TokenFile:
    """A Megatron file if an `.idx` lies beside it, else one of nanoGPT; ConfigError where it is neither, or cut."""
    index = path.with_suffix(".idx")
    try:
        return _open_megatron(path, index) if index.is_file() else _open_nanogpt(path)
    except OSError as error:
        raise ConfigError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def _open_nanogpt(path: Path) -> TokenFile:
    size = path.stat().st_size
    dtype, header = "uint16", 0
    with storage.open_file(path) as file:
        words = np.frombuffer(file.read(HEADER_BYTES), np.uint8)
    if len(words) == HEADER_BYTES:
        magic, version, count = (int(word) for word in words.view("<i4")[:3])
        if (magic, version) in NANOGPT_HEADERS:
            dtype, header = NANOGPT_HEADERS[magic, version], HEADER_BYTES
            if size != header + count * np.dtype(dtype).itemsize:
                raise ConfigError(
                    f"{path} has {size - header} bytes behind a header that says {count} {dtype}: it is cut"
                )
        elif magic in {known for known, _ in NANOGPT_HEADERS}:
            raise ConfigError(f"{path} has version {version} of nanoGPT's header, which is not known")
    width = np.dtype(dtype).itemsize
    if size % width:
        raise ConfigError(f"{path} has {size} bytes, which are no whole uint16 tokens: it is cut, or no file of tokens")
    n_tokens = (size - header) // width
    if not n_tokens:
        raise ConfigError(f"{path} holds no tokens")
    piece = Piece(path, dtype, 0, n_tokens, header)
    return TokenFile(path, dtype, header, n_tokens, lambda tokenizer: _documents_of_stream(piece.read(), tokenizer))


def _documents_of_stream(tokens: Numbers, tokenizer: Tokenizer) -> np.ndarray:
    at_start = tokenizer.bos_id is not None and int(tokens[0]) == tokenizer.bos_id
    mark = tokenizer.bos_id if at_start else tokenizer.eos_id
    ends = [[0], [len(tokens)]]
    if mark is not None:
        found = _in_threads(tokens, lambda low, chunk: low + np.flatnonzero(chunk == mark))
        ends.insert(1, np.concatenate(list(found)) + (0 if at_start else 1))
    return np.unique(np.concatenate(ends).astype(np.int64))


def _in_threads(tokens: Numbers, of_chunk: Callable[[int, np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """`of_chunk(low, tokens[low:low + CHUNK])` of each chunk, in order."""
    with ThreadPoolExecutor(threads()) as pool:
        yield from pool.map(lambda low: of_chunk(low, tokens[low : low + CHUNK]), range(0, len(tokens), CHUNK))


def _open_megatron(path: Path, index: Path) -> TokenFile:
    """Megatron-LM, indexed_dataset.py: magic, version 1, dtype, counts; int32 lengths and int64 places of sequences;
    int64 numbers of the sequences that documents start with."""
    size = index.stat().st_size
    raw = Numbers(index, "uint8", length=size)[:34]
    if size < 34 or raw[:9].tobytes() != MEGATRON_MAGIC:
        raise ConfigError(f"{index} is no index of Megatron's (MMIDIDX), or cut")
    number = lambda at: int.from_bytes(raw[at : at + 8].tobytes(), "little")
    version, code, n_sequences, n_marks = number(9), int(raw[17]), number(18), number(26)
    if version != 1 or code not in MEGATRON_TYPES:
        raise ConfigError(
            f"{index} has version {version} and type {code}: version 1 and types of whole numbers are read"
        )
    whole = 34 + 12 * n_sequences + 8 * n_marks
    if size not in (whole, whole + n_sequences):  # one byte each more where sequences have modes
        raise ConfigError(
            f"{index} has {size} bytes instead of {whole} for {n_sequences} sequences and {n_marks} marks: it is cut"
        )
    dtype = MEGATRON_TYPES[code]
    width = np.dtype(dtype).itemsize
    lengths = Numbers(index, "<i4", length=n_sequences, header=34)
    places = Numbers(index, "<i8", length=n_sequences, header=34 + 4 * n_sequences)
    marks = Numbers(index, "<i8", length=n_marks, header=34 + 12 * n_sequences)
    n_tokens = 0
    for low in range(0, n_sequences, CHUNK):  # an index of any size takes little memory
        some = lengths[low : low + CHUNK].astype(np.int64)
        starts = n_tokens + np.cumsum(some) - some
        if (some < 0).any() or (places[low : low + CHUNK] != starts * width).any():
            raise ConfigError(f"{index}: its sequences do not lie end to end in {path.name}")
        n_tokens += int(some.sum())
    ascending = all((np.diff(marks[low : low + CHUNK + 1]) >= 0).all() for low in range(0, n_marks, CHUNK))
    if not n_marks or marks[0] != 0 or marks[-1] != n_sequences or not ascending:
        raise ConfigError(f"{index}: its documents do not ascend from sequence 0 to {n_sequences}")
    if path.stat().st_size != n_tokens * width:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes, its index tells of {n_tokens} tokens of {width}: one is cut"
        )
    if not n_tokens:
        raise ConfigError(f"{path} holds no tokens")

    def documents(_) -> np.ndarray:
        starts = marks[:]
        return np.where(starts < n_sequences, places[np.minimum(starts, n_sequences - 1)] // width, n_tokens)

    return TokenFile(path, dtype, 0, n_tokens, documents, (index,))


def split_documents(offsets: np.ndarray, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """(offsets of the documents to train on, of those held out): a share of the tokens, at the end of the file.

    It ends with a document, but where there is one alone, which is cut.
    """
    first, end = int(offsets[0]), int(offsets[-1])
    cut = end - round(held_out * (end - first))
    if not held_out or cut >= end:
        return offsets, offsets[-1:]
    if len(offsets) == 2:
        return np.array([first, cut]), np.array([cut, end])
    at = min(max(int(np.searchsorted(offsets, cut, side="right")) - 1, 1), len(offsets) - 2)
    return offsets[: at + 1], offsets[at:]


def write_split(
    files: list[TokenFile], parts: list[np.ndarray], tokenizer: Tokenizer, target: Path
) -> tuple[dict, list[list[int]]]:
    """(counts, [number of a file, first token, end] of what is taken) of documents of several files; writes where they
    start, end to end, to `target`.

    parts: of each file, offsets of the documents that are taken. Raises ConfigError for an id that the tokenizer does
    not have.
    """
    bytes_of_id = tokenizer.byte_lengths()
    counts = np.zeros(len(bytes_of_id), np.int64)
    documents = pairs = base = 0
    ranges = []
    with open(target, "wb") as out:
        out.write(np.zeros(1, np.int64).tobytes())
        for number, (file, offsets) in enumerate(zip(files, parts)):
            if len(offsets) < 2:
                continue
            start, stop = int(offsets[0]), int(offsets[-1])
            out.write((base + offsets[1:] - start).astype(np.int64).tobytes())
            base += stop - start
            documents += len(offsets) - 1
            pairs += int(np.maximum(np.diff(offsets) - 1, 0).sum())
            ranges.append([number, start, stop])
            counts += _count(file, start, stop, len(counts), tokenizer)
    n_bytes = int(counts @ bytes_of_id)
    return {
        "documents": documents, "bytes": n_bytes, "tokens": base, "pairs": pairs,
        "bytes_per_token": n_bytes / max(base, 1), "bytes_per_pair": n_bytes / max(pairs, 1),
    }, ranges  # fmt: skip


def _count(file: TokenFile, start: int, stop: int, n_ids: int, tokenizer: Tokenizer) -> np.ndarray:
    """How often each id is there."""

    def of_chunk(_, chunk: np.ndarray) -> np.ndarray:
        least, most = int(chunk.min()), int(chunk.max())
        if least < 0 or most >= n_ids:
            wrong = least if least < 0 else most
            raise ConfigError(
                f"{file.path} has the id {wrong}, which data.tokenizer {tokenizer.name} with its {n_ids} does not "
                "know: set data.tokenizer to what the file was made with"
            )
        return np.bincount(chunk, minlength=n_ids)

    total = np.zeros(n_ids, np.int64)
    for counted in _in_threads(file.piece(start, stop).read(), of_chunk):
        total += counted
    return total
