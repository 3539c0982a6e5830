# SPDX-License-Identifier: Apache-2.0
"""What text is, is its bytes; what the cache holds is checked whenever it is opened."""

import json
import logging
import os
import shutil
import subprocess
import time

import numpy as np
import pytest

from hybridlm.data import identity, make_loader, open_corpus
from hybridlm.data.abroad import describe, rebuild
from hybridlm.data.cache import copy_entry
from hybridlm.data.identity import content_hashes
from hybridlm.errors import ConfigError
from tests.data.support import check_equal, flip, mutate, take, write_nanogpt


def tokens_of(corpus):
    return [np.asarray(corpus.split(name).tokens).tolist() for name in ("train", "val")]


def test_files_of_equal_name_size_and_time_are_told_apart(config, tmp_path):
    read = []
    for folder, letter in (("A1", "a"), ("A2", "b")):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "x.jsonl"
        file.write_text(json.dumps({"text": letter * 99}) + "\n")
        os.utime(file, ns=(10**18, 10**18))
        read.append(tokens_of(open_corpus(config(path=(str(file),), val_fraction=0.0)))[0][1])
    assert read == [ord("a"), ord("b")]


def test_a_file_that_is_rewritten_with_its_size_and_time_kept_is_read_again(config, tmp_path, monkeypatch):
    """As rsync -t and cp -p do; even where hashes are remembered, without waiting for them to settle."""
    monkeypatch.setattr(identity, "_settled", lambda status: True)
    file, other = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    for path, letter in ((file, "a"), (other, "b")):
        path.write_text(json.dumps({"text": letter * 99}) + "\n")
        os.utime(path, ns=(10**18, 10**18))
    one = lambda: chr(tokens_of(open_corpus(config(path=(str(file),), val_fraction=0.0)))[0][1])
    assert one() == "a"
    time.sleep(0.05)
    subprocess.run(["cp", "-p", other, file], check=True)
    assert file.stat().st_mtime_ns == 10**18 and one() == "b"
    time.sleep(0.05)
    file.write_text(file.read_text().replace("b", "c"))
    os.utime(file, ns=(10**18, 10**18))
    assert one() == "c"
    time.sleep(0.05)
    other.write_text(other.read_text().replace("b", "d"))
    os.utime(other, ns=(10**18, 10**18))
    os.replace(other, file)
    assert one() == "d"


def test_hashes_are_remembered_where_the_system_tells_of_changes(tmp_path, monkeypatch):
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_text(file.name)
    hashed = []
    piece = identity._hash_piece
    monkeypatch.setattr(identity, "_hash_piece", lambda file, *rest: hashed.append(file.name) or piece(file, *rest))
    expected = content_hashes(files)
    assert sorted(hashed) == ["a", "b"]
    content_hashes(files, tmp_path / "memory")
    assert len(hashed) == 4 and not (tmp_path / "memory").exists()  # written just now: not remembered
    monkeypatch.setattr(identity, "_settled", lambda status: True)
    assert content_hashes(files, tmp_path / "memory") == expected and len(hashed) == 6
    assert content_hashes(files, tmp_path / "memory") == expected and len(hashed) == 6
    flip(tmp_path / "memory" / identity.MEMORY, np.random.default_rng(0))
    assert content_hashes(files, tmp_path / "memory") == expected and len(hashed) == 8
    (tmp_path / "memory" / identity.MEMORY).unlink()
    content_hashes(files, tmp_path / "memory")
    monkeypatch.undo()
    assert not identity._settled(files[0].stat())
    old = os.stat_result((*files[0].stat()[:9], 0.0), {"st_ctime_ns": 0, "st_dev": files[0].stat().st_dev})
    monkeypatch.setattr(identity, "_trusted_devices", lambda: frozenset())
    assert not identity._settled(old)  # of a file system that is not known to keep the time of changes


def test_only_local_file_systems_are_trusted():
    lines = [
        "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n",
        "37 35 0:41 / /data rw shared:2 - nfs4 server:/data rw\n",
        "38 35 0:42 / / rw - overlay overlay rw\n",
        "39 35 7:3 / /image ro - squashfs /dev/loop3 ro\n",
    ]
    assert list(identity._device_of_mounts(lines)) == [os.makedev(98, 0)]


