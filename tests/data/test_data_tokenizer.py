# SPDX-License-Identifier: Apache-2.0
"""Text comes back from its tokens; document ends are found; bad files are one line."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hybridlm.data.tokenizer import ByteTokenizer, load_tokenizer
from hybridlm.errors import ConfigError
from tests.data.support import mutate

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


def train_bpe(path, special=("<s>", "</s>"), vocab_size=320):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet)
    bpe.train_from_iterator(["the theme of the thesis is there " * 20], trainer)
    bpe.save(str(path))
    return bpe


@pytest.fixture(scope="module")
def bpe_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(path)
    return path


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@given(texts=st.lists(TEXT, max_size=8))
def test_round_trip_and_batches(kind, bpe_path, texts):
    tokenizer = load_tokenizer("byte" if kind == "byte" else str(bpe_path))
    tokens, lengths = tokenizer.encode_batch(texts)
    assert tokens.dtype == np.int32 and lengths.sum() == len(tokens) and len(lengths) == len(texts)
    for text, ids in zip(texts, np.split(tokens, np.cumsum(lengths)[:-1]) if texts else ()):
        np.testing.assert_array_equal(ids, tokenizer.encode(text, bos=True, eos=True))
        assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
        np.testing.assert_array_equal(ids[1:-1], tokenizer.encode(text))
        assert tokenizer.decode(ids) == text == tokenizer.decode(tokenizer.encode(text))
        assert ids.max() < tokenizer.vocab_size


def test_byte_ids_and_tolerant_decoding():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([256, 104, 0xC3, 105, 257, 300, -1]) == "h\ufffdi"
    assert tokenizer.encode("\ud800").tolist() == [ord("?")]


def test_unknown_and_special_ids_are_dropped(bpe_path):
    tokenizer = load_tokenizer(str(bpe_path))
    ids = tokenizer.encode("the thesis", bos=True, eos=True)
    assert tokenizer.decode([*ids, 10**6, -3, tokenizer.vocab_size]) == "the thesis"


def test_text_cannot_forge_a_boundary(bpe_path):
    tokenizer = load_tokenizer(str(bpe_path))
    ids = tokenizer.encode("a</s><s>b")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == "a</s><s>b"


def test_template_truncation_and_padding_of_the_file_are_off(tmp_path):
    bpe = train_bpe(tmp_path / "tokenizer.json")
    plain = load_tokenizer(str(tmp_path / "tokenizer.json")).encode_batch(["the thesis", "x"])[0]
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    bpe.enable_truncation(3)
    bpe.enable_padding(length=12)
    bpe.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(load_tokenizer(str(tmp_path)).encode_batch(["the thesis", "x"])[0], plain)


def test_document_ends_are_found_declared_or_given(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_bpe(path, special=("<|endoftext|>", "<pad>", "<end>"))
    found = load_tokenizer(str(path))
    assert found.bos_id == found.eos_id == 0  # one token for both ends
    declared = {"bos_token": {"content": "<pad>"}, "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    beside = load_tokenizer(str(path))
    assert (beside.bos_id, beside.eos_id) == (1, 2)
    given_ = load_tokenizer(str(path), bos="<end>", eos="<pad>")
    assert (given_.bos_id, given_.eos_id) == (2, 1)
    assert len({found.fingerprint, beside.fingerprint, given_.fingerprint}) == 3
    (tmp_path / "tokenizer_config.json").unlink()
    train_bpe(path, special=())
    bare = load_tokenizer(str(path))
    assert bare.bos_id is None and bare.eos_id is None
    assert bare.encode("the", bos=True, eos=True).tolist() == bare.encode("the").tolist()


def test_errors_are_one_line(tmp_path, bpe_path):
    (tmp_path / "bad.json").write_text('{"model": 3}')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    cases = [
        (
            (str(tmp_path / "none.json"),),
            {},
            'No such file or directory; give "byte", "dna" or the path of a tokenizer.json',
        ),
        ((str(tmp_path / "bad.json"),), {}, "is no tokenizer.json"),
        ((str(tmp_path / "binary.json"),), {}, "is no tokenizer.json"),
        ((str(bpe_path),), {"eos": "<stop>"}, "data.eos_token ('<stop>') is no token of"),
        (("byte",), {"bos": "<s>"}, "the byte tokenizer has its own"),
    ]
    for arguments, keywords, expected in cases:
        with pytest.raises(ConfigError) as caught:
            load_tokenizer(*arguments, **keywords)
        assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("config", ["[]", "null", "3", '{"bos_token": [1]}', '{"eos_token": 7}', "[" * 100_000])
def test_other_tokenizer_configs_are_one_line(tmp_path, config):
    train_bpe(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_tokenizers_that_fail_on_text_are_one_line(tmp_path):
    """Vocabularies without unknown text raise bare Exceptions, and some settings panic, which is no Exception."""
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    unigram = Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], None, False))
    unigram.save(str(tmp_path / "unigram.json"))
    train_bpe(tmp_path / "bpe.json")
    settings = json.loads((tmp_path / "bpe.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    (tmp_path / "replace.json").write_text(json.dumps(settings))
    told = 0
    for name in ("words", "unigram", "replace"):
        try:
            tokenizer = load_tokenizer(str(tmp_path / f"{name}.json"))
            tokenizer.encode("zz zz")
            tokenizer.encode_batch(["zz", "a"])
        except ConfigError as error:
            assert "\n" not in str(error) and "data.tokenizer" in str(error)
            told += 1
    assert told >= 2


def test_bytes_of_ids_are_those_of_the_text(bpe_path):
    texts = ["the thesis", "äß \U0001f40d there\n", ""]
    for tokenizer in (ByteTokenizer(), load_tokenizer(str(bpe_path))):
        ids, _ = tokenizer.encode_batch(texts)
        assert tokenizer.byte_lengths()[ids].sum() == sum(len(text.encode()) for text in texts)


@given(text=TEXT, size=st.integers(1, 9))
def test_a_document_in_pieces_is_the_document(text, size):
    pieces = list(ByteTokenizer().encode_pieces(text, size))
    np.testing.assert_array_equal(np.concatenate(pieces), ByteTokenizer().encode(text, bos=True, eos=True))


def test_mutated_tokenizers_are_told_or_work(tmp_path, bpe_path):
    rng = np.random.default_rng(0)
    raw = bpe_path.read_bytes()
    told = 0
    for _ in range(60):
        (tmp_path / "tokenizer.json").write_bytes(mutate(raw, rng))
        try:
            tokenizer = load_tokenizer(str(tmp_path))
            tokenizer.decode(tokenizer.encode("the theme\n"))
        except ConfigError as error:
            assert "\n" not in str(error)
            told += 1
    assert told > 30
