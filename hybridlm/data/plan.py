# SPDX-License-Identifier: Apache-2.0
"""What the batches of a split are, as Grain datasets; `hybridlm.data.loader` reads them."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm import storage
from hybridlm.data.cache import local_cache
from hybridlm.data.config import DataConfig
from hybridlm.data.corpus import Corpus, Part
from hybridlm.data.fitting import FitRows
from hybridlm.data.history import Entry, Share, from_json, going_on, in_force, skipping, what_differs
from hybridlm.data.mixture import Mixture
from hybridlm.data.packing import PairRows, Rows, empty_row, permutation_keys
from hybridlm.data.strands import either_strand
from hybridlm.errors import ConfigError

VALIDATION_SEED = 0
ROWS = {"split": PairRows, "best_fit": FitRows}
"""data.packing -> how rows are made."""


class TrainPlan:
    """Endless batches, of rows that each source shuffles anew each epoch; see hybridlm.data.loader.Plan."""

    def __init__(
        self, config: DataConfig, corpus: Corpus, seed: int, batch_size: int, seq_len: int, read: np.ndarray, room: int
    ):
        """read: the rows of a batch that this host reads, ascending. room: cells in front of each document."""
        self._config, self._seed, self._read, self._room = config, seed, read, room
        self._parts = {p.stats["train"]["fingerprint"]: p for p in corpus.parts if "train" in p.documents}
        self._rows: dict[tuple, Rows] = {}
        shares = []
        for part in (p for p in corpus.parts if "train" in p.documents):
            rows = self._rows_of(part.stats["train"]["fingerprint"], config.packing, seq_len)
            if not len(rows):
                raise ConfigError(nothing_in("train", part.stats, config))
            shares.append(Share(part.stats["train"]["fingerprint"], float(part.weight), float(part.epochs), len(rows)))
        self._now = Entry(0, batch_size, seq_len, config.packing, tuple(shares))
        self._entries = (self._now,)
        made = [self._rows_of(share.fingerprint, config.packing, seq_len) for share in shares]
        fills = [rows.n_pairs / (len(rows) * seq_len) for rows in made]
        self.fill = sum(s.weight * fill for s, fill in zip(shares, fills)) / sum(share.weight for share in shares)

    def __len__(self) -> int:
        last = self._entries[-1]
        length = last.mixture.length
        return sys.maxsize if length is None else last.step + length // last.batch_size

    def dataset(self, step: int) -> tuple[Any, int, int]:
        """See Plan."""
        import grain

        entry = in_force(self._entries, step)
        later = [e.step for e in self._entries if e.step > step]
        sources = []
        for share in entry.shares:
            if share.fingerprint not in self._parts:
                raise ConfigError(
                    f"step {step} was made of data ({share.fingerprint}) that data.path does not name: give it again"
                )
            rows = self._rows_of(share.fingerprint, entry.packing, entry.seq_len)
            row_seed = int(permutation_keys(np.arange(1), self._seed)[0] >> np.uint64(32))  # grain adds the epoch to it
            sources.append(grain.MapDataset.source(rows).shuffle(seed=row_seed).repeat())
        mixed = _Mixed(sources, [share.start for share in entry.shares], entry.mixture)
        turn = partial(either_strand, seed=self._seed) if self._config.reverse_complement else None
        mine = _HostRows(mixed, entry.batch_size, self._read, turn, entry.step)
        batches = grain.MapDataset.source(mine).batch(len(self._read))
        return batches, step - entry.step, min(later, default=sys.maxsize)

    def state(self) -> dict:
        """See Plan. The names of the entry in force stand outside, too, as in checkpoints of before."""
        last = self._entries[-1]
        return {
            "split": "train",
            "seed": self._seed,
            "batch_size": last.batch_size,
            "seq_len": last.seq_len,
            "fingerprint": "+".join(share.fingerprint for share in last.shares),
            "entries": [entry.to_json() for entry in self._entries],
        }

    def set_state(self, state: Mapping[str, Any], step: int) -> str:
        """See Plan."""
        check_identity(state, {"split": "train", "seed": self._seed})
        before = from_json(state)
        self._entries = going_on(before, step, self._now)
        old, new = in_force(before, step), self._entries[-1]
        return "" if old.same_data(new) else what_differs(old, new)

    def skip(self, step: int, n: int) -> None:
        """See Plan."""
        self._entries = skipping(self._entries, step, n)

    def tokens_before(self, step: int) -> int:
        """See Plan."""
        ends = [*(entry.step for entry in self._entries[1:]), step]
        spans = [(max(min(end, step) - entry.step, 0), entry) for entry, end in zip(self._entries, ends)]
        return sum(n * entry.batch_size * entry.seq_len for n, entry in spans)

    def at_end(self, step: int) -> str:
        """See Plan."""
        return f"data.epochs {self._config.epochs} end the data at step {step}: raise them, or lower run.steps"

    def _rows_of(self, fingerprint: str, packing: str, seq_len: int) -> Rows:
        key = (fingerprint, packing, seq_len)
        if key not in self._rows:
            self._rows[key] = make_rows(
                self._parts[fingerprint], "train", packing, seq_len, self._seed, self._config, self._room
            )
        return self._rows[key]


class ValPlan:
    """One pass over the validation documents; see hybridlm.data.loader.Plan."""

    def __init__(
        self, config: DataConfig, corpus: Corpus, seed: int, batch_size: int, seq_len: int, read: np.ndarray, room: int
    ):
        """seed: changes nothing. read: the rows of a batch that this host reads, ascending. room: as in TrainPlan."""
        documents = corpus.split("val")  # which knows what a split may be called
        place = _cache(config), _identity(corpus, "val")
        self._rows = ROWS[config.packing](documents, seq_len, VALIDATION_SEED, *place, room=room)
        if not len(self._rows):
            raise ConfigError(nothing_in("val", corpus.stats, config))
        self._batch_size, self._read = batch_size, read
        self._identity = {
            "split": "val",
            "seed": VALIDATION_SEED,
            "batch_size": batch_size,
            "seq_len": seq_len,
            "fingerprint": corpus.stats["val"]["fingerprint"],
        }
        self.fill = self._rows.n_pairs / (len(self._rows) * seq_len)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def dataset(self, step: int) -> tuple[Any, int, int]:
        """See Plan."""
        import grain

        mine = _HostRows(_PaddedRows(self._rows, self._batch_size), self._batch_size, self._read)
        return grain.MapDataset.source(mine).batch(len(self._read)), step, sys.maxsize

    def state(self) -> dict:
        """See Plan."""
        return self._identity

    def set_state(self, state: Mapping[str, Any], step: int) -> str:
        """See Plan. A pass that was begun over other documents cannot go on."""
        check_identity(state, self._identity)
        return ""

    def skip(self, step: int, n: int) -> None:
        """A pass leaves nothing out."""
        raise ValueError("batches of validation are not left out")

    def tokens_before(self, step: int) -> int:
        """See Plan."""
        return step * self._batch_size * self._rows.seq_len

    def at_end(self, step: int) -> str:
        """See Plan."""
        return ""


def check_identity(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """ConfigError where a state is of another split, seed, data or sizes, as far as `identity` says what they are."""
    changed = [name for name, value in identity.items() if state.get(name) != value]
    if changed:
        shown = ", ".join(f"{name} {state.get(name)!r} -> {identity[name]!r}" for name in changed)
        raise ConfigError(f"data changed since the checkpoint ({shown}): restore the former data or start a new run")


def make_rows(part: Part, split: str, packing: str, seq_len: int, seed: int, config: DataConfig, room: int) -> Rows:
    """The packed rows of a part's split."""
    place = _cache(config), part.stats[split]["fingerprint"]
    return ROWS[packing](part.documents[split], seq_len, seed, *place, room=room)


