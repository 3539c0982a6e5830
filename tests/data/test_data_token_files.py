# SPDX-License-Identifier: Apache-2.0
"""Files of tokens of other programs give the batches that the text itself gives."""

import os

import numpy as np
import pytest

from hybridlm.data import make_loader, open_corpus
from hybridlm.errors import ConfigError, DataError
from tests.data.support import check_equal, mutate, take, write_megatron, write_nanogpt


@pytest.fixture
def documents(config):
    """Token ids of the documents of the texts, in order, and a loader's batches of them."""
    corpus = open_corpus(config(val_fraction=0.0))
    split = corpus.split("train")
    batches = take(make_loader(config(val_fraction=0.0), seed=5, corpus=corpus), 20)
    return np.split(split.tokens, split.offsets[1:-1]), batches


def open_files(config, path, **fields):
    return open_corpus(config(path=(str(path),), **({"val_fraction": 0.0} | fields)))


@pytest.mark.parametrize("kind", ["uint16", "int32", "int64", "header", "plain", "two files", "prefix"])
def test_same_documents_same_batches(config, documents, tmp_path, kind):
    documents, batches = documents
    path = tmp_path / "tokens"
    code = {"int32": 4, "int64": 5}.get(kind, 8)
    if kind in ("uint16", "int32", "int64", "prefix"):
        write_megatron(path, documents, "uint16" if kind == "prefix" else kind, code)
    elif kind == "two files":
        write_megatron(tmp_path / "tokens-0", documents[:31])
        write_megatron(tmp_path / "tokens-1", documents[31:])
    else:
        write_nanogpt(tmp_path / "tokens.bin", documents, header=kind == "header")
    pattern = path if kind == "prefix" else tmp_path / ("tokens-*" if kind == "two files" else "tokens.bin")
    corpus = open_files(config, pattern)
    check_equal(take(make_loader(config(val_fraction=0.0), seed=5, corpus=corpus), 20), batches)
    train = corpus.stats["train"]
    texts = open_corpus(config(val_fraction=0.0)).stats["train"]
    assert {key: train[key] for key in ("documents", "tokens", "pairs", "bytes")} == {
        key: texts[key] for key in ("documents", "tokens", "pairs", "bytes")
    }


def test_documents_end_after_eos_where_the_file_starts_with_none(config, tmp_path):
    write_nanogpt(tmp_path / "a.bin", [[65, 66, 257], [67, 257], [68, 69]])
    split = open_files(config, tmp_path / "a.bin").split("train")
    assert split.offsets.tolist() == [0, 3, 5, 7]


def test_the_end_of_each_file_is_held_out(config, documents, tmp_path):
    documents, _ = documents
    write_nanogpt(tmp_path / "a.bin", documents)
    corpus = open_files(config, tmp_path / "a.bin", val_fraction=0.1)
    n = corpus.stats["val"]["documents"]
    assert 0.05 < corpus.stats["val"]["tokens"] / sum(map(len, documents)) < 0.2
    val = corpus.split("val")
    np.testing.assert_array_equal(val.tokens[np.arange(len(val.tokens))], np.concatenate(documents[-n:]))
    assert corpus.stats["train"]["documents"] == len(documents) - n
    write_nanogpt(tmp_path / "one.bin", [[65] * 100])
    one = open_files(config, tmp_path / "one.bin", val_fraction=0.1).stats
    assert (one["train"]["tokens"], one["val"]["tokens"]) == (90, 10)
    own = open_files(config, tmp_path / "a.bin", val_path=(str(tmp_path / "one.bin"),))
    assert own.stats["val"]["tokens"] == 100 and own.stats["train"]["documents"] == len(documents)