def test_a_large_file_is_hashed_by_pieces(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    raw = rng.bytes(1_000_000)
    seen = set()
    monkeypatch.setattr(identity, "PIECE", 100_000)
    monkeypatch.setattr(identity, "READ", 30_000)
    for change in (None, 0, 99_999, 100_000, 999_999):
        data = bytearray(raw)
        if change is not None:
            data[change] ^= 1
        (tmp_path / "x").write_bytes(data)
        told = []
        seen.add(content_hashes([tmp_path / "x"], progress=told.append)[0])
        assert sum(told) == 1_000_000
    assert len(seen) == 5


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("abc")
    piece = identity._hash_piece

    def slow(file, *rest):
        result = piece(file, *rest)
        file.write_text("abcdef")
        return result

    monkeypatch.setattr(identity, "_hash_piece", slow)
    with pytest.raises(ConfigError, match="x is written to while it is read"):
        content_hashes([tmp_path / "x"])


def flips_are_told(config, caplog, n, seed, change=flip):
    """n times one file of an entry changed: one line, and the tokens of the text again."""
    rng = np.random.default_rng(seed)
    before = open_corpus(config())
    good, names = tokens_of(before), sorted(file.name for file in before.folder.iterdir())
    assert len(names) == 5
    for _ in range(n):
        file = before.folder / names[int(rng.integers(len(names)))]
        raw = file.read_bytes()
        change(file, rng)
        if file.is_file() and file.read_bytes() == raw:
            continue
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hybridlm.data"):
            after = open_corpus(config())
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"token cache {before.folder} is damaged (") and "built again" in line
        assert "\n" not in line and file.name in line
        assert after.stats == before.stats and tokens_of(after) == good


def test_flipped_bits_of_the_cache_are_told(config, caplog):
    flips_are_told(config, caplog, 30, 0)


@pytest.mark.slow
def test_every_one_of_many_flipped_bits_of_the_cache_is_told(config, caplog):
    flips_are_told(config, caplog, 200, 1)


def test_mutated_files_of_the_cache_are_told(config, caplog):
    flips_are_told(config, caplog, 40, 2, lambda file, rng: file.write_bytes(mutate(file.read_bytes(), rng)))


@pytest.mark.parametrize("stats", ["[]", "null", '{"files": null}', '{"dtype": 3}', "[" * 100_000, '"x"', "{}"])
def test_other_stats_are_told(config, stats):
    before = open_corpus(config())
    (before.folder / "stats.json").write_text(stats)
    assert open_corpus(config()).stats == before.stats


def test_another_host_opens_what_the_first_has_made(config, folder, tmp_path):
    """Without the text: by the entries, which are sent, and its own token files."""
    write_nanogpt(tmp_path / "a.bin", [[65, 66, 257], [67, 68, 69, 257]] * 40)
    fields = dict(path=(f"{folder}/*.jsonl", str(tmp_path / "a.bin")), weights=(1.0, 3.0))
    first = open_corpus(config(**fields))
    about = json.loads(json.dumps(describe(first)))
    batches = lambda corpus, there: take(make_loader(there, corpus=corpus), 9)
    expected = batches(first, config(**fields))
    shutil.rmtree(folder)
    there = config(**fields, cache_dir=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="vanished"):
        rebuild(there, about)
    for key, stats in about["entries"].items():
        parts = [(name, (tmp_path / "cache" / key / name).read_bytes()) for name in stats["files"]]
        copy_entry(tmp_path / "other", key, stats, iter(parts))
    check_equal(batches(rebuild(there, about), there), expected)
    key = next(iter(about["entries"]))
    about["entries"][key] |= {"documents": 0}
    with pytest.raises(ConfigError, match="holds other tokens on this host than on the first"):
        rebuild(there, about)
    write_nanogpt(tmp_path / "a.bin", [[65, 66, 257], [67, 68, 70, 257]] * 40)
    with pytest.raises(ConfigError, match=r"a.bin is another one on this host than on the first"):
        rebuild(there, about)
