# SPDX-License-Identifier: Apache-2.0
"""The token cache: what it holds, when it is reused, and that nothing half-written is read."""

import collections
import errno
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybridlm.config import DataConfig
from hybridlm.data import corpus as corpus_module
from hybridlm.data import open_corpus, tokenise
from hybridlm.data.cache import copy_entry, find_entry
from hybridlm.data.corpus import in_validation
from hybridlm.errors import ConfigError

ROOT = Path(__file__).parents[2]
HELD_OUT = [6, 7, 13, 16, 29, 42, 52, 65, 87, 89, 92, 113, 152, 172]


def documents_of(corpus, name):
    split = corpus.split(name)
    return [corpus.tokenizer.decode(ids) for ids in np.split(split.tokens, split.offsets[1:-1])]


def entries(config):
    return [path for path in Path(config.cache_dir).iterdir() if not path.name.endswith(".lock")]


def python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


OPEN = """
import os, sys
from hybridlm.data import cache, corpus, tokenise
from hybridlm.data.config import DataConfig
config = DataConfig(path=(sys.argv[1],), val_fraction=0.2, cache_dir=sys.argv[2])
"""


def test_round_trip_and_split(config, texts):
    corpus = open_corpus(config())
    train, val = documents_of(corpus, "train"), documents_of(corpus, "val")
    ids = [f"a.jsonl:{i}" for i in range(50)] + [f"b.jsonl:{i}" for i in range(70)]
    assert train == [text for name, text in zip(ids, texts) if not in_validation(name, 0.2)]
    assert val == [text for name, text in zip(ids, texts) if in_validation(name, 0.2)]
    assert 10 <= len(val) <= 40
    for name, held in (("train", train), ("val", val)):
        stats = corpus.stats[name]
        n_bytes = sum(len(text.encode()) for text in held)
        assert stats["documents"] == len(held) and stats["bytes"] == n_bytes
        assert stats["tokens"] == n_bytes + 2 * len(held) and stats["pairs"] == n_bytes + len(held)
        assert stats["bytes_per_pair"] == pytest.approx(n_bytes / stats["pairs"])
    with pytest.raises(ValueError, match="split"):
        corpus.split("test")


def test_the_split_is_stable():
    """Ids held out at 5%, written down: another machine or version must choose the same."""
    held_out = [i for i in range(200) if in_validation(f"a.jsonl:{i}", 0.05)]
    assert held_out == HELD_OUT
    assert not any(in_validation(str(i), 0.0) for i in range(99))
    wider = {i for i in range(200) if in_validation(f"a.jsonl:{i}", 0.2)}
    assert set(held_out) < wider  # a larger share keeps what a smaller one held out


