# SPDX-License-Identifier: Apache-2.0
"""Text, tokenizers and token caches in a bucket give what those on a disk give, to the bit."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridlm import storage
from hybridlm.cli import main
from hybridlm.data import corpus as corpus_module
from hybridlm.data import make_loader, open_corpus
from hybridlm.data.abroad import describe, rebuild
from hybridlm.data.config import DataConfig
from hybridlm.data.formats import open_source
from hybridlm.data.tokenizer import load_tokenizer
from hybridlm.errors import ConfigError
from hybridlm.storage import copies
from tests.data.support import write_nanogpt
from tests.storage.conftest import upload

pytestmark = pytest.mark.buckets
TEXTS = [f"document {i}: " + "äbc \U0001f40d\n" * (i * 7 % 23) for i in range(24)]


@pytest.fixture
def texts(tmp_path) -> Path:
    """The same texts as plain files, JSON lines, zipped ones and Parquet."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "texts"
    (folder / "plain").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / "plain" / f"{i:02}.txt").write_text(text)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "c.parquet", row_group_size=7)
    return folder


@pytest.fixture
def configs(texts, bucket, tmp_path) -> tuple[DataConfig, DataConfig]:
    """A config that reads and caches on the disk, and one that does both in the bucket."""
    upload(texts, f"{bucket}/texts")
    here = DataConfig(
        path=(f"{texts}/plain/*.txt",), val_path=(f"{texts}/a.jsonl",), seq_len=64, batch_size=4,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    far = replace(
        here, path=(f"{bucket}/texts/plain/*.txt",), val_path=(f"{bucket}/texts/a.jsonl",), cache_dir=f"{bucket}/cache"
    )
    return here, far


@pytest.fixture
def no_tokenising(monkeypatch):
    """From when it is called on, nothing may be tokenised."""

    def forbid():
        monkeypatch.setattr(corpus_module, "write_texts", lambda *_: pytest.fail("tokenised again"))

    return forbid


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.parquet", "plain"])
def test_every_format_reads_from_a_bucket(texts, bucket, name):
    upload(texts, f"{bucket}/texts")
    assert list(open_source(f"{bucket}/texts/{name}")) == list(open_source(f"{texts}/{name}")) != []


def test_another_host_opens_a_mixture_of_text_and_tokens(configs, bucket, tmp_path):
    (tmp_path / "tokens").mkdir()
    write_nanogpt(tmp_path / "tokens" / "a.bin", [[65, 66, 257], [67, 257]])
    upload(tmp_path / "tokens", f"{bucket}/tokens")
    mixed = replace(configs[1], path=(*configs[1].path, f"{bucket}/tokens/a.bin"), weights=(1.0, 2.0))
    corpus = open_corpus(mixed)
    assert rebuild(mixed, describe(corpus)).fingerprint == corpus.fingerprint


def test_a_damaged_object_is_one_line(texts, bucket):
    path = f"{bucket}/b.jsonl.gz"
    storage.write_bytes(storage.as_path(path), (texts / "b.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(ConfigError, match=rf"{path} is not a whole gzip file"):
        list(open_source(path))


def batches(config: DataConfig, corpus):
    with make_loader(config, seed=3, corpus=corpus) as loader:
        return [next(loader) for _ in range(5)]


def test_batches_are_those_of_the_disk(configs, monkeypatch, tmp_path, no_tokenising):
    """And so they are on a second machine, which copies the cache instead of tokenising."""
    here, far = configs
    expected = open_corpus(here)
    made = open_corpus(far)
    assert made.fingerprint == expected.fingerprint and made.folder.is_relative_to(tmp_path / "scratch")
    no_tokenising()
    monkeypatch.setenv("HYBRIDLM_SCRATCH", str(tmp_path / "another machine"))
    copied = open_corpus(far)
    assert copied.folder.is_relative_to(tmp_path / "another machine") and copied.stats == made.stats
    for a, b in zip(batches(here, expected), batches(far, copied), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_another_text_is_another_entry(configs, bucket):
    _, far = configs
    before = open_corpus(far)
    changed = storage.as_path(f"{bucket}/texts/plain/07.txt")
    storage.write_bytes(changed, storage.read_bytes(changed)[::-1].decode("latin-1").encode())
    assert open_corpus(far).fingerprint != before.fingerprint


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_cache_is_made_again(configs, bucket, monkeypatch, tmp_path, damage):
    """Here and in the bucket: the next machine finds it whole."""
    _, far = configs
    expected = open_corpus(far)
    tokens = storage.as_path(f"{bucket}/cache/{expected.folder.name}/train.tokens")
    content = storage.read_bytes(tokens)
    if damage == "missing":
        storage.remove(tokens)
    else:
        storage.write_bytes(tokens, bytes([content[0] ^ 1]) + content[1:])
    monkeypatch.setenv("HYBRIDLM_SCRATCH", str(tmp_path / "second"))
    assert open_corpus(far).fingerprint == expected.fingerprint
    assert storage.read_bytes(tokens) == content
    monkeypatch.setattr(corpus_module, "write_texts", lambda *_: pytest.fail("tokenised again"))
    monkeypatch.setenv("HYBRIDLM_SCRATCH", str(tmp_path / "third"))
    assert open_corpus(far).fingerprint == expected.fingerprint


def test_a_bucket_that_lost_the_entry_gets_it_again(configs, bucket, no_tokenising):
    """As after a build that could not be put there."""
    _, far = configs
    made = open_corpus(far)
    _, objects = storage.find(f"{bucket}/cache")
    for path in objects:
        storage.remove(path)
    no_tokenising()
    open_corpus(far)
    assert storage.is_published(storage.as_path(f"{bucket}/cache/{made.folder.name}"))


def test_a_tokenizer_in_a_bucket(bucket, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"]))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "</s>", "eos_token": "<s>"}))
    upload(folder, f"{bucket}/tokenizer")
    here = load_tokenizer(str(folder))
    for spec in (f"{bucket}/tokenizer", f"{bucket}/tokenizer/tokenizer.json"):
        far = load_tokenizer(spec)
        for field in ("fingerprint", "bos_id", "eos_id", "name", "vocab_size"):
            assert getattr(far, field) == getattr(here, field)
    with pytest.raises(ConfigError, match=r"data.tokenizer .*No such file"):
        load_tokenizer(f"{bucket}/none.json")


@pytest.mark.parametrize("field", ["path", "val_path", "cache_dir", "tokenizer"])
def test_a_missing_bucket_names_the_field(configs, field):
    """Before anything is tokenised."""
    here, _ = configs
    far = "s3://no-such-bucket/folder"
    with pytest.raises(ConfigError, match=rf"data\.{field} .*there is no bucket s3://no-such-bucket"):
        open_corpus(replace(here, **{field: (far,) if field.endswith("path") else far}))


def test_shards_in_a_bucket_are_copied_once(texts, bucket, tmp_path, monkeypatch):
    """Tokens are mapped: a machine has one copy, which follows the bucket. Batches are those of the folder."""
    shards = tmp_path / "shards"
    assert main(["tokenize", str(texts / "a.jsonl"), "--out", str(shards), "--workers", "1"]) == 0
    upload(shards, f"{bucket}/shards")
    here = DataConfig(path=(str(shards),), seq_len=64, batch_size=4, cache_dir=str(tmp_path / "cache"))
    far = replace(here, path=(f"{bucket}/shards",), cache_dir=f"{bucket}/cache")
    expected, found = open_corpus(here), open_corpus(far)
    assert found.fingerprint == expected.fingerprint
    for a, b in zip(batches(here, expected), batches(far, found), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    copy = copies.copy
    monkeypatch.setattr(copies, "copy", lambda *_: pytest.fail("copied again"))
    assert open_corpus(far).fingerprint == expected.fingerprint
    assert open_corpus(replace(far, path=(f"{bucket}/sha*/*",))).fingerprint == expected.fingerprint
    monkeypatch.setattr(copies, "copy", copy)
    manifest = storage.as_path(f"{bucket}/shards/manifest.json")
    storage.write_bytes(manifest, storage.read_bytes(manifest)[:-20])
    with pytest.raises(ConfigError, match="manifest"):
        open_corpus(far)


def test_tokens_of_other_programs_in_a_bucket(bucket, tmp_path):
    tokens = np.tile(np.arange(97, 123, dtype=np.uint16), 40)
    tokens[::26] = 256
    tokens.tofile(tmp_path / "tokens.bin")
    upload(tmp_path, bucket)
    here = DataConfig(path=(str(tmp_path / "tokens.bin"),), seq_len=16, batch_size=4, cache_dir=str(tmp_path / "cache"))
    far = replace(here, path=(f"{bucket}/tokens.bin",))
    assert open_corpus(far).fingerprint == open_corpus(here).fingerprint


def test_text_in_a_bucket_becomes_the_same_shards(texts, bucket, tmp_path):
    """Read by two worker processes."""
    upload(texts, f"{bucket}/texts")
    made = []
    for name, source in (("here", texts), ("far", f"{bucket}/texts")):
        words = ["tokenize", f"{source}/plain", f"{source}/b.jsonl.gz", "--out", str(tmp_path / name), "--workers", "2"]
        assert main(words) == 0
        made.append({file.name: file.read_bytes() for file in (tmp_path / name).glob("*.array_record*")})
    assert made[0] == made[1] and made[0]


def test_shards_are_not_written_to_a_bucket(texts, bucket, capsys):
    assert main(["tokenize", str(texts / "a.jsonl"), "--out", f"{bucket}/shards"]) == 2
    assert "is in a bucket: tokenise into a folder" in capsys.readouterr().err
