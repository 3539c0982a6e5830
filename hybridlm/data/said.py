# SPDX-License-Identifier: Apache-2.0
"""What a run says of its data at its start."""

import numpy as np

from hybridlm.data.config import DataConfig
from hybridlm.data.corpus import Corpus
from hybridlm.data.documents import in_chunks


def answers_share(corpus: Corpus) -> float | None:
    """The share of the training tokens that is trained on, of text with conversations in it, whatever they were read
    from; None where there are none."""
    train = corpus.stats["train"]
    return train["trained"][0] / max(train["pairs"], 1) if "trained" in train else None


def of_conversations(corpus: Corpus, config: DataConfig, room: int = 0) -> str:
    """How much of conversations is trained on, and what is left out or cut, in words; "" where there are none.

    room: cells in front of each document.
    """
    stats, share = corpus.stats, answers_share(corpus)
    if share is None:
        return ""
    parts = [part.documents["train"] for part in corpus.parts if "trained" in part.stats["train"]]
    longest = config.seq_len - room
    n_cut = sum(int((np.diff(offsets) - 1 > longest).sum()) for part in parts for _, offsets in in_chunks(part.offsets))
    told = [f"answers are trained on: {share:.1%} of the tokens"]
    if n := stats.get("unanswered_documents", 0):
        told.append(f"{n:,} conversations without an answer are left out")
    if n_cut:
        told.append(f"{n_cut:,} longer than a row (data.seq_len={config.seq_len}) are cut")
    if config.packing == "split":
        told.append("data.packing=split cuts some at the end of rows: best_fit keeps them whole")
    return "; ".join(told)
