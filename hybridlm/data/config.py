# SPDX-License-Identifier: Apache-2.0
"""Text, its tokens, and the rows that they are packed into."""

from dataclasses import dataclass

from hybridlm.errors import require


@dataclass(frozen=True)
class DataConfig:
    """Text, its tokens, and the rows that they are packed into."""

    path: tuple[str, ...] = ()
    """Glob patterns of .txt, .jsonl or .parquet files; empty: the embedded corpus (Python's standard library)."""
    val_path: tuple[str, ...] = ()
    """Glob patterns of validation files; empty: a share of the training files, chosen by a hash of their names."""
    val_fraction: float = 0.02
    """Share of the documents held out where val_path is empty."""
    text_key: str = "text"
    """Field of a .jsonl line or column of a .parquet file that holds the text."""
    tokenizer: str = "byte"
    """byte, or the path of a tokenizer.json."""
    bos_token: str | None = None
    """Token put before each document; None: found among the tokenizer's special tokens."""
    eos_token: str | None = None
    """Token put after each document; None: found among the tokenizer's special tokens."""
    seq_len: int = 4096
    """Tokens T of a row."""
    batch_size: int = 16
    """Rows B of an optimizer step, over all devices and accumulated microbatches."""
    cache_dir: str = "~/.cache/hybridlm"
    """Folder of tokenised corpora."""
    workers: int = 0
    """Grain worker processes; 0: threads of this process. Batches do not depend on it."""
    prefetch: int = 4
    """Batches read ahead."""

    def __post_init__(self):
        require(self.seq_len > 0, f"data.seq_len ({self.seq_len}) must be positive")
        require(self.batch_size > 0, f"data.batch_size ({self.batch_size}) must be positive")
        require(0 <= self.val_fraction < 1, f"data.val_fraction ({self.val_fraction}) must be in [0, 1)")
        require(self.workers >= 0, f"data.workers ({self.workers}) must not be negative")
        require(self.prefetch >= 1, f"data.prefetch ({self.prefetch}) must be at least 1")
