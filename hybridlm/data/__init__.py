# SPDX-License-Identifier: Apache-2.0
"""Text to batches: sources, tokenizers, the token cache, packing and loading.

Nothing here computes with JAX; grain, tokenizers and pyarrow are imported by what uses them.
"""

from hybridlm.data.corpus import Corpus, open_corpus, open_held_out
from hybridlm.data.loader import Loader, host_rows, make_loader
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "Loader",
    "Tokenizer",
    "host_rows",
    "load_tokenizer",
    "make_loader",
    "open_corpus",
    "open_held_out",
]
