# SPDX-License-Identifier: Apache-2.0
"""Genomes read from either strand: the reverse complement of documents in packed rows."""

from collections.abc import Callable

import numpy as np

from hybridlm.data.order import permutation_keys
from hybridlm.data.tokenizer import DnaTokenizer


def either_strand(cells: dict[str, np.ndarray], seed: int, step: int, row: int) -> dict[str, np.ndarray]:
    """The row of a batch with about half of its documents read from the other strand: a function of the arguments.

    cells: see `packing.Rows`; tokens of DnaTokenizer. row: its number in the batch of all hosts.
    """
    key = int(permutation_keys(np.array([step]), seed)[0])
    key = int(permutation_keys(np.array([row]), key)[0])
    return other_strand(cells, lambda document: bool(permutation_keys(np.array([document]), key)[0] >> np.uint64(63)))


def other_strand(cells: dict[str, np.ndarray], chosen: Callable[[int], bool]) -> dict[str, np.ndarray]:
    """The row with each document that is chosen, by its number in the row, as its reverse complement.

    A document's bos and eos stay in front and behind: what is between them is turned round.
    """
    complement, is_base = np.array(DnaTokenizer.complement), np.arange(DnaTokenizer.vocab_size) >= DnaTokenizer.UNKNOWN
    tokens, targets, ids = cells["tokens"].copy(), cells["targets"].copy(), cells["segment_ids"]
    starts = np.flatnonzero(np.diff(ids, prepend=0) != 0)
    for number, (start, end) in enumerate(zip(starts, np.append(starts[1:], len(ids)))):
        predicts = np.flatnonzero(targets[start:end] >= 0)  # not the room in front, which a model fills
        if not ids[start] or not len(predicts) or not chosen(number):
            continue
        start += predicts[0]
        read = np.append(tokens[start:end], targets[end - 1])
        bases = np.flatnonzero(is_base[read])
        if not len(bases):
            continue
        turned = slice(bases[0], bases[-1] + 1)
        read[turned] = complement[read[turned]][::-1]
        tokens[start:end], targets[start:end] = read[:-1], read[1:]
    return cells | {"tokens": tokens, "targets": targets}
