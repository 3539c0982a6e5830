# SPDX-License-Identifier: Apache-2.0
"""Held-out sets by name: what words are called, and that sets change nothing of what is trained on."""

import numpy as np
import pytest

from hybridlm.data import load_tokenizer, make_loader, open_corpus, open_held_out
from hybridlm.data.abroad import describe, rebuild
from hybridlm.data.held_out import held_out_sets, patterns_of
from hybridlm.errors import ConfigError


def texts_of(corpus, split="val"):
    documents = corpus.split(split)
    tokens, offsets = documents.reader[np.arange(len(documents.reader))], np.asarray(documents.offsets)
    return [corpus.tokenizer.decode(ids) for ids in np.split(tokens, offsets[1:-1])]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), []),
        (("wiki.jsonl",), ["wiki"]),
        (("texts/wiki.jsonl.zst", "texts/code.parquet"), ["wiki", "code"]),
        (("wiki/val.jsonl", "code/val.jsonl"), ["wiki/val", "code/val"]),
        (("a/wiki/val.txt", "b/wiki/val.txt", "wiki.txt"), ["a/wiki/val", "b/wiki/val", "wiki"]),
        (("shards/wiki/", "s3://bucket/code/*.jsonl"), ["wiki", "code"]),
        (("texts/val-*.txt",), ["val"]),
        (("texts/[ab]*.txt",), ["texts"]),
        (("*",), ["val"]),
        (("en=a.txt", "de=b.txt", "en=c.txt"), ["en", "de"]),
        (("x/val.txt", "val=y.txt"), ["x/val", "val"]),
        (("./lang=en/x.txt", "name=s3://b/a=b.txt"), ["x", "name"]),
        (("v1.5/notes.en.md", "a.txt", "a.txt"), ["notes.en", "a"]),
    ],
)
def test_names(words, names):
    sets = held_out_sets(words)
    assert list(sets) == names
    given = [word.partition("=")[2] if word[0] not in "./" and "=" in word.split("/")[0] else word for word in words]
    assert sorted(patterns_of(words)) == sorted(set(given))


def test_what_no_name_tells_apart_is_one_line(config):
    for words in (("*", "val=x.txt"), ("a.txt", "a.jsonl")):
        with pytest.raises(ConfigError, match=r"data.val_path \(.*\): another set is called '\w+', too: give NAME="):
            config(val_path=words)


def check_same_batches(a, b):
    with a, b:
        for _ in range(6):
            for x, y in zip(next(a).values(), next(b).values(), strict=True):
                np.testing.assert_array_equal(x, y)


def test_sets_are_apart_and_none_is_trained_on(config, folder, texts):
    (folder / "c.jsonl").write_bytes((folder / "b.jsonl").read_bytes())
    several = config(val_path=(f"late={folder}/b.jsonl", f"{folder}/c.jsonl"))
    corpus = open_corpus(several)
    assert {name: texts_of(of) for name, of in corpus.held_out.items()} == {
        name: list(texts[50:]) for name in ("late", "c")
    }
    assert texts_of(corpus) == list(texts[50:]) * 2 and texts_of(corpus, "train") == list(texts[:50])
    assert corpus.stats["bigram_bits_per_byte"] is None
    assert corpus.stats["val"]["documents"] == 140
    alone = open_held_out(several, load_tokenizer())
    for name, of in corpus.held_out.items():
        assert alone[name].stats["val"] == of.stats["val"]
        check_same_batches(*(make_loader(several, split="val", corpus=c) for c in (alone[name], of)))
    told = rebuild(several, describe(corpus))
    assert {name: texts_of(of) for name, of in told.held_out.items()} == {n: list(texts[50:]) for n in ("late", "c")}


def test_how_many_sets_there_are_changes_no_batch(config, folder):
    """One set is what it was before sets had names: in one entry of the cache with the text that is trained on."""
    one, several = (
        config(val_path=(f"{folder}/b.jsonl",)),
        config(val_path=(f"x={folder}/b.jsonl", f"y={folder}/b.jsonl")),
    )
    corpus = open_corpus(one)
    assert list(corpus.held_out) == ["b"] and corpus.held_out["b"] is corpus and len(corpus.parts) == 1
    assert corpus.stats["bigram_bits_per_byte"] > 0
    check_same_batches(make_loader(one, seed=3), make_loader(several, seed=3))
    with make_loader(one, seed=3) as before, make_loader(several, seed=3) as after:
        next(before)
        assert after.set_state(before.get_state()) == ""
    share = open_corpus(config())
    assert list(share.held_out) == [""] and share.held_out[""] is share


def test_an_empty_set_is_one_line(config, folder, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"^data.val_path: the 1 files hold no text$"):
        open_corpus(config(val_path=(f"{folder}/b.jsonl", f"{tmp_path}/empty.txt")))
    weighted = config(
        path=(f"{folder}/a.jsonl",), weights=(1.0,), val_path=(f"x={folder}/b.jsonl", f"y={folder}/a.jsonl")
    )
    assert list(open_corpus(weighted).held_out) == ["x", "y"]
