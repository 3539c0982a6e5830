# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that is no file, as the files that other libraries read."""

import json
from collections.abc import Mapping

from hybridlm.data.tokenizer import ByteTokenizer, Tokenizer

BOS, EOS = "<|bos|>", "<|eos|>"


def files_of(tokenizer: Tokenizer) -> Mapping[str, str]:
    """tokenizer.json and tokenizer_config.json of the byte tokenizer, by name; {} for others.

    The ids are the same, and a text gets its bos in front as in training; but a text that spells a special token
    becomes that token in transformers.
    """
    if not isinstance(tokenizer, ByteTokenizer):
        return {}
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    made = Tokenizer(models.BPE(vocab={_letter(byte): byte for byte in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (BOS, EOS)])
    frame = {"single": f"{BOS} $A", "pair": f"{BOS} $A {BOS} $B", "special_tokens": [(BOS, tokenizer.bos_id)]}
    made.post_processor = processors.TemplateProcessing(**frame)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
        "padding_side": "left", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return {"tokenizer.json": made.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}


def _letter(byte: int) -> str:
    """What byte-level vocabularies write for a byte: itself where it can be seen, else a letter from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in seen else chr(256 + [b for b in range(256) if b not in seen].index(byte))