def test_bigram_baseline_against_counting(config):
    corpus = open_corpus(config())
    counts, rows = collections.Counter(), collections.Counter()
    for text in documents_of(corpus, "train"):
        symbols = [256, *text.encode(), 256]
        counts.update(itertools.pairwise(symbols))
        rows.update(symbols[:-1])
    bits = n_bytes = 0
    for text in documents_of(corpus, "val"):
        symbols = [256, *text.encode(), 256]
        bits -= sum(math.log2((counts[a, b] + 1) / (rows[a] + 257)) for a, b in itertools.pairwise(symbols))
        n_bytes += len(symbols) - 2
    assert corpus.stats["bigram_bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-12)


def test_cache_is_reused_and_keyed_by_content(config, folder, monkeypatch):
    first = open_corpus(config())
    built = []
    write = corpus_module.write_texts
    monkeypatch.setattr(corpus_module, "write_texts", lambda *a: built.append(1) or write(*a))
    assert open_corpus(config()).stats == first.stats and not built
    assert open_corpus(config(val_fraction=0.5)).fingerprint != first.fingerprint and len(built) == 1
    os.utime(folder / "a.jsonl", ns=(1, 1))
    shutil.copytree(folder, folder.parent / "elsewhere")
    for path in (folder, folder.parent / "elsewhere"):  # neither the time nor the place of a file matters
        assert open_corpus(config(path=(f"{path}/*.jsonl",))).stats == first.stats and len(built) == 1
    with open(folder / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert open_corpus(config()).fingerprint != first.fingerprint and len(built) == 2


def test_val_path_holds_out_whole_files_and_no_leak(config, folder, texts):
    corpus = open_corpus(config(val_path=(f"{folder}/b.jsonl",)))  # data.path matches it too
    assert documents_of(corpus, "train") == list(texts[:50])
    assert documents_of(corpus, "val") == list(texts[50:])
    with pytest.raises(ConfigError, match=r"data.val_path matches all of its files"):
        open_corpus(config(val_path=(f"{folder}/*.jsonl",)))
    with pytest.raises(ConfigError, match=r"data.val_path \('nowhere/\*'\): no file matches"):
        open_corpus(config(val_path=("nowhere/*",)))


def test_empty_documents_are_left_out(config, folder):
    (folder / "c.jsonl").write_text('{"text": ""}\n' * 3)
    assert open_corpus(config()).stats["empty_documents"] == 3
    with pytest.raises(ConfigError, match="hold no text"):
        open_corpus(config(path=(f"{folder}/c.jsonl",)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left for the token cache under"),
        (OSError(errno.EIO, "Input/output error"), "cannot write the token cache under"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_failed_build_leaves_nothing(config, monkeypatch, error, expected):
    def fail(self, documents):
        raise error

    monkeypatch.setattr(tokenise.BigramCounter, "add", fail)
    with pytest.raises(ConfigError if expected else KeyboardInterrupt) as caught:
        open_corpus(config())
    assert expected is None or (expected in str(caught.value) and "data.cache_dir" in str(caught.value))
    assert entries(config()) == []


def test_bad_input_halfway_leaves_nothing(config, folder):
    with open(folder / "b.jsonl", "a") as file:
        file.write("{oops\n")
    with pytest.raises(ConfigError, match=r"line 71 of .*b.jsonl is not JSON"):
        open_corpus(config())
    assert entries(config()) == []


def test_unusable_cache_folder(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the token cache under .*Not a directory.*set data.cache_dir"):
        open_corpus(config(cache_dir=str(tmp_path / "file" / "cache")))


def test_a_killed_build_is_not_read_and_is_cleaned_up(config):
    code = OPEN + "tokenise.BigramCounter.add = lambda *a: os._exit(9)\ncorpus.open_corpus(config)"
    killed = python(code, config().path[0], config().cache_dir)
    killed.communicate()
    assert killed.returncode == 9
    (left,) = entries(config())
    assert left.name.startswith(".tmp-")
    corpus = open_corpus(config())
    assert entries(config()) == [corpus.folder]


@pytest.mark.parametrize("damage", ["truncate", "remove", "stats"])
def test_a_damaged_entry_is_rebuilt(config, damage):
    before = open_corpus(config())
    tokens = before.split("train").tokens.tolist()
    if damage == "truncate":
        with open(before.folder / "train.tokens", "r+b") as file:
            file.truncate(100)
    elif damage == "remove":
        (before.folder / "val.offsets").unlink()
    else:
        (before.folder / "stats.json").write_text('{"trai')
    after = open_corpus(config())
    assert after.stats == before.stats and after.split("train").tokens.tolist() == tokens
    assert entries(config()) == [after.folder]


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_build_at_once_agree(config, locks):
    code = OPEN + (
        "cache.fcntl = cache.fcntl if sys.argv[3] == 'True' else None\n"
        "made = corpus.open_corpus(config)\nprint(made.fingerprint, made.split('train').tokens.sum())"
    )
    running = [python(code, config().path[0], config().cache_dir, str(locks)) for _ in range(3)]
    outputs = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0] and len(outputs) == 1
    assert len(entries(config())) == 1


def test_a_copy_is_the_entry_and_leaves_nothing_half_written(config, tmp_path):
    """What another host gets sent: `train.corpora` sends it, tests/pods/test_together.py by real processes."""
    original = open_corpus(config())
    key, stats, there = original.folder.name, json.loads(json.dumps(original.stats)), tmp_path / "there"

    def parts(until: int, changed: bytes = b""):
        for name in list(stats["files"])[:until]:
            content = (original.folder / name).read_bytes()
            yield name, content[:7]
            yield name, changed or content[7:]

    assert find_entry(there, key, stats) is None
    for sent in (parts(2), parts(9, b"other")):
        with pytest.raises(ConfigError, match=r"cannot write the token cache under .*there .*is not all there"):
            copy_entry(there, key, stats, sent)
        assert list(there.iterdir()) == []
    killed, at_work = (there / f".copy-{key}-{socket.gethostname()}-{name}" for name in "ab")
    for folder in (killed, at_work):
        folder.mkdir()
    os.utime(killed, (0, 0))
    copy_entry(there, key, stats, parts(9))
    found = find_entry(there, key, stats)
    for name in stats["files"]:
        assert (found / name).read_bytes() == (original.folder / name).read_bytes()
    assert set(there.iterdir()) == {found, at_work}


def test_large_vocabularies_take_four_bytes(config, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "words.txt").write_text("w1 w69999 w65536 w7")
    corpus = open_corpus(config(path=(f"{tmp_path}/words.txt",), tokenizer=str(tmp_path), val_fraction=0.0))
    split = corpus.split("train")
    assert split.tokens.dtype == np.uint32 and split.tokens.tolist() == [1, 69999, 65536, 7]
    assert corpus.stats["train"]["pairs"] == 3 and corpus.stats["bigram_bits_per_byte"] is None


def test_embedded_corpus(tmp_path):
    corpus = open_corpus(DataConfig(cache_dir=str(tmp_path)))
    stats = corpus.stats
    assert stats["train"]["bytes"] > 5e6 and stats["val"]["documents"] > 0
    assert 2.5 < stats["bigram_bits_per_byte"] < 4.5
    assert json.loads(json.dumps(stats)) == stats


def test_importing_the_package_is_light():
    heavy = "('flax', 'grain', 'pyarrow', 'tokenizers', 'torch')"
    code = f"import sys, hybridlm.data; print([name for name in {heavy} if name in sys.modules])"
    assert python(code).communicate()[0].strip() == "[]"


def test_a_long_document_is_tokenised_in_pieces(config, tmp_path, monkeypatch):
    """Of a few times its text in memory, and to the tokens that it has at once."""
    import tracemalloc

    n = 8_000_000
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "words and " * (n // 10)}) + "\n")
    long = config(path=(f"{tmp_path}/long.jsonl",), val_fraction=0.0)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1 << 20)
    tracemalloc.start()
    corpus = open_corpus(long)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 * n, f"{peak / n:.1f} bytes a character"
    monkeypatch.undo()
    at_once = open_corpus(config(path=(f"{tmp_path}/long.jsonl",), val_fraction=0.0, cache_dir=str(tmp_path / "two")))
    assert at_once.stats == corpus.stats and corpus.stats["train"]["bytes"] == n