def test_text_and_tokens_mix_with_weights_alone(config, documents, folder, tmp_path):
    write_nanogpt(tmp_path / "a.bin", documents[0])
    paths = (f"{folder}/*.jsonl", str(tmp_path / "a.bin"))
    corpus = open_corpus(config(path=paths, weights=(1, 3)))
    batches = take(make_loader(config(path=paths, weights=(1, 3)), corpus=corpus), 3)
    assert len(batches) == 3 and corpus.stats["val"]["documents"] > 0
    with pytest.raises(ConfigError, match=r"names text .*.jsonl.* and tokens .*a.bin.*: give them as two .*, with"):
        open_corpus(config(path=paths))
    with pytest.raises(ConfigError, match=r"data.val_path names text .* and tokens .*: give them as two patterns$"):
        open_corpus(config(val_path=tuple(f"one={path}" for path in paths)))


def test_identity_is_content(config, documents, tmp_path):
    documents, _ = documents
    fingerprints = []
    for name, changed in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        write_nanogpt(tmp_path / name / f"{name}.bin", [documents[0] ^ changed, *documents[1:]])
        corpus = open_files(config, tmp_path / name / f"{name}.bin")
        fingerprints.append(corpus.stats["train"]["fingerprint"])
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda b, i: (b, i[:-9]), "a.idx has .* bytes instead of .*: it is cut"),
        (lambda b, i: (b, b"x" + i[1:]), "a.idx is no index of Megatron's"),
        (lambda b, i: (b, i[:9] + b"\7" + i[10:]), "a.idx has version 7 and type 8"),
        (lambda b, i: (b[:-2], i), "a.bin has .* bytes, its index tells of .* tokens of 2: one is cut"),
        (lambda b, i: (b, i[:34] + b"\1" + i[35:]), "a.idx: its sequences do not lie end to end in a.bin"),
        (lambda b, i: (b, i[:-8] + b"\1" + i[-7:]), "a.idx: its documents do not ascend from sequence 0"),
        (lambda b, i: (b"\xff\xff" + b[2:], i), "a.bin has the id 65535, which data.tokenizer byte with its 258"),
    ],
)
def test_damaged_megatron_files_are_named_in_one_line(config, documents, tmp_path, damage, expected):
    write_megatron(tmp_path / "a", documents[0])
    raw = damage(*((tmp_path / f"a.{end}").read_bytes() for end in ("bin", "idx")))
    for end, content in zip(("bin", "idx"), raw):
        (tmp_path / f"a.{end}").write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        open_files(config, tmp_path / "a.bin")
    assert "\n" not in str(caught.value)


def test_cut_nanogpt_files_are_named_in_one_line(config, documents, tmp_path):
    write_nanogpt(tmp_path / "a.bin", documents[0], header=True)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").write_bytes(b"")
    for name, expected in (("cut", "behind a header that says"), ("odd", "no whole uint16"), ("empty", "no tokens")):
        with pytest.raises(ConfigError, match=rf"{name}.bin .*{expected}"):
            open_files(config, tmp_path / f"{name}.bin")


def test_a_file_that_is_cut_in_mid_run_is_one_line(config, documents, tmp_path):
    """Mapped, it would end the process by a signal."""
    write_nanogpt(tmp_path / "a.bin", documents[0])
    with make_loader(config(val_fraction=0.0), corpus=open_files(config, tmp_path / "a.bin")) as loader:
        next(loader)
        os.truncate(tmp_path / "a.bin", 100)
        with pytest.raises(DataError, match=r"a.bin was cut while it was read$"):
            for _ in range(50):
                next(loader)


def test_mutated_files_are_told_or_read(config, documents, tmp_path):
    rng = np.random.default_rng(3)
    write_megatron(tmp_path / "a", documents[0])
    good = {end: (tmp_path / f"a.{end}").read_bytes() for end in ("bin", "idx")}
    refused = 0
    for _ in range(60):
        end = ("bin", "idx")[int(rng.integers(2))]
        for name, raw in good.items():
            (tmp_path / f"a.{name}").write_bytes(mutate(raw, rng) if name == end else raw)
        try:
            open_files(config, tmp_path / "a.bin", val_fraction=0.1)
        except ConfigError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30
