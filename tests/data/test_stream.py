# SPDX-License-Identifier: Apache-2.0
"""TextStream against brute force over the text of all tokens so far: what it gives, holds back, and where it stops."""

import functools
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hybridlm.data.stream import TextStream
from hybridlm.data.tokenizer import ByteTokenizer, load_tokenizer
from hybridlm.errors import ConfigError
from tests.data.test_data_tokenizer import bpe_path  # noqa: F401 (a fixture)

BYTES = ByteTokenizer()
TEXT = st.text(st.sampled_from("ab\n é€😀"), max_size=150)
STOPS = st.lists(st.text(st.sampled_from("ab\né€😀"), min_size=1, max_size=4), max_size=3)


load = functools.cache(load_tokenizer)


def brute(tokenizer, ids, stops, eos):
    """(text, tokens read, reason): token by token, the whole text decoded each time."""
    for n in range(1, len(ids) + 1):
        if ids[n - 1] == eos:
            text = tokenizer.decode(ids[: n - 1])
            return text, n, "eos"
        text = tokenizer.decode(ids[:n])
        found = [text.find(word) for word in stops if word in text]
        if found:
            return text[: min(found)], n, "stop"
    return tokenizer.decode(ids), len(ids), "length"


def stream(tokenizer, ids, stops, eos, sizes=(1,)):
    written, pieces, at, turn = TextStream(tokenizer, stops, (eos,)), [], 0, 0
    while at < len(ids) and written.reason is None:
        size = sizes[turn % len(sizes)]
        pieces.append(written.push(ids[at : at + size]))
        at, turn = at + size, turn + 1
    pieces.append(written.end())
    assert "".join(pieces) == written.text
    assert written.push([65]) == "" == written.end()
    return written


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@given(text=TEXT, stops=STOPS, cut=st.integers(0, 200), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3))
@example("aaab", ["aab"], 200, [1])
@example("ab" * 70 + "€", ["b€"], 200, [1])
@example("x" * 150 + "ab", ["b", "ab"], 200, [2])
def test_as_brute_force(kind, bpe_path, text, stops, cut, sizes):  # noqa: F811
    tokenizer = BYTES if kind == "byte" else load(str(bpe_path))
    ids = tokenizer.encode(text).tolist()
    ids = [*ids[:cut], tokenizer.eos_id, *ids[cut:]]
    written = stream(tokenizer, ids, stops, tokenizer.eos_id, sizes)
    expected, n, reason = brute(tokenizer, ids, stops, tokenizer.eos_id)
    assert (written.text, len(written.ids), written.reason) == (expected, n, reason)


@given(ids=st.lists(st.integers(0, 255), max_size=300))
def test_bytes_that_are_no_text(ids):
    """Whatever a model writes: the text is that of all tokens, and never more than three characters are held back."""
    written = TextStream(BYTES)
    for n, i in enumerate(ids, 1):
        written.push([i])
        assert written.reason is None
        whole = BYTES.decode(ids[:n])
        assert whole.startswith(written.text) or whole[: len(written.text)].rstrip("\ufffd") == ""
        assert len(whole) - len(written.text) <= 3
    written.end()
    assert written.text == BYTES.decode(ids)


@given(text=TEXT)
def test_nothing_is_taken_back(text):
    """Each piece is whole characters, and comes as soon as its last byte and no stop string can begin in it."""
    written = TextStream(BYTES, ["ab"])
    shown, ids = "", BYTES.encode(text).tolist()
    for n, i in enumerate(ids, 1):
        shown += written.push([i])
        if written.reason:
            break
        known = bytes(ids[:n]).decode("utf-8", "ignore")
        assert shown == (known[:-1] if known.endswith("a") else known)
    assert "\ufffd" not in shown


def test_a_tokenizer_that_strips_the_start(tmp_path):
    """As SentencePiece: a space in front of the first word is not written, that of a later one is."""
    vocab = {"?": 0, "▁the": 1, "▁a": 2, "s": 3, "</s>": 4}
    words = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = np.random.default_rng(0).integers(1, 4, 400).tolist()
    written = stream(tokenizer, ids, ["sssssss"], -1)
    expected, n, _ = brute(tokenizer, ids, ["sssssss"], -1)
    assert written.text == expected and len(written.ids) == n and written._first > 200


def test_long_texts_are_decoded_in_windows(monkeypatch):
    sizes = []
    decode = ByteTokenizer.decode
    monkeypatch.setattr(ByteTokenizer, "decode", lambda self, ids: sizes.append(len(ids)) or decode(self, ids))
    written = stream(BYTES, BYTES.encode("word and " * 500).tolist(), [], 257)
    assert written.text == "word and " * 500 and max(sizes) < 80


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match=re.escape("stop ('') must not be empty")):
        TextStream(BYTES, ["a", ""])
