# SPDX-License-Identifier: Apache-2.0
"""The corpus of a run on several hosts: the first tokenises the text, the others take what it has made.

Where they share `data.cache_dir` they read its entry there. Where each has a cache of its own, the entry is sent to
them once, over the network that joins the devices, and is found the next time. The text itself is read by the first.
"""

import socket
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from hybridlm import storage
from hybridlm.cluster import broadcast, from_first, gather, on_all
from hybridlm.data import Corpus, open_corpus
from hybridlm.data.abroad import describe, rebuild
from hybridlm.data.cache import copy_entry, find_entry, local_cache
from hybridlm.data.config import DataConfig

CHUNK = 32 << 20
"""Bytes that are sent at once."""


def open_together(config: DataConfig) -> Corpus:
    """What `open_corpus` gives, on every process of a cluster; the text is tokenised once.

    Raises ConfigError on all of them, in the same words, where it cannot be opened on one or is another one there.
    """
    if jax.process_count() == 1:
        return open_corpus(config)
    opened: list[Corpus] = []

    def open_first() -> dict:
        opened.append(open_corpus(config))
        return describe(opened[0])

    about = from_first(open_first)
    cache = storage.as_path(config.cache_dir)
    for key, stats in about["entries"].items():
        find = partial(find_entry, cache, key, stats)
        folder = on_all(find)
        while (writing := _writers(cache, lacking=folder is None)).any():
            parts = _parts(folder if opened else None, stats["files"])
            on_all(partial(_copy, cache, key, stats, parts, writing[jax.process_index()]))
            folder = on_all(find)
    return on_all(lambda: opened[0] if opened else rebuild(config, about))


def _writers(cache: Path, lacking: bool) -> np.ndarray:
    """Which processes write an entry that they lack: one for each cache, by its host and folder."""
    place = np.uint32(zlib.crc32(f"{socket.gethostname()}:{local_cache(cache).resolve()}".encode()))
    lack, places = gather(np.array([lacking, place], np.uint32)).T
    first = {p: i for i, p in reversed(list(enumerate(places))) if lack[i]}
    return np.array([bool(lack[i]) and first[p] == i for i, p in enumerate(places)])


def _parts(folder: Path | None, files: dict[str, list]) -> Iterator[tuple[str, bytes]]:
    """The files of the first process's entry, part by part, on all processes, which have to take them all."""
    for name, (size, _) in files.items():
        for start in range(0, size, CHUNK):
            part = np.zeros(min(CHUNK, size - start), np.uint8)
            if folder is not None:
                with open(folder / name, "rb") as file:
                    file.seek(start)
                    file.readinto(part)
            yield name, broadcast(part).tobytes()


def _copy(cache: Path, key: str, stats: dict, parts: Iterator[tuple[str, bytes]], writing: bool) -> None:
    try:
        if writing:
            copy_entry(cache, key, stats, parts)
    finally:  # one that cannot write takes what is sent as well: no process waits for it
        for _ in parts:
            pass
