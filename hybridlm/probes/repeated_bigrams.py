# SPDX-License-Identifier: Apache-2.0
"""Associative recall in natural text (Arora et al. 2023, "Zoology", section 3): the loss at tokens that complete a pair
of neighbours which stood in their document before, beside the loss at the rest.

Pairs that are frequent in the text that was trained on are known without the document: they count among the rest.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from hybridlm.data import Corpus
from hybridlm.data.documents import READ_ONLY
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.probes.forward import HITS, REST, Args, Forward, Stop
from hybridlm.train.batches import Batches
from hybridlm.train.evaluate import evaluate
from hybridlm.train.metrics import Mean, Metrics

BITS = 21
"""Of an id, and of the number of a document in its row, in a number for all three."""
PIECE = 1 << 16
"""Tokens of the training text that are read in one place."""
AT_ONCE = 1 << 22
"""Tokens whose pairs are counted together."""


@dataclass(frozen=True)
class RepeatedBigrams:
    """Over the held-out sets; no task, as there is nothing to be drawn."""

    frequent: int = 1250
    """Pairs that come as often in the training text are left to the rest; 0: none is, and the text is not counted."""
    counted: int = 1 << 25
    """Tokens of the training text that are counted, in places at even distances; `frequent` shrinks to their share."""

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("counted",))
        require(self.frequent >= 0, f"frequent ({self.frequent}) must not be negative")


def frequent_pairs(bigrams: RepeatedBigrams, corpus: Corpus) -> np.ndarray:
    """The frequent pairs of a corpus's training text, int64, ascending, as `pairs_of` numbers them; none where
    bigrams.frequent is 0."""
    check_ids(corpus.tokenizer.vocab_size)
    if not bigrams.frequent:
        return np.zeros(0, np.int64)
    reader = corpus.split("train").reader
    n = corpus.stats["train"]["tokens"]
    starts = np.arange(0, n, PIECE)
    some = max(bigrams.counted // PIECE, 1)
    if len(starts) > some:
        starts = starts[np.arange(some) * len(starts) // some]
    found, counts, n_read = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    for first in range(0, len(starts), AT_ONCE // PIECE):
        of_pieces = [_pairs(reader, start, min(start + PIECE + 1, n)) for start in starts[first:][: AT_ONCE // PIECE]]
        n_read += sum(map(len, of_pieces))
        new, new_counts = np.unique(np.concatenate(of_pieces), return_counts=True)
        found, at = np.unique(np.concatenate([found, new]), return_inverse=True)
        counts = np.bincount(at, np.concatenate([counts, new_counts])).astype(np.int64)
    least = max(bigrams.frequent * n_read / max(n - 1, 1), 1.0)
    return found[counts >= least]


def _pairs(reader, start: int, stop: int) -> np.ndarray:
    """Of neighbours in the training text; those of two documents are no pair of any one, and are rare."""
    ids = np.asarray(reader[np.arange(start, stop, dtype=np.int64)])
    if ids.dtype.itemsize >= 4 and ids.dtype != np.int32:
        ids = ids & (READ_ONLY - 1)
    return pairs_of(ids[:-1], ids[1:])


def pairs_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A number, int64, for each two ids."""
    return first.astype(np.int64) << BITS | second.astype(np.int64)


def check_ids(vocab_size: int) -> None:
    """ConfigError for more ids than pairs are numbered of."""
    require(vocab_size <= 1 << BITS, f"repeated_bigrams: {vocab_size} tokens are more than {1 << BITS}")


def hits_of(batch: Mapping[str, np.ndarray], frequent: np.ndarray, room: int = 0) -> np.ndarray:
    """int32 [B, T]: 1 where the target completes a pair that stood in its document, in this row, before.

    batch: packed rows, as of `data.packing`. frequent: pairs that do not count, ascending. room: cells in front of each
    document. A pair that is read and not trained on is there for those after it.
    """
    tokens, targets, ids = batch["tokens"], batch["targets"], batch["segment_ids"]
    following = np.zeros_like(tokens)
    following[:, :-1] = np.where(ids[:, 1:] == ids[:, :-1], tokens[:, 1:], -1)
    following[:, -1] = -1
    following = np.where(targets >= 0, targets, following)
    is_pair = (ids > 0) & (following >= 0) & (batch["positions"] >= room)
    pairs = pairs_of(tokens, np.maximum(following, 0))
    found = np.zeros(tokens.shape, np.int32)
    for row in range(len(tokens)):
        at = np.flatnonzero(is_pair[row])
        # the number of the document above those of both ids: 63 bits in all
        _, first = np.unique(ids[row, at].astype(np.int64) << 2 * BITS | pairs[row, at], return_index=True)
        again = np.ones(len(at), bool)
        again[first] = False
        found[row, at[again]] = 1
    place = np.minimum(np.searchsorted(frequent, pairs), max(len(frequent) - 1, 0))
    is_frequent = frequent[place] == pairs if len(frequent) else np.zeros(pairs.shape, bool)
    return np.where((targets >= 0) & ~is_frequent, found, 0).astype(np.int32)


def read_set(
    forward: Forward, args: Args, batches: Batches, frequent: np.ndarray, limit: int, stop: Stop, room: int = 0
) -> Metrics | None:
    """The metrics `hits` and `rest` of a set's first `limit` batches (0: all); None where `stop()` came true."""
    batches.loader.reset()

    def with_hits() -> Iterator[dict[str, Any]]:
        for read in batches.loader:
            yield batches.put({**read, HITS: hits_of(read, frequent, room)})

    return evaluate(forward.losses, args, with_hits(), limit, stop)


def as_json(metrics: Metrics) -> dict[str, dict[str, Any]]:
    """{"hits": {"loss": nats or None, "tokens": n}, "rest": ...}."""
    means = {name: cast(Mean, metrics[name]) for name in (HITS, REST)}
    return {
        name: {"loss": mean.value() if mean.weight else None, "tokens": int(mean.weight)}
        for name, mean in means.items()
    }
