# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: raw bytes, nucleotides, or any `tokenizer.json` of the tokenizers library."""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from hybridlm import storage
from hybridlm.errors import ConfigError

# What published tokenizers call the token before and after a document, most specific first.
BOS_NAMES = (
    "<|begin_of_text|>", "<|startoftext|>", "<|begin▁of▁sentence|>", "<bos>", "<s>", "<|bos|>", "[BOS]", "<BOS>",
    "<|beginoftext|>",
)  # fmt: skip
EOS_NAMES = (
    "<|end_of_text|>", "<|endoftext|>", "<|end▁of▁sentence|>", "<eos>", "</s>", "<|eos|>", "[EOS]", "<EOS>",
    "<|im_end|>",
)  # fmt: skip

BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""What belongs to a tokenizer.json: names of special tokens, and the chat template."""


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer.

    `bos_id` and `eos_id` are None where the tokenizer has no such token; `fingerprint` changes whenever the ids of a
    text could.
    """

    name: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> np.ndarray:
        """int32 ids of a text, with the document's first and last token where asked (and where they exist)."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Whole documents: int32 ids of all of them in a row, bos and eos included, and the number of ids of each."""

    def encode_pieces(self, text: str, size: int) -> Iterator[np.ndarray]:
        """The ids of one whole document, bos and eos included, end to end in arrays; of about `size` characters where
        the ids of a text are those of its parts."""

    def encode_template(self, text: str, spelled: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """(int32 ids of what a chat template made, the character of `text` at which each begins), both [T].

        Special tokens that the text spells are read as such, but for those that begin at a character of `spelled`."""

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, int64 [vocab_size]; 0 for what is no text. Exact for byte-level
        vocabularies; else as the vocabulary spells the token."""

    def decode(self, ids) -> str:
        """The text of ids; bos, eos and ids outside the vocabulary are dropped, invalid UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """The 256 bytes of UTF-8 as ids 0..255, bos 256, eos 257."""

    name = "byte"
    fingerprint = "byte-1"
    vocab_size = 258
    bos_id = 256
    eos_id = 257

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> np.ndarray:
        ids = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
        return _frame(ids, np.array([len(ids)]), self.bos_id if bos else None, self.eos_id if eos else None)[0]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [text.encode("utf-8", "replace") for text in texts]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return _frame(np.frombuffer(b"".join(parts), np.uint8), lengths, self.bos_id, self.eos_id)

    def encode_pieces(self, text: str, size: int) -> Iterator[np.ndarray]:
        for start in range(0, max(len(text), 1), size):
            yield self.encode(text[start : start + size], bos=start == 0, eos=start + size >= len(text))

    def encode_template(self, text: str, spelled: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        return ids, np.cumsum((ids & 0xC0) != 0x80) - 1  # a byte that begins a character is not 10xxxxxx

    def byte_lengths(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int64)

    def decode(self, ids) -> str:
        ids = np.asarray(ids).reshape(-1).astype(np.int64)  # of an empty list, too
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")


class DnaTokenizer:
    """Nucleotides A C G T N as ids 7..11, numbered like HyenaDNA's and Caduceus' published tokenizer.

    Lower case, which marks repeats (soft-masked), reads as upper case; U, of RNA, as T; IUPAC's letters for several
    bases as N; anything else is unknown, 6. eos 1, bos 2, 3 masks a token, 0, 4 and 5 are never written.
    """

    name = "dna"
    fingerprint = "dna-1"
    vocab_size = 12
    bos_id = 2
    eos_id = 1
    LETTERS = b"ACGTN"
    FIRST = 7
    UNKNOWN = 6
    complement = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)
    """Of each id that of the base which the other strand has there."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> np.ndarray:
        ids = _dna_ids(text.encode("ascii", "replace"))
        return _frame(ids, np.array([len(ids)]), self.bos_id if bos else None, self.eos_id if eos else None)[0]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts = [text.encode("ascii", "replace") for text in texts]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        return _frame(_dna_ids(b"".join(parts)), lengths, self.bos_id, self.eos_id)

    def encode_pieces(self, text: str, size: int) -> Iterator[np.ndarray]:
        for start in range(0, max(len(text), 1), size):
            yield self.encode(text[start : start + size], bos=start == 0, eos=start + size >= len(text))

    def encode_template(self, text: str, spelled: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        return ids, np.arange(len(ids))

    def byte_lengths(self) -> np.ndarray:
        return (np.arange(self.vocab_size) >= self.UNKNOWN).astype(np.int64)

    def decode(self, ids) -> str:
        ids = np.asarray(ids).reshape(-1).astype(np.int64)
        ids = ids[(ids >= self.FIRST) & (ids < self.vocab_size)]
        return np.frombuffer(self.LETTERS, np.uint8)[ids - self.FIRST].tobytes().decode("ascii")


@functools.cache
def _dna_table() -> np.ndarray:
    """Of each byte its id."""
    table = np.full(256, DnaTokenizer.UNKNOWN, np.uint8)
    codes = {letter: DnaTokenizer.FIRST + i for i, letter in enumerate("ACGTN")} | {"U": DnaTokenizer.FIRST + 3}
    codes |= dict.fromkeys("RYSWKMBDHVX", DnaTokenizer.FIRST + 4)
    for letter, code in codes.items():
        table[[ord(letter), ord(letter.lower())]] = code
    return table


def _dna_ids(content: bytes) -> np.ndarray:
    return _dna_table()[np.frombuffer(content, np.uint8)]


BUILT_IN = {kind.name: kind for kind in (ByteTokenizer, DnaTokenizer)}
"""data.tokenizer -> a tokenizer that is no file."""


class FileTokenizer:
    """A `tokenizer.json`.

    Text that spells a special token is encoded as text, so no document can forge a boundary. Truncation, padding and
    the file's own template of special tokens are switched off: documents are framed by bos and eos alone.
    """

    def __init__(self, path: str | Path, *, bos: str | None = None, eos: str | None = None):
        """Reads `path`; `bos` and `eos` name tokens, None looks them up (see `_find_end`).

        Raises:
          ConfigError: the file is missing or no tokenizer, or it has no token of a given name.
        """
        path = storage.as_path(path)
        content = _read(path)
        self._tokenizer = _parse(path, content)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._is_byte_level = _is_byte_level(content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size < 2:
            raise ConfigError(f"tokenizer {path} has a vocabulary of {self.vocab_size} tokens; it needs at least 2")
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        self.special = frozenset(special)
        declared = _declared_ends(path)
        self.bos_id = _find_end("bos_token", bos, declared, BOS_NAMES, special, vocabulary, path)
        self.eos_id = _find_end("eos_token", eos, declared, EOS_NAMES, special, vocabulary, path)
        if self.bos_id is None:  # one token for both ends, as GPT-2 has it
            self.bos_id = self.eos_id
        words = {i: word for word, i in vocabulary.items()}
        self.path, self.bos_token, self.eos_token = path, words.get(self.bos_id), words.get(self.eos_id)
        self._spelled = {i: word for i, word in words.items() if word not in special}
        self._known = np.zeros(self.vocab_size, bool)
        self._known[list(vocabulary.values())] = True
        self._known[[i for i in (self.bos_id, self.eos_id) if i is not None]] = False
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        self.name = f"{path.parent.name}/{path.name}" if path.name == "tokenizer.json" else path.name
        self.fingerprint = f"{digest}-{self.bos_id}-{self.eos_id}"

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> np.ndarray:
        text = text.encode("utf-8", "replace").decode()
        with _explained(self.name):
            ids = np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        return _frame(ids, np.array([len(ids)]), self.bos_id if bos else None, self.eos_id if eos else None)[0]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        with _explained(self.name):
            rows = [row.ids for row in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
        return _frame(ids, lengths, self.bos_id, self.eos_id)

    def encode_pieces(self, text: str, size: int) -> Iterator[np.ndarray]:
        yield self.encode(text, bos=True, eos=True)

    def encode_template(self, text: str, spelled: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        text, spelled = text.encode("utf-8", "replace").decode(), set(spelled)
        if not spelled:
            with _explained(self.name):
                found = self._with_special.encode(text, add_special_tokens=False)
            return np.asarray(found.ids, np.int32), np.asarray([start for start, _ in found.offsets], np.int64)
        words = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        cuts = [m for m in re.finditer(words, text) if m.start() not in spelled]
        ids, starts, done = [], [], 0
        for start, stop in [*(m.span() for m in cuts), (len(text), len(text))]:
            with _explained(self.name):
                found = self._tokenizer.encode(text[done:start], add_special_tokens=False)
            ids += found.ids
            starts += [done + first for first, _ in found.offsets]
            if stop > start:
                ids.append(self._tokenizer.token_to_id(text[start:stop]))
                starts.append(start)
            done = stop
        return np.asarray(ids, np.int32), np.asarray(starts, np.int64)

    @functools.cached_property
    def _with_special(self):
        """The same, which reads special tokens as such."""
        backend = _parse(self.path, self._tokenizer.to_str().encode())
        backend.encode_special_tokens = False
        return backend

    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int64)
        for i, word in self._spelled.items():
            lengths[i] = len(word) if self._is_byte_level else _spelled_bytes(word)
        return lengths

    def decode(self, ids) -> str:
        ids = np.asarray(ids).reshape(-1).astype(np.int64)
        ids = ids[(ids >= 0) & (ids < self.vocab_size)]
        with _explained(self.name):
            return self._tokenizer.decode(ids[self._known[ids]].tolist(), skip_special_tokens=True)


def load_tokenizer(spec: str = "byte", *, bos: str | None = None, eos: str | None = None) -> Tokenizer:
    """The tokenizer that `spec` names: "byte", "dna", or the path of a tokenizer.json (or of the folder that holds it).

    `bos` and `eos` name the tokens put around a document; None finds them: the `tokenizer_config.json` beside the file
    decides, else the first special token of a usual name. Without a bos, the eos serves as both.

    Raises:
      ConfigError: see FileTokenizer; or `bos` or `eos` given to a tokenizer whose ends are fixed.
    """
    if not spec:
        raise ConfigError("there is no tokenizer: give --data.tokenizer=PATH of a tokenizer.json, or byte")
    if spec in BUILT_IN:
        if bos is not None or eos is not None:
            raise ConfigError(
                f"data.bos_token and data.eos_token belong to a tokenizer.json; the {spec} tokenizer has its own"
            )
        return BUILT_IN[spec]()
    path = storage.as_path(spec)
    storage.check(path, "data.tokenizer")
    return FileTokenizer(path / "tokenizer.json" if path.is_dir() else path, bos=bos, eos=eos)


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes what `load_tokenizer(folder)` needs to give this tokenizer again, ends and chat template included; nothing
    for what is no file."""
    if isinstance(tokenizer, tuple(BUILT_IN.values())):
        return
    ends = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    target = folder / "tokenizer.json"
    if storage.absolute(tokenizer.path) != target.resolve():
        target.write_bytes(_read(tokenizer.path))
        for beside in map(tokenizer.path.with_name, BESIDE):
            if storage.exists(beside):
                storage.copy(beside, folder / beside.name)
    settings = json_object(folder / BESIDE[0]) | ends
    (folder / BESIDE[0]).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _frame(ids: np.ndarray, lengths: np.ndarray, bos: int | None, eos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Documents laid end to end, each put between bos and eos (where not None): int32 ids, and the new lengths."""
    lengths = lengths + (bos is not None) + (eos is not None)
    ends = np.cumsum(lengths)
    framed = np.empty(int(lengths.sum()), np.int32)
    inside = np.ones(len(framed), bool)
    if bos is not None:
        framed[ends - lengths] = bos
        inside[ends - lengths] = False
    if eos is not None:
        framed[ends - 1] = eos
        inside[ends - 1] = False
    framed[inside] = ids
    return framed, lengths


def _read(path: Path) -> bytes:
    try:
        return storage.read_bytes(path)
    except OSError as error:
        raise ConfigError(
            f'data.tokenizer ({str(path)!r}): {error.strerror}; give "byte", "dna" or the path of a tokenizer.json'
        ) from error


def _parse(path: Path, content: bytes):
    from tokenizers import Tokenizer as Backend

    with _explained(str(path), f"data.tokenizer ({str(path)!r}) is no tokenizer.json"):
        return Backend.from_str(content.decode())


@contextlib.contextmanager
def _explained(name: str, what: str | None = None) -> Iterator[None]:
    """What the library raises, as one line: bare Exceptions, and panics, which are no Exceptions at all."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        told = what or f"data.tokenizer {name} cannot tokenise (a vocabulary without the token for unknown text?)"
        raise ConfigError(f"{told}: {error}") from None


def _is_byte_level(content: bytes) -> bool:
    """Whether each character of a token in a tokenizer.json, which was parsed before, stands for a byte."""
    settings = json.loads(content)
    return any('"ByteLevel"' in json.dumps(settings.get(part)) for part in ("pre_tokenizer", "decoder"))


def _spelled_bytes(word: str) -> int:
    """Of a token as SentencePiece spells it: `▁` is a space, `<0x0A>` a byte."""
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", word) else len(word.replace("▁", " ").encode())


def _declared_ends(path: Path) -> dict:
    """bos_token and eos_token of the `tokenizer_config.json` beside the file, as far as it names them."""
    beside = path.with_name(BESIDE[0])
    settings = json_object(beside)
    declared = {}
    for key in ("bos_token", "eos_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if not isinstance(value, str | None):
            raise ConfigError(f'{beside}: "{key}" is {type(value).__name__}, not a token')
        declared[key] = value
    return declared


def json_object(file: Path) -> dict:
    """What a file of JSON holds; {} where there is none. ConfigError for anything but an object."""
    try:
        settings = json.loads(storage.read_bytes(file))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} is a JSON {type(settings).__name__}, not an object")
    return settings


def _find_end(key, given, declared, names, special, vocabulary, path) -> int | None:
    if given is not None:
        if given not in vocabulary:
            shown = ", ".join(sorted(special)[:12]) or "none"
            raise ConfigError(f"data.{key} ({given!r}) is no token of {path}; its special tokens: {shown}")
        return vocabulary[given]
    if declared.get(key) in vocabulary:
        return vocabulary[declared[key]]
    return next((vocabulary[name] for name in names if name in special), None)
