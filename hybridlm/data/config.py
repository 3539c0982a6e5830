# SPDX-License-Identifier: Apache-2.0
"""Text, its tokens, and the rows that they are packed into."""

import math
from dataclasses import dataclass, field
from typing import Literal

from hybridlm.data.held_out import held_out_sets
from hybridlm.errors import require
from hybridlm.fields import MOST, check_fields

MAX_WORKERS = 64
MAX_PREFETCH = 1024


@dataclass(frozen=True)
class DataConfig:
    """Text, its tokens, and the rows that they are packed into."""

    path: tuple[str, ...] = ()
    """Glob patterns of text (.txt, .jsonl, .parquet, .fasta), or of tokens: folders of `hybridlm tokenize`, Megatron's
    .bin with .idx, nanoGPT's .bin; in buckets, too (s3://, gs://). Empty: the embedded corpus (Python's standard
    library)."""
    weights: tuple[float, ...] = ()
    """Share of the rows that each pattern of path gives, in their order, as a mixture; empty: all of path is one
    corpus."""
    epochs: tuple[float, ...] = ()
    """Most passes over each pattern of path; 0, or empty: without end. What one no longer gives, the others do."""
    val_path: tuple[str, ...] = ()
    """Held-out sets, each a glob pattern or NAME=PATTERN, with a loss of its own; empty: a share of the training files,
    chosen by a hash of their names (of tokens: what was held out when they were made, or the end of each file)."""
    val_fraction: float = 0.02
    """Share of the documents held out where val_path is empty."""
    format: Literal["text", "chat"] = "text"
    """What .jsonl and .parquet files hold: text, or conversations (messages, conversations), of which what the
    assistant says is trained on alone; there, text is still read from what holds no messages."""
    text_key: str = "text"
    """Field of a .jsonl line or column of a .parquet file that holds the text."""
    tokenizer: str = "byte"
    """byte, dna, or the path of a tokenizer.json; empty: to be given, for a published checkpoint that comes without."""
    bos_token: str | None = None
    """Token put before each document; None: found among the tokenizer's special tokens."""
    eos_token: str | None = None
    """Token put after each document; None: found among the tokenizer's special tokens."""
    reverse_complement: bool = False
    """Half of the documents in training rows, drawn anew for each row of each step, are read from the other strand."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents fill rows: laid end to end and cut, or whole where a row can hold them, with some padding."""
    seq_len: int = 4096
    """Tokens T of a row."""
    batch_size: int = 16
    """Rows B of an optimizer step, over all devices and accumulated microbatches."""
    cache_dir: str = "~/.cache/hybridlm"
    """Folder of tokenised corpora; of one in a bucket, each machine makes a copy."""
    workers: int = field(default=0, metadata={MOST: math.inf})
    """Grain worker processes; 0: threads of this process. Batches do not depend on it."""
    prefetch: int = field(default=4, metadata={MOST: math.inf})
    """Batches read ahead."""

    def __post_init__(self):
        check_fields(self, "data.")
        held_out_sets(self.val_path)
        require(self.seq_len > 0, f"data.seq_len ({self.seq_len}) must be positive")
        require(self.batch_size > 0, f"data.batch_size ({self.batch_size}) must be positive")
        require(0 <= self.val_fraction < 1, f"data.val_fraction ({self.val_fraction}) must be in [0, 1)")
        require(
            0 <= self.workers <= MAX_WORKERS,
            f"data.workers ({self.workers}) must be 0..{MAX_WORKERS} processes of each host",
        )
        require(
            1 <= self.prefetch <= MAX_PREFETCH,
            f"data.prefetch ({self.prefetch}) must be 1..{MAX_PREFETCH} batches: each host holds as many",
        )
        require(
            not self.reverse_complement or self.tokenizer == "dna",
            f"data.reverse_complement needs data.tokenizer=dna, not {self.tokenizer}: others have no complement",
        )
        for name, values in (("weights", self.weights), ("epochs", self.epochs)):
            require(
                len(values) in (0, len(self.path)),
                f"data.{name} has {len(values)} numbers for the {len(self.path)} patterns of data.path: give one each",
            )
            for value in values:
                require(0 <= value < math.inf, f"data.{name} ({value}) must be a number from 0 on")
        require(
            all(w > 0 for w in self.weights), f"data.weights {self.weights} must be positive: leave out what has none"
        )
        require(
            not self.epochs or bool(self.weights) or len(self.path) == 1,
            "data.epochs counts passes over each pattern of data.path: give data.weights too",
        )
