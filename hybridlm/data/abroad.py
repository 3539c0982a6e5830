# SPDX-License-Identifier: Apache-2.0
"""A corpus that one host has opened, as another host opens it without the text that it was made of.

Entries of the cache are found there by their keys, or sent; shards and token files are that host's own, and are held
against their hashes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridlm import storage
from hybridlm.data.cache import find_entry, local_cache
from hybridlm.data.config import DataConfig
from hybridlm.data.corpus import Corpus, Part
from hybridlm.data.documents import Documents, Joint, Piece, Split
from hybridlm.data.find import find
from hybridlm.data.held_out import patterns_of
from hybridlm.data.identity import content_hashes
from hybridlm.data.shards import ShardSplit, check_shards, read_manifest
from hybridlm.data.tokenizer import load_tokenizer
from hybridlm.errors import ConfigError


def describe(corpus: Corpus) -> dict:
    """A corpus as JSON: its parts, the stats of its cache entries by key, hashes of its token files."""
    about: dict[str, Any] = {"entries": {}, "files": {}, "tokenizer": corpus.tokenizer.fingerprint}
    about["parts"] = [
        {
            "name": part.name,
            "weight": part.weight,
            "epochs": part.epochs,
            "set_name": part.set_name,
            "stats": part.stats,
            "documents": {split: _describe(documents, about) for split, documents in part.documents.items()},
        }
        for part in corpus.parts
    ]
    entries = {folder.name: stats for part in corpus.parts for folder, stats in part.entries}
    about["entries"] = entries
    files = sorted(about["files"])
    about["files"] = dict(zip(files, content_hashes([Path(file) for file in files])))
    return about


def rebuild(config: DataConfig, about: Mapping[str, Any]) -> Corpus:
    """The corpus of a description. Raises ConfigError where something of it is missing or another one on this host."""
    tokenizer = load_tokenizer(config.tokenizer, bos=config.bos_token, eos=config.eos_token)
    if tokenizer.fingerprint != about["tokenizer"]:
        raise ConfigError(f"data.tokenizer ({config.tokenizer}) is another one on this host than on the first")
    for patterns, argument in ((config.path, "data.path"), (patterns_of(config.val_path), "data.val_path")):
        for pattern in patterns:  # one by one: a mixture may have text beside tokens
            if storage.in_bucket(storage.as_path(pattern)):
                find((pattern,), argument)  # this host's copies of tokens
    cache = storage.as_path(config.cache_dir)
    files = [Path(file) for file in about["files"]]
    for file, digest in zip(files, content_hashes(files, local_cache(cache))):
        if digest != about["files"][str(file)]:
            raise ConfigError(f"{file} is another one on this host than on the first: copy it again")
    entries = {}
    for key, stats in about["entries"].items():
        entries[key] = find_entry(cache, key, stats)
        if entries[key] is None:
            raise ConfigError(f"{cache / key} vanished: start again")
    parts = []
    for part in about["parts"]:
        documents = {split: _rebuild(spec, entries) for split, spec in part["documents"].items()}
        made = [(folder, about["entries"][key]) for key, folder in entries.items()]
        numbers = part["weight"], part["epochs"]
        parts.append(Part(part["name"], documents, part["stats"], *numbers, tuple(made), part["set_name"]))
    return Corpus(tokenizer, tuple(parts))


def _describe(documents: Documents, about: dict) -> dict:
    if isinstance(documents, Joint):
        return {"kind": "joint", "parts": [_describe(part, about) for part in documents.parts]}
    if isinstance(documents, ShardSplit):
        folder = str(documents.folder)
        return {"kind": "shards", "folder": folder, "split": documents.name, "identity": documents.fingerprint}
    folder = documents.offsets_file.parent
    pieces = []
    for piece in documents.pieces:
        inside = piece.path.parent == folder
        if not inside:
            about["files"][str(piece.path)] = ""
        path = piece.path.name if inside else str(piece.path)
        pieces.append([inside, path, piece.dtype, piece.start, piece.length, piece.header])
    return {"kind": "split", "entry": folder.name, "offsets": documents.offsets_file.name, "pieces": pieces}


def _rebuild(spec: Mapping[str, Any], entries: Mapping[str, Path]) -> Documents:
    if spec["kind"] == "joint":
        return Joint(tuple(_rebuild(part, entries) for part in spec["parts"]))
    if spec["kind"] == "shards":
        folder = Path(spec["folder"])
        manifest = read_manifest(folder)
        split = ShardSplit(folder, spec["split"], manifest)
        if split.fingerprint != spec["identity"]:
            raise ConfigError(f"{folder} holds other tokens on this host than on the first: copy it again")
        check_shards(folder, manifest, spec["split"])
        return split
    folder = entries[spec["entry"]]
    pieces = tuple(Piece(folder / path if inside else Path(path), *about) for inside, path, *about in spec["pieces"])
    return Split(pieces, folder / spec["offsets"])
