# SPDX-License-Identifier: Apache-2.0
"""The documents that a config names, as tokens: text, tokenised once into the cache, or what was tokenised before.

A corpus is one source, or several with weights. A source is text, folders of tokenised shards, or token files of other
programs; its fingerprint is a hash of its tokens (or of hashes of them), so that machines whose copies differ in name
and time alone agree. An entry of the cache is keyed by hashes of what it was made from, see `hybridlm.data.cache`.
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybridlm import storage
from hybridlm.data.cache import find_or_build, local_cache
from hybridlm.data.chat import chat_of
from hybridlm.data.config import DataConfig
from hybridlm.data.documents import Documents, Joint, Piece, Split
from hybridlm.data.find import Found, find
from hybridlm.data.formats import Source, in_validation, open_source
from hybridlm.data.held_out import held_out_sets, patterns_of
from hybridlm.data.identity import content_hashes, digest_of
from hybridlm.data.shards import ShardSplit, check_shards, read_manifest
from hybridlm.data.token_files import TokenFile, open_token_file, split_documents, write_split
from hybridlm.data.tokenise import SPLITS, counts, write_texts
from hybridlm.data.tokenizer import BUILT_IN, Tokenizer, load_tokenizer
from hybridlm.errors import ConfigError

__all__ = ["SPLITS", "Corpus", "Part", "Split", "in_validation", "open_corpus", "open_held_out"]

FORMAT = 2
COUNTS = ("documents", "bytes", "tokens", "pairs")

logger = logging.getLogger("hybridlm.data")


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a corpus: its documents by split, its counts, and its share in the mixture."""

    name: str
    documents: Mapping[str, Documents]
    stats: dict
    weight: float = 1.0
    epochs: float = 0.0
    """Most passes over its training split; 0: without end."""
    entries: tuple[tuple[Path, dict], ...] = ()
    """(folder, stats) of its entries of the cache."""
    set_name: str = ""
    """Name of the held-out set that its validation documents are; empty: they are a share of what it trains on."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenised corpus: its parts, its tokenizer and its counts.

    `stats` is JSON: for "train" and "val" the counts `documents`, `bytes`, `tokens` (bos and eos included), `pairs`
    (targets), `bytes_per_token`, `bytes_per_pair` and a `fingerprint`; `bigram_bits_per_byte` of the validation split
    (None if it is empty, or no text); `skipped_files`, `empty_documents`, `tokenizer`, `vocab_size`, `fingerprint`. Of
    conversations there are `trained`, targets that are trained on and the bytes that they stand for, of which then
    `bytes_per_pair` tells, and `unanswered_documents`, those left out because nobody answers in them.
    """

    tokenizer: Tokenizer
    parts: tuple[Part, ...]

    @functools.cached_property
    def stats(self) -> dict:
        """Counts of all parts together."""
        return self.parts[0].stats if len(self.parts) == 1 else _together(self.parts)

    @property
    def fingerprint(self) -> str:
        """Identity of the tokens of both splits, the same on every machine."""
        return self.stats["fingerprint"]

    @property
    def folder(self) -> Path | None:
        """The cache's entry, where there is one alone."""
        folders = [folder for part in self.parts for folder, _ in part.entries]
        return folders[0] if len(folders) == 1 else None

    @functools.cached_property
    def held_out(self) -> "Mapping[str, Corpus]":
        """The validation documents set by set, each a corpus of its own; one that has no name is called ""."""
        held = [part for part in self.parts if "val" in part.documents]
        names = dict.fromkeys(part.set_name for part in held)
        if len(names) == 1:
            return {name: self for name in names}
        return {name: Corpus(self.tokenizer, tuple(part for part in held if part.set_name == name)) for name in names}

    def split(self, name: str) -> Documents:
        """The documents of "train" or "val", of all parts."""
        if name not in SPLITS:
            raise ValueError(f'split ({name!r}) must be "train" or "val"')
        held = [part.documents[name] for part in self.parts if name in part.documents]
        return held[0] if len(held) == 1 else Joint(tuple(held))


