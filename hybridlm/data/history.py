# SPDX-License-Identifier: Apache-2.0
"""What a run's batches are made of, from which step on: the list that every checkpoint holds.

The batch of step n is a function of (seed, n, this list) alone. An entry says of which data, in which shares, sizes and
packing, and from which row of each source on; the last one that begins at or before a step is in force there. Other
data or sizes on resume begin a new entry, in which a source that was read before goes on where it was. A window that is
left out begins one, too: the same sources, some rows further.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from hybridlm.data.mixture import Mixture
from hybridlm.errors import ConfigError

PACKINGS = ("split", "best_fit")


@dataclasses.dataclass(frozen=True)
class Share:
    """A source in a mixture."""

    fingerprint: str
    """Identity of its tokens."""
    weight: float
    epochs: float
    """Most passes; 0: without end."""
    rows: int
    """Of a pass."""
    start: int = 0
    """Rows of it that were read before this entry."""

    @property
    def limit(self) -> int | None:
        """Rows that this entry may still read."""
        return max(round(self.epochs * self.rows) - self.start, 0) if self.epochs else None


@dataclasses.dataclass(frozen=True)
class Entry:
    """What batches are made of from a step on."""

    step: int
    batch_size: int
    seq_len: int
    packing: str
    shares: tuple[Share, ...]
    skipped: int = 0
    """Batches left out right before it."""

    @functools.cached_property
    def mixture(self) -> Mixture:
        """Where its rows come from."""
        return Mixture([share.weight for share in self.shares], [share.limit for share in self.shares])

    def read(self, step: int) -> tuple[int, ...]:
        """Rows of each source that were read before a step at which this entry is in force."""
        counts = self.mixture.counts((step - self.step) * self.batch_size)
        return tuple(share.start + n for share, n in zip(self.shares, counts or (0,) * len(self.shares)))

    def same_data(self, other: "Entry") -> bool:
        """Whether both mix and cut the same sources in the same way, wherever they begin."""
        plain = lambda entry: dataclasses.replace(
            entry, step=0, skipped=0, shares=tuple(dataclasses.replace(s, start=0, rows=0) for s in entry.shares)
        )
        return plain(self) == plain(other)

    def moved(self, step: int, read: Sequence[int], skipped: int = 0) -> "Entry":
        """The same data from a step and from other rows on."""
        shares = tuple(dataclasses.replace(share, start=start) for share, start in zip(self.shares, read))
        return dataclasses.replace(self, step=step, shares=shares, skipped=skipped)

    def to_json(self) -> dict:
        """As a checkpoint holds it."""
        return dataclasses.asdict(self) | {"shares": [dataclasses.asdict(share) for share in self.shares]}


def in_force(entries: Sequence[Entry], step: int) -> Entry:
    """The entry that the batch of a step is made by."""
    return next(entry for entry in reversed(entries) if entry.step <= step)


def going_on(entries: Sequence[Entry], step: int, now: Entry) -> tuple[Entry, ...]:
    """The list of a run that goes on at a step with the data of `now`: as it is, or with a new entry.

    Entries that would begin later are dropped: the run has gone back.
    """
    kept = [entry for entry in entries if entry.step <= step]
    last = kept[-1]
    if last.same_data(now):
        return tuple(kept)
    before = list(zip(last.shares, last.read(step)))
    starts = []
    for share in now.shares:
        found = next((pair for pair in before if pair[0].fingerprint == share.fingerprint), None)
        if found is None:
            starts.append(0)
            continue
        before.remove(found)
        old, read = found
        rows = old.rows or max(round(share.rows * now.seq_len / last.seq_len), 1)  # unknown in older checkpoints
        # where the same source makes other rows: as many passes of it
        starts.append(read if rows == share.rows else -(-read * share.rows // rows))
    if last.step == step:  # no batch was made by it
        kept.pop()
    return (*kept, now.moved(step, starts))


def skipping(entries: Sequence[Entry], step: int, n: int) -> tuple[Entry, ...]:
    """The list with a new entry at a step that leaves out the n batches which would have come next."""
    kept = [entry for entry in entries if entry.step <= step]
    last = kept[-1]
    if last.step == step:
        kept.pop()
    skipped = n + (last.skipped if last.step == step else 0)
    return (*kept, last.moved(step, last.read(step + n), skipped))


def what_differs(old: Entry, new: Entry) -> str:
    """What a new entry changes, in words."""
    parts = [
        f"{name} {getattr(old, name)!r} -> {getattr(new, name)!r}"
        for name in ("batch_size", "seq_len", "packing")
        if getattr(old, name) != getattr(new, name)
    ]
    mixes = [[(s.fingerprint[:8], s.weight, s.epochs) for s in entry.shares] for entry in (old, new)]
    if mixes[0] != mixes[1]:
        told = [", ".join(f"{name} x {w:g}" if len(mix) > 1 else name for name, w, _ in mix) for mix in mixes]
        if told[0] == told[1]:
            told = [", ".join(f"{epochs:g} epochs" for *_, epochs in mix) for mix in mixes]
        parts.append(f"data {told[0]} -> {told[1]}")
    return ", ".join(parts)


def from_json(state: Mapping[str, Any]) -> tuple[Entry, ...]:
    """The list in a checkpoint's state of the data, of this version or of those before it, which had one entry.

    Raises ConfigError, one line, where it is none.
    """
    try:
        if "entries" not in state:
            share = Share(_text(state["fingerprint"]), 1.0, 0.0, 0)
            entries = [Entry(0, _count(state["batch_size"], 1), _count(state["seq_len"], 1), "split", (share,))]
        else:
            entries = [_entry(entry) for entry in state["entries"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the checkpoint's record of the data cannot be read ({error!r})") from None
    steps = [entry.step for entry in entries]
    if not steps or steps[0] != 0 or steps != sorted(set(steps)):
        raise ConfigError(f"the checkpoint's record of the data has entries at steps {steps}: they must ascend from 0")
    return tuple(entries)


def _entry(values: Mapping[str, Any]) -> Entry:
    shares = tuple(
        Share(
            _text(share["fingerprint"]), _number(share["weight"]), _number(share["epochs"]), _count(share["rows"]),
            _count(share["start"]),
        )
        for share in values["shares"]
    )  # fmt: skip
    if not shares or not all(share.weight > 0 for share in shares) or values["packing"] not in PACKINGS:
        raise ValueError(f"packing {values['packing']!r}, {len(shares)} sources")
    sizes = (_count(values[name], 1) for name in ("batch_size", "seq_len"))
    return Entry(_count(values["step"]), *sizes, values["packing"], shares, _count(values["skipped"]))


def _count(value, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**62:
        raise ValueError(f"{value!r} is no count")
    return value


def _number(value) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e300:
        raise ValueError(f"{value!r} is no number from 0 on")
    return float(value)


def _text(value) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
