# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE trained on text, by the tokenizers library."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from hybridlm import storage
from hybridlm.data.formats import Source, in_validation
from hybridlm.errors import require

END_OF_TEXT = "<|endoftext|>"
LEAST, MOST = 257, 1 << 20
PART = "bpe"


def check_size(vocab_size: int) -> None:
    """ConfigError for a number of tokens that cannot be."""
    require(
        LEAST <= vocab_size <= MOST, f"--train-bpe ({vocab_size}) must be {LEAST}..{MOST}: 256 bytes, one mark, merges"
    )


def train_bpe(source: Source, vocab_size: int, target: Path, most_bytes: int, tell: Callable[[int], None]) -> None:
    """Writes a tokenizer.json with `vocab_size` tokens: the 256 bytes, the token between documents, merges.

    most_bytes: beyond so much text a share of the documents is read, chosen by a hash of their names. tell: called with
    the characters read so far.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    total = sum(storage.size(file.path) for file in source.files)
    share = min(1.0, most_bytes / max(total, 1))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(source, share, tell), trainer)
    part = target.with_name(target.name + ".part")
    tokenizer.save(str(part))
    os.replace(part, target)


def _texts(source: Source, share: float, tell: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for document in source:
        done += len(document.text)
        tell(done)
        if share >= 1.0 or in_validation(f"{PART}:{document.id}", share):
            yield document.text