def open_corpus(config: DataConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus that `config` describes; text is tokenised now unless the cache holds it.

    tokenizer: the one that data.tokenizer names, where it is open already.

    Raises:
      ConfigError: the text, the tokenizer or the cache folder cannot be used; nothing half-written stays.
    """
    tokenizer = tokenizer or load_tokenizer(config.tokenizer, bos=config.bos_token, eos=config.eos_token)
    opener = _Opener(config, tokenizer)
    epochs = config.epochs or (0.0,) * len(config.path)
    sets = held_out_sets(config.val_path)
    if not config.weights and len(sets) <= 1:
        part = opener.open(config.path, held_out_by=patterns_of(config.val_path))
        name = next(iter(sets), "")
        return Corpus(tokenizer, (dataclasses.replace(part, epochs=epochs[0] if config.path else 0.0, set_name=name),))
    if config.weights:
        parts = [
            dataclasses.replace(opener.open((pattern,), validate=not sets), weight=weight, epochs=n)
            for pattern, weight, n in zip(config.path, config.weights, epochs)
        ]
    else:
        part = opener.open(config.path, validate=False, without=patterns_of(config.val_path))
        parts = [dataclasses.replace(part, epochs=epochs[0] if config.path else 0.0)]
    return Corpus(tokenizer, (*parts, *(opener.open_held_out(patterns, name) for name, patterns in sets.items())))


def open_held_out(config: DataConfig, tokenizer: Tokenizer) -> Mapping[str, Corpus]:
    """The held-out sets of data.val_path alone, by name; nothing of data.path is read. Errors as of open_corpus."""
    opener = _Opener(config, tokenizer)
    sets = held_out_sets(config.val_path)
    return {name: Corpus(tokenizer, (opener.open_held_out(patterns, name),)) for name, patterns in sets.items()}


class _Opener:
    """Makes parts of patterns of paths."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self.config, self.tokenizer, self.chat = config, tokenizer, chat_of(config.format, tokenizer)
        self.cache = storage.as_path(config.cache_dir)

    def open(
        self, patterns: Sequence[str], held_out_by: Sequence[str] = (), validate: bool = True,
        without: Sequence[str] = (),
    ) -> Part:  # fmt: skip
        """A part to train on. held_out_by: patterns of what validates it; none: a share of it, where `validate`.
        without: patterns of text that is left out of it."""
        if self.chat and not any(patterns):
            raise ConfigError("data.format=chat needs data.path, files with conversations")
        found = find(patterns, "data.path")
        name = " ".join(patterns) or "embedded"
        fraction = self.config.val_fraction if validate and not held_out_by else 0.0
        if not found.tokens:
            if not held_out_by or not find(held_out_by, "data.val_path").tokens:
                part = self._text(name, patterns, held_out_by, fraction, without=without)
                return part if validate else _trained(part)
            part = self._text(name, patterns, (), 0.0)
        else:
            part = self._tokens(name, found, fraction)
        if not held_out_by:
            return part if validate else _trained(part)
        held_out = self.open_held_out(held_out_by, "")
        documents = {"train": part.documents["train"], "val": held_out.documents["val"]}
        stats = part.stats | {"val": held_out.stats["val"], "bigram_bits_per_byte": None}
        stats["fingerprint"] = digest_of([stats[split]["fingerprint"] for split in SPLITS])
        return dataclasses.replace(part, documents=documents, stats=stats, entries=part.entries + held_out.entries)

    def open_held_out(self, patterns: Sequence[str], name: str) -> Part:
        """A part of validation documents alone, of the set of this name."""
        found = find(patterns, "data.val_path")
        if found.tokens:
            part = self._tokens(" ".join(patterns), found, 0.0)
            split = "val" if part.stats["val"]["documents"] else "train"
        else:
            part, split = self._text(" ".join(patterns), patterns, (), 0.0, "data.val_path"), "train"
        nothing = counts(0, 0, 0, 0) | {"fingerprint": ""}
        stats = part.stats | {"val": part.stats[split], "train": nothing, "bigram_bits_per_byte": None}
        return dataclasses.replace(
            part, documents={"val": part.documents[split]}, stats=stats, weight=0.0, set_name=name
        )

    def _text(
        self, name: str, patterns: Sequence[str], held_out_by: Sequence[str], fraction: float, argument="data.path",
        without: Sequence[str] = (),
    ) -> Part:  # fmt: skip
        config, tokenizer = self.config, self.tokenizer
        how = {"text_key": config.text_key, "records": self.chat and self.chat.read}
        train = open_source(patterns, argument=argument, **how)
        held_out = None
        if held_out_by:
            held_out = open_source(held_out_by, argument="data.val_path", **how)
            _leave_out(train, held_out)
        texts = [pattern for pattern in without if not find((pattern,), "data.val_path").tokens]
        if texts:
            _leave_out(train, open_source(texts, argument="data.val_path", **how))
        made_from = [source.identity(local_cache(self.cache)) for source in (train, held_out) if source]
        build = functools.partial(write_texts, train, held_out, fraction, tokenizer, self.chat, argument)
        chat = [self.chat.identity] if self.chat else []
        key = digest_of(
            [
                FORMAT,
                tokenizer.fingerprint,
                config.text_key,
                made_from[0],
                made_from[1] if held_out else fraction,
                *chat,
            ]
        )
        folder, stats = find_or_build(self.cache, key, build)
        documents = {
            split: Split((Piece(folder / f"{split}.tokens", stats["dtype"]),), folder / f"{split}.offsets")
            for split in SPLITS
        }
        return Part(name, documents, stats, entries=((folder, stats),))

    def _tokens(self, name: str, found: Found, fraction: float) -> Part:
        parts = [self._shards(folder) for folder in found.shards]
        if found.files:
            parts.append(self._files([open_token_file(file) for file in found.files], fraction))
        if len(parts) == 1:
            return dataclasses.replace(parts[0], name=name)
        documents = {split: Joint(tuple(part.documents[split] for part in parts)) for split in SPLITS}
        entries = tuple(entry for part in parts for entry in part.entries)
        return Part(name, documents, _together(parts, mixed=False), entries=entries)

    def _shards(self, folder: Path) -> Part:
        manifest = read_manifest(folder)
        made_with, tokenizer = manifest["tokenizer"], self.tokenizer
        if made_with["fingerprint"] != tokenizer.fingerprint:
            raise ConfigError(
                f"{folder} was tokenised with {made_with['name']} and data.tokenizer is {tokenizer.name}: "
                + f"set data.tokenizer={made_with['name'] if made_with['name'] in BUILT_IN else folder}"
            )
        for split in SPLITS:
            check_shards(folder, manifest, split)
        kept = ("skipped_files", "empty_documents", "dtype", *(["unanswered_documents"] if "chat" in manifest else []))
        stats: dict = {key: manifest[key] for key in kept}
        bits = manifest.get("bigram_bits_per_byte")
        stats["bigram_bits_per_byte"] = bits if isinstance(bits, float) else None
        for split in SPLITS:
            about = manifest["splits"][split]
            stats[split] = counts(*(about[key] for key in COUNTS), about.get("trained"))
            stats[split]["fingerprint"] = about["fingerprint"]
        stats |= {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
        stats["fingerprint"] = digest_of([stats[split]["fingerprint"] for split in SPLITS])
        return Part(str(folder), {split: ShardSplit(folder, split, manifest) for split in SPLITS}, stats)

    def _files(self, files: list[TokenFile], fraction: float) -> Part:
        paths = [path for file in files for path in (file.path, *file.beside)]
        hashes = content_hashes(paths, local_cache(self.cache))
        key = digest_of([FORMAT, "files", self.tokenizer.fingerprint, hashes, fraction])
        folder, stats = find_or_build(self.cache, key, functools.partial(self._find_documents, files, fraction, hashes))
        documents = {
            split: Split(
                tuple(files[i].piece(start, stop) for i, start, stop in stats["pieces"][split]),
                folder / f"{split}.offsets",
            )
            for split in SPLITS
        }
        return Part(str(files[0].path), documents, stats, entries=((folder, stats),))

    def _find_documents(self, files: list[TokenFile], fraction: float, hashes: list[str], folder: Path) -> dict:
        offsets = [split_documents(file.find_documents(self.tokenizer), fraction) for file in files]
        stats: dict = {"pieces": {}}
        for number, split in enumerate(SPLITS):
            parts = [both[number] for both in offsets]
            counts, ranges = write_split(files, parts, self.tokenizer, folder / f"{split}.offsets")
            stats[split] = counts | {"fingerprint": digest_of([hashes, ranges])}
            stats["pieces"][split] = ranges
        return stats | {
            "bigram_bits_per_byte": None,
            "skipped_files": 0,
            "empty_documents": 0,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            "dtype": files[0].dtype,
            "fingerprint": digest_of([FORMAT, hashes, fraction]),
        }


def _trained(part: Part) -> Part:
    """Without the documents that it holds out."""
    return dataclasses.replace(part, documents={"train": part.documents["train"]})


def _together(parts: Sequence[Part], mixed: bool = True) -> dict:
    """Counts of several parts. mixed: bytes a token of the training text are those of the mixture."""
    stats = {}
    for split in SPLITS:
        held = [part.stats[split] for part in parts if split in part.documents]
        trained = None
        if any("trained" in one for one in held):
            of_each = [one.get("trained", (one["pairs"], one["bytes"])) for one in held]
            trained = [sum(numbers) for numbers in zip(*of_each)]
        stats[split] = counts(*(sum(one[key] for one in held) for key in COUNTS), trained)
        stats[split]["fingerprint"] = digest_of([one["fingerprint"] for one in held])
    total = sum(part.weight for part in parts)
    for key in ("bytes_per_token", "bytes_per_pair") if mixed else ():
        stats["train"][key] = sum(part.weight * part.stats["train"][key] for part in parts) / total
    held = [p for p in parts if "val" in p.documents and p.stats["val"]["bytes"]]
    known = bool(held) and all(part.stats["bigram_bits_per_byte"] is not None for part in held)
    bits = sum(part.stats["bigram_bits_per_byte"] * part.stats["val"]["bytes"] for part in held) if known else 0.0
    unanswered = [part.stats["unanswered_documents"] for part in parts if "unanswered_documents" in part.stats]
    stats |= {"unanswered_documents": sum(unanswered)} if unanswered else {}
    return stats | {
        "bigram_bits_per_byte": bits / stats["val"]["bytes"] if known else None,
        "skipped_files": sum(part.stats["skipped_files"] for part in parts),
        "empty_documents": sum(part.stats["empty_documents"] for part in parts),
        "tokenizer": parts[0].stats["tokenizer"],
        "vocab_size": parts[0].stats["vocab_size"],
        "dtype": "uint32" if any(part.stats["dtype"] != "uint16" for part in parts) else "uint16",
        "fingerprint": digest_of([part.stats["fingerprint"] for part in parts]),
    }


def _leave_out(train: Source, held_out: Source) -> None:
    """No validation file is trained on, even where the pattern of the training files matches it."""
    taken = {storage.absolute(file.path) for file in held_out.files}
    kept = tuple(file for file in train.files if storage.absolute(file.path) not in taken)
    if not kept:
        raise ConfigError("data.path: data.val_path matches all of its files, none is left to train on")
    if len(kept) < len(train.files):
        logger.info("%d files of data.val_path are left out of training", len(train.files) - len(kept))
    train.files = kept
