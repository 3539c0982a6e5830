# SPDX-License-Identifier: Apache-2.0
"""`hybridlm tokenize`: shards give the batches of the text, survive interruption, and tell of damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hybridlm.cli import main
from hybridlm.data import load_tokenizer, make_loader, make_shards, open_corpus
from hybridlm.data.shards import read_manifest, write_manifest
from hybridlm.errors import ConfigError, DataError, RunError
from tests.data.support import all_pairs, check_equal, flip, mutate, take

ROOT = Path(__file__).parents[2]


@pytest.fixture
def many_units(monkeypatch):
    """Each file is a unit, batches and records are small: every limit is met."""
    monkeypatch.setattr(make_shards, "UNIT_BYTES", 1)
    monkeypatch.setattr(make_shards, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(make_shards, "RECORD_TOKENS", 50)


@pytest.fixture
def out(folder, tmp_path, many_units):
    """A folder of shards of the texts."""
    words = ["tokenize", str(folder), "--out", str(tmp_path / "out"), "--val-fraction", "0.2", "--workers", "1"]
    assert main([*words, "--shard-tokens", "2000"]) == 0
    return tmp_path / "out"


def fails(capsys, *words) -> str:
    """The one line of a command that fails, without "error: "."""
    assert main([*map(str, words)]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error.removeprefix("error: ")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_shards_give_the_batches_of_the_text(config, out, split, packing):
    shards = open_corpus(config(path=(str(out),)))
    assert len(read_manifest(out)["splits"]["train"]["shards"]) > 3
    text = take(make_loader(config(packing=packing), seed=3, split=split), 30)
    tokens = take(make_loader(config(path=(str(out),), packing=packing), seed=3, split=split, corpus=shards), 30)
    check_equal(tokens, text)
    expected = open_corpus(config()).stats
    for key in ("documents", "bytes", "tokens", "pairs", "bytes_per_pair"):
        assert shards.stats[split][key] == expected[split][key]
    assert shards.stats["bigram_bits_per_byte"] == expected["bigram_bits_per_byte"]
    assert all_pairs(shards.split(split)) == all_pairs(open_corpus(config()).split(split))


def test_workers_read_shards_alike(config, out):
    one, two = (config(path=(str(out),), workers=workers) for workers in (0, 2))
    check_equal(take(make_loader(two), 5), take(make_loader(one), 5))


def test_processes_write_the_same_shards(folder, out, tmp_path):
    words = ["tokenize", str(folder), "--out", str(tmp_path / "again"), "--val-fraction", "0.2"]
    assert main([*words, "--workers", "2", "--shard-tokens", "2000"]) == 0
    # processes have the limits of the module, which hold all of a file in a shard
    assert main([*words[:3], str(tmp_path / "whole"), *words[4:], "--workers", "1"]) == 0
    splits = [read_manifest(tmp_path / name)["splits"] for name in ("again", "whole")]
    for split in ("train", "val"):
        assert [sum(s["tokens"] for s in one[split]["shards"]) for one in splits] == [splits[0][split]["tokens"]] * 2
        assert splits[0][split]["documents"] == splits[1][split]["documents"]


INTERRUPTED = """
import sys
from hybridlm.data import make_shards
from hybridlm.cli import main
make_shards.UNIT_BYTES = 1
make_shards.BATCH_DOCUMENTS = 7
if __name__ == "__main__":
    closed = make_shards._UnitWriter.close_shards
    left = [int(sys.argv[1])]
    def close(self):
        closed(self)
        left[0] -= 1
        if left[0] == 0:
            import os
            os._exit(9)
    make_shards._UnitWriter.close_shards = close
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_interrupted_run_goes_on(folder, tmp_path, many_units, monkeypatch, after, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(make_shards, "UNIT_BYTES", 1)
    monkeypatch.setattr(make_shards, "BATCH_DOCUMENTS", 7)
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    words = ["tokenize", str(folder), "--val-fraction", "0.2", "--shard-tokens", "2000", "--workers", "1", "--out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = [sys.executable, str(script), str(after), *words, str(tmp_path / "killed")]
    assert subprocess.run(killed, env=environment, timeout=60, capture_output=True).returncode == 9
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*.array_record")}
    assert main([*words, str(tmp_path / "killed")]) == 0
    assert main([*words, str(tmp_path / "whole")]) == 0
    one, other = (read_manifest(tmp_path / name) for name in ("killed", "whole"))
    assert one["splits"] == other["splits"] and one["bigram_bits_per_byte"] == other["bigram_bits_per_byte"]
    for name, written in before.items():  # what was done is kept
        assert (tmp_path / "killed" / name).stat().st_mtime_ns == written
    assert not list((tmp_path / "killed").glob("*.part")) and before
    capsys.readouterr()
    assert main([*words, str(tmp_path / "killed")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'killed'} is complete\n"


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(folder, tmp_path):
    rng = np.random.default_rng(0)
    for name in "cdefgh":
        shutil.copy(folder / "b.jsonl", folder / f"{name}.jsonl")
    code = (
        "import sys; from hybridlm.data import make_shards as m; m.UNIT_BYTES = 1; m.BATCH_DOCUMENTS = 3\n"
        "from hybridlm.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    words = ["tokenize", str(folder), "--val-fraction", "0.2", "--shard-tokens", "900", "--workers", "2", "--out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = tmp_path / "out"
    for seconds in rng.uniform(0.2, 4.0, 12):
        running = subprocess.Popen([sys.executable, script, *words, out], env=environment, stderr=subprocess.PIPE)
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            running.kill()
        running.communicate(timeout=30)  # the last process that holds the pipe has ended
    done = subprocess.run([sys.executable, script, *words, out], env=environment, timeout=120)
    assert done.returncode == 0
    whole = subprocess.run([sys.executable, script, *words, tmp_path / "whole"], env=environment, timeout=120)
    assert whole.returncode == 0
    assert read_manifest(out)["splits"] == read_manifest(tmp_path / "whole")["splits"]


def test_ctrl_c_ends_it_and_its_processes(folder, tmp_path):
    big = folder / "big.jsonl"
    big.write_text("".join(json.dumps({"text": "many words " * 200}) + "\n" for _ in range(20_000)))
    code = "import sys; from hybridlm.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))"
    script = tmp_path / "script.py"
    script.write_text(code)
    words = ["tokenize", str(big), "--out", str(tmp_path / "out"), "--train-bpe", "300", "--bpe-bytes", "100000"]
    running = subprocess.Popen(
        [sys.executable, script, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not list((tmp_path / "out").glob("*.array_record.part")) and running.poll() is None:
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)
        _, errors = running.communicate(timeout=30)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert (running.returncode, errors) == (130, "error: interrupted\n")


def test_bpe_is_trained_kept_and_used(config, folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["tokenize", str(folder), "--out", str(out), "--train-bpe", "300", "--workers", "1"]
    assert main(words) == 0
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.vocab_size == 300 and tokenizer.bos_id == tokenizer.eos_id is not None
    assert f"--data.path={out} --data.tokenizer={out}" in capsys.readouterr().out
    corpus = open_corpus(config(path=(str(out),), tokenizer=str(out)))
    again = open_corpus(config(tokenizer=str(out), val_fraction=0.02))  # the text itself
    assert all_pairs(corpus.split("train")) == all_pairs(again.split("train"))
    assert corpus.stats["train"]["tokens"] < corpus.stats["train"]["bytes"]
    with pytest.raises(ConfigError, match=r"tokenised with .* and data.tokenizer is byte: set data.tokenizer=.*out"):
        open_corpus(config(path=(str(out),)))


def test_a_given_tokenizer_travels_with_its_ends(config, folder, tmp_path):
    assert main(["tokenize", str(folder), "--out", str(tmp_path / "a"), "--train-bpe", "290", "--workers", "1"]) == 0
    shutil.copy(tmp_path / "a" / "tokenizer.json", tmp_path / "mine.json")
    words = ["--tokenizer", str(tmp_path / "mine.json"), "--eos-token", "the", "--bos-token", "<|endoftext|>"]
    vocabulary = json.loads((tmp_path / "mine.json").read_text())["model"]["vocab"]
    words[3] = next(word for word in vocabulary if len(word) > 1 and word.isalpha())
    assert main(["tokenize", str(folder), "--out", str(tmp_path / "b"), *words, "--workers", "1"]) == 0
    made = load_tokenizer(str(tmp_path / "b"))
    assert made.eos_id == vocabulary[words[3]] and made.bos_id == 0
    open_corpus(config(path=(str(tmp_path / "b"),), tokenizer=str(tmp_path / "b")))


def test_a_folder_belongs_to_its_text_and_settings(folder, out, tmp_path, capsys):
    words = ["tokenize", folder, "--out", out, "--val-fraction", "0.2", "--workers", "1", "--shard-tokens", "2000"]
    assert "holds shards of other text or settings" in fails(capsys, *words[:-1], "3000")
    (folder / "a.jsonl").write_text('{"text": "other"}\n')
    assert "holds shards of other text or settings" in fails(capsys, *words)
    before = read_manifest(out)["splits"]["train"]["tokens"]
    assert main([*map(str, words), "--overwrite"]) == 0
    assert read_manifest(out)["splits"]["train"]["tokens"] < before
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert "has files but no shards" in fails(capsys, *words[:3], full, *words[4:])
    assert (full / "notes.txt").read_text() == "mine"


def test_bad_words_and_bad_text_are_one_line(folder, tmp_path, capsys):
    out = tmp_path / "o"
    words = ("tokenize", folder, "--out", out)
    assert "no file matches" in fails(capsys, "tokenize", tmp_path / "none*", "--out", out)
    assert "--train-bpe (3) must be 257.." in fails(capsys, *words, "--train-bpe", 3)
    assert "leave --tokenizer out" in fails(capsys, *words, "--train-bpe", 300, "--tokenizer", "byte")
    assert "--val-fraction (1.5)" in fails(capsys, *words, "--val-fraction", 1.5)
    assert "--workers (0)" in fails(capsys, *words, "--workers", 0)
    (folder / "c.jsonl").write_text("[" * 200_000 + "\n")
    for workers in (1, 2):
        error = fails(capsys, *words, "--workers", workers)
        assert "line 1 of" in error and "c.jsonl nests deeper" in error
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    assert "hold no text" in fails(capsys, "tokenize", tmp_path / "empty.jsonl", "--out", tmp_path / "p")


def test_a_full_disk_is_one_line_and_no_file_is_taken_for_whole(folder, tmp_path):
    (folder / "big.jsonl").write_text("".join(json.dumps({"text": "many words " * 300}) + "\n" for _ in range(900)))
    code = (
        "import resource, signal, sys; from hybridlm.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["tokenize", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "cannot write" in done.stderr and "train-00000-000.array_record" in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert main(words) == 0  # with room again


def shard_files(out):
    return sorted(file for file in out.iterdir() if file.is_file())


def read_all(config, out):
    """All tokens and offsets of both splits."""
    corpus = open_corpus(config(path=(str(out),)))
    read = []
    for name in ("train", "val"):
        offsets = np.asarray(corpus.split(name).offsets[:])
        read += [corpus.split(name).tokens[np.arange(offsets[-1])].tolist(), offsets.tolist()]
    return read


def damage_is_told(config, out, n, change, seed):
    """n times one file changed: an error of one line that names one of the folder, or what is read is the same."""
    rng = np.random.default_rng(seed)
    good, told, files = read_all(config, out), 0, shard_files(out)
    for _ in range(n):
        file = files[int(rng.integers(len(files)))]
        raw = file.read_bytes()
        change(file, rng)
        try:
            assert read_all(config, out) == good, f"{file.name} is read wrongly"
        except (ConfigError, DataError) as error:
            assert "\n" not in str(error) and str(out) in str(error), error
            told += 1
        file.write_bytes(raw)
    return told


def test_flipped_bits_are_never_read(config, out):
    """Most of a small shard is padding of the container, in which a flipped bit changes nothing."""
    assert damage_is_told(config, out, 25, flip, seed=0) > 5


@pytest.mark.slow
def test_many_flipped_bits_are_never_read(config, out):
    assert damage_is_told(config, out, 200, flip, seed=1) > 50


def test_mutated_files_are_never_read(config, out):
    change = lambda file, rng: file.write_bytes(mutate(file.read_bytes(), rng))
    assert damage_is_told(config, out, 40, change, seed=2) > 25


def test_an_exchanged_shard_of_equal_size_is_told(config, out):
    """Each is sound in itself; the index says that it is the wrong one."""
    shards = [shard["file"] for shard in read_manifest(out)["splits"]["train"]["shards"]]
    first, second = (out / name for name in shards[:2])
    content = second.read_bytes()
    second.write_bytes(first.read_bytes().ljust(len(content), b"\0")[: len(content)])
    with pytest.raises((ConfigError, DataError), match=f"{second.name}"):
        read_all(config, out)


def test_a_shard_that_breaks_in_mid_run_ends_it_in_one_line(config, out):
    for workers in (0, 1):
        with make_loader(config(path=(str(out),), workers=workers)) as loader:
            next(loader)
            for file in out.glob("train-*.array_record"):
                file.write_bytes(b"\0" * file.stat().st_size)
            with pytest.raises(DataError, match=r"train-.*array_record is damaged \(.*\): copy it again") as caught:
                for _ in range(200):
                    next(loader)
            assert "\n" not in str(caught.value) and isinstance(caught.value, RunError)
            break  # the file is broken for good


@pytest.mark.parametrize("value", [None, [], "x", -1, 2**80, {}, True, "../other.array_record"])
def test_manifests_with_other_values_are_told(config, out, value):
    """Sound in themselves, as another program might write them."""
    good = read_manifest(out)
    first = good["splits"]["train"]["shards"][0]
    for node in (good, good["tokenizer"], good["splits"], good["splits"]["train"], first):
        for key in [key for key in node if key not in ("hash", "made", "text_key", "val_fraction")]:
            kept, node[key] = node[key], value
            write_manifest(out, good)
            try:
                open_corpus(config(path=(str(out),)))
            except ConfigError as error:
                assert "\n" not in str(error) and str(out) in str(error), key
            node[key] = kept


def test_manifests_of_other_formats_are_told(config, out):
    manifest = read_manifest(out)
    write_manifest(out, manifest | {"format": 7})
    with pytest.raises(ConfigError, match="is of format 7, this version reads 1"):
        open_corpus(config(path=(str(out),)))
