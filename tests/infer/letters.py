# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of letters, whose ids are all text, for models of model_support: what they write can be read again."""

import numpy as np

from tests.model.model_support import VOCAB

LETTERS = "abcdefghijklmnopqrstuvwxyz \n."
assert len(LETTERS) == VOCAB


class Letters:
    """One id a letter; what is no letter reads as a dot."""

    name = fingerprint = "letters"
    vocab_size = VOCAB
    bos_id = None

    def __init__(self, eos_id: int | None = None):
        self.eos_id = eos_id

    def encode(self, text, *, bos=False, eos=False):
        ids = [LETTERS.find(c) for c in text.lower()]
        return np.array([VOCAB - 1 if i < 0 else i for i in ids], np.int32)

    def encode_template(self, text, spelled=()):
        return self.encode(text), np.arange(len(text))

    def decode(self, ids):
        return "".join(LETTERS[i] for i in ids if i != self.eos_id)