def _cache(config: DataConfig) -> Path:
    return local_cache(storage.as_path(config.cache_dir))


def _identity(corpus: Corpus, split: str) -> str:
    return corpus.stats[split]["fingerprint"]


ENDLESS = 2**53
"""Rows of sources that are read again and again: the largest number that Grain's division by the rows of a batch, in
float64, keeps; sys.maxsize becomes one more than a length can be."""


class _Mixed:
    """Rows of several sources in the order of a mixture, each from its own row on."""

    def __init__(self, sources, starts: list[int], mixture: Mixture):
        self.sources, self.starts, self.mixture = sources, starts, mixture

    def __len__(self) -> int:
        return ENDLESS if self.mixture.length is None else self.mixture.length

    def __getitem__(self, row: int):
        source, number = self.mixture.at(row)
        return self.sources[source][self.starts[source] + number]


class _HostRows:
    """The rows of each batch that a host reads, batch after batch."""

    def __init__(self, rows, batch_size: int, read: np.ndarray, turn: Callable | None = None, first: int = 0):
        """rows: of all batches, one after the other. read: numbers within a batch. turn: (row, step=, row=) -> row, of
        which the first batch has step `first`; None: rows stay as they are."""
        self.rows, self.batch_size, self.read, self.turn, self.first = rows, batch_size, read, turn, first

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * len(self.read)

    def __getitem__(self, index: int):
        batch, row = divmod(index, len(self.read))
        cells = self.rows[batch * self.batch_size + int(self.read[row])]
        return self.turn(cells, step=self.first + batch, row=int(self.read[row])) if self.turn else cells


class _PaddedRows:
    """Rows followed by as many rows of padding as fill the last batch."""

    def __init__(self, rows: Rows, batch_size: int):
        self.rows = rows
        self.length = -(-len(rows) // batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        return self.rows[index] if index < len(self.rows) else empty_row(self.rows.seq_len)


def nothing_in(split: str, stats: Mapping[str, Any], config: DataConfig) -> str:
    """What to say of a split without a token to predict."""
    counts = {name: stats[name]["documents"] for name in ("train", "val")}
    total = sum(counts.values())
    if counts[split]:
        return f"the {counts[split]} documents of the {split} split are too short to predict a token: give more text"
    if split == "val" and not config.val_path:
        return (
            f"data.val_fraction ({config.val_fraction}) holds out none of the {total} documents: raise it, set"
            " data.val_path, or turn evaluation off with run.eval_every=-1"
        )
    if split == "val":
        return "data.val_path holds no text: set it to files with text, or turn evaluation off with run.eval_every=-1"
    return (
        f"data.val_fraction ({config.val_fraction}) holds out all {total} documents, none is left to train on: lower it"
    )
