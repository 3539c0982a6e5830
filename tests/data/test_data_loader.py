# SPDX-License-Identifier: Apache-2.0
"""Batch n is a function of (seed, data, n): of no host, worker, thread or restart."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hybridlm.data import host_rows, make_loader, open_corpus
from hybridlm.data.packing import FIELDS, PairRows
from hybridlm.errors import ConfigError
from tests.data.support import all_pairs, check_equal, join, pairs_of, take

ROOT = Path(__file__).parents[2]


def test_shapes_and_an_epoch_holds_every_pair_once(config):
    corpus = open_corpus(config())
    rows = len(PairRows(corpus.split("train"), 64, 0))
    batches = take(make_loader(config(batch_size=rows), corpus=corpus), 3)
    for batch in batches:
        assert set(batch) == set(FIELDS)
        assert all(value.shape == (rows, 64) and value.dtype == np.int32 for value in batch.values())
        assert pairs_of([batch]) == all_pairs(corpus.split("train"))
    assert (batches[0]["tokens"] != batches[1]["tokens"]).any()  # each epoch in an order of its own


def test_batches_of_one_row(config):
    """They are the rows of larger batches, one after the other, as many as are asked for."""
    rows = [value for batch in take(make_loader(config(batch_size=4)), 3) for value in batch["tokens"]]
    ones = take(make_loader(config(batch_size=1)), 12)
    np.testing.assert_array_equal([batch["tokens"][0] for batch in ones], rows)


def test_targets_follow_within_a_segment(config):
    for batch in take(make_loader(config()), 5):
        segments, positions = batch["segment_ids"], batch["positions"]
        inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        np.testing.assert_array_equal(batch["targets"][:, :-1][inside], batch["tokens"][:, 1:][inside])
        np.testing.assert_array_equal(positions[:, 1:][inside], positions[:, :-1][inside] + 1)
        starts = np.diff(segments, axis=1, prepend=0) != 0
        assert not positions[starts].any() and (np.diff(segments, axis=1)[np.diff(segments, axis=1) > 0] == 1).all()
        assert (batch["targets"][segments == 0] == -1).all() and (batch["targets"][segments > 0] >= 0).all()


def test_same_seed_same_batches_other_seed_others(config):
    first, again, other = (take(make_loader(config(), seed=seed), 20) for seed in (3, 3, 4))
    check_equal(again, first)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_host_slices_make_the_global_batch(config, hosts, split):
    corpus = open_corpus(config())
    n = 40 if split == "train" else 99  # beyond one epoch; the whole of validation
    whole = take(make_loader(config(), seed=1, split=split, corpus=corpus), n)
    slices = [host_rows(4, host, hosts) for host in range(hosts)]
    parts = [take(make_loader(config(), seed=1, split=split, rows=part, corpus=corpus), n) for part in slices]
    check_equal(join(parts), whole)


def test_a_host_reads_its_own_rows_alone(config, monkeypatch):
    read = []
    getitem = PairRows.__getitem__
    monkeypatch.setattr(PairRows, "__getitem__", lambda self, row: read.append(row) or getitem(self, row))
    take(make_loader(config(prefetch=1), rows=(1, 2)), 10)
    assert len(read) <= 10 + 2  # ten batches of one row, and what was read ahead


@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_in_any_order_of_hosts_make_the_global_batch(config, split):
    """Hosts of a torus: their rows interleave."""
    corpus, n = open_corpus(config(batch_size=8)), 30
    whole = take(make_loader(config(batch_size=8), seed=1, split=split, corpus=corpus), n)
    for rows in ([0, 1, 4, 5], np.array([2, 3, 6, 7]), range(3, 4), [7], list(range(8))):
        read = take(make_loader(config(batch_size=8), seed=1, split=split, rows=rows, corpus=corpus), n)
        check_equal(read, [{field: value[list(rows)] for field, value in batch.items()} for batch in whole])
    with make_loader(config(batch_size=8), seed=1, split=split, rows=[1, 6], corpus=corpus) as loader:
        next(loader)
        loader.set_state(json.loads(json.dumps(loader.get_state())) | {"step": 2})
        check_equal([next(loader)], [{field: value[[1, 6]] for field, value in whole[2].items()}])


@pytest.mark.parametrize("split", ["train", "val"])
def test_resume_is_exact_and_on_other_hosts(config, split):
    corpus = open_corpus(config())
    whole = take(make_loader(config(), seed=7, split=split, corpus=corpus), 30)
    with make_loader(config(), seed=7, split=split, rows=(0, 2), corpus=corpus) as before:
        for _ in range(3):
            next(before)
        state = json.loads(json.dumps(before.get_state()))
        assert state["step"] == before.step == 3
        next(before)
        before.set_state(state)
        check_equal([next(before)], [{field: value[:2] for field, value in whole[3].items()}])
    parts = []
    for host in range(4):
        after = make_loader(config(prefetch=2), seed=7, split=split, rows=host_rows(4, host, 4), corpus=corpus)
        after.set_state(state)
        parts.append(take(after, 27))
    check_equal(join(parts), whole[3:])
    check_equal(take(make_loader(config(), seed=7, split=split, start_step=3, corpus=corpus), 27), whole[3:])


def test_worker_processes_change_nothing(config):
    corpus = open_corpus(config())
    whole = take(make_loader(config(), corpus=corpus), 13)
    with make_loader(config(workers=2), corpus=corpus) as loader:
        check_equal([next(loader) for _ in range(6)], whole[:6])
        state = loader.get_state()
    with make_loader(config(workers=1), rows=slice(0, 3), corpus=corpus) as loader:
        loader.set_state(state)
        expected = [{field: value[:3] for field, value in batch.items()} for batch in whole[6:]]
        check_equal([next(loader) for _ in range(7)], expected)


def test_rows_need_not_be_neighbours(config):
    corpus = open_corpus(config())
    whole = take(make_loader(config(), seed=1, corpus=corpus), 9)
    read = take(make_loader(config(), seed=1, rows=[0, 2, 3], corpus=corpus), 9)
    check_equal(read, [{field: value[[0, 2, 3]] for field, value in batch.items()} for batch in whole])


def test_a_state_of_another_seed_or_split_is_refused(config):
    with make_loader(config(), seed=1) as loader:
        state = loader.get_state() | {"step": 5}
    with make_loader(config(), seed=2) as loader:
        with pytest.raises(ConfigError, match=r"data changed since the checkpoint.*seed 1 -> 2"):
            loader.set_state(state)
        assert loader.step == 0
        loader.set_state(state, strict=False)
        assert loader.step == 5
    with make_loader(config(), seed=1, split="val") as loader, pytest.raises(ConfigError, match="'train' -> 'val'"):
        loader.set_state(state)


@pytest.mark.parametrize("batch_size", [3, 5, 7])
def test_validation_is_one_padded_pass_in_one_order(config, batch_size):
    corpus = open_corpus(config())
    config = config(batch_size=batch_size)
    with make_loader(config, seed=1, split="val", corpus=corpus) as loader:
        first = list(loader)
        assert len(first) == len(loader) > 1 and list(loader) == []
        loader.reset()
        check_equal(list(loader), first)
    check_equal(take(make_loader(config, seed=2, split="val", corpus=corpus), 99), first)
    assert pairs_of(first) == all_pairs(corpus.split("val"))
    assert {batch["tokens"].shape for batch in first} == {(batch_size, 64)}
    rows = len(PairRows(corpus.split("val"), 64, 0))
    padding = -rows % batch_size
    assert padding, "choose a size that leaves the last batch part empty"
    for field, value in (("segment_ids", 0), ("targets", -1), ("tokens", 0), ("positions", 0)):
        assert (first[-1][field][batch_size - padding :] == value).all()


def test_fewer_rows_than_a_batch(config, tmp_path):
    (tmp_path / "one.txt").write_text("tiny")
    one = config(path=(f"{tmp_path}/one.txt",), val_fraction=0.0, batch_size=5)
    for batch in take(make_loader(one), 3):
        assert (batch["targets"][:, :6] == [*b"tiny", 257, -1]).all()


def test_nothing_to_read_says_what_to_change(config, tmp_path):
    (tmp_path / "one.txt").write_text("tiny")
    one = config(path=(f"{tmp_path}/one.txt",), val_fraction=0.0)
    with pytest.raises(
        ConfigError, match=r"data.val_fraction \(0.0\) holds out none of the 1 documents: raise it, set"
    ):
        make_loader(one, split="val")
    all_held = config(path=(f"{tmp_path}/one.txt",), val_fraction=0.9999999)
    with pytest.raises(ConfigError, match=r"holds out all 1 documents, none is left to train on: lower it"):
        make_loader(all_held)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"data.val_path holds no text"):
        make_loader(config(val_path=(f"{tmp_path}/empty.txt",)), split="val")


def test_arguments_are_checked(config):
    corpus = open_corpus(config())
    for rows in ((0, 5), (2, 2), (-1, 2), slice(3, 9)):
        with pytest.raises(ValueError, match=r"must be a range within the batch of 4"):
            make_loader(config(), rows=rows, corpus=corpus)
    for rows in ([], [0, 4], [-1, 0], [1, 0], [1, 1], np.zeros(2), [[0, 1]]):
        with pytest.raises(ValueError, match=r"rows .* must (be a list of whole numbers|ascend)"):
            make_loader(config(), rows=rows, corpus=corpus)
    with pytest.raises(ValueError, match="contiguous"):
        make_loader(config(), rows=slice(0, 4, 2), corpus=corpus)
    with pytest.raises(ConfigError, match=r"data.batch_size \(10\) not divisible by the number of hosts \(4\)"):
        host_rows(10, 0, 4)
    with pytest.raises(ValueError, match=r"process_index \(4\) not in 0..3"):
        host_rows(8, 4, 4)
    with make_loader(config(), corpus=corpus) as loader, pytest.raises(ValueError, match=r"step \(-1\)"):
        loader.reset(-1)


def test_a_closed_loader_says_so(config):
    loader = make_loader(config())
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_an_exception_leaves_the_step_and_the_order(config, monkeypatch):
    corpus = open_corpus(config())
    whole = take(make_loader(config(), corpus=corpus), 8)
    getitem = PairRows.__getitem__
    failing = []

    def interrupted(self, row):
        if failing:
            raise KeyboardInterrupt
        return getitem(self, row)

    monkeypatch.setattr(PairRows, "__getitem__", interrupted)
    with make_loader(config(prefetch=1), corpus=corpus) as loader:
        check_equal([next(loader) for _ in range(2)], whole[:2])
        failing.append(1)
        with pytest.raises(KeyboardInterrupt):
            for _ in range(5):
                next(loader)
        failing.clear()
        step = loader.step
        check_equal([next(loader) for _ in range(8 - step)], whole[step:])


END_OF_PROCESS = """
import os, signal, sys, threading
from hybridlm.data import make_loader
from hybridlm.data.config import DataConfig
if __name__ == "__main__":
    path, cache, workers, how = sys.argv[1:]
    config = DataConfig(
        path=(path,), val_fraction=0.2, seq_len=64, batch_size=4, cache_dir=cache, workers=int(workers)
    )
    loader = make_loader(config)
    next(loader)
    if how == "interrupt":
        threading.Timer(0.3, lambda: os.killpg(0, signal.SIGINT)).start()
        try:
            while True:
                next(loader)
        except KeyboardInterrupt:
            step = loader.step
            next(loader)
            assert loader.step == step + 1
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("done", flush=True)
"""


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("how", [pytest.param("leave", marks=pytest.mark.slow), "interrupt", "kill"])
def test_the_process_ends_quietly_and_takes_its_workers_along(config, tmp_path, workers, how):
    script = tmp_path / "script.py"
    script.write_text(END_OF_PROCESS)
    process = subprocess.Popen(
        [sys.executable, str(script), config().path[0], config().cache_dir, str(workers), how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=60)  # returns when the last process that holds the pipes has ended
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if how == "kill":
        assert process.returncode == -signal.SIGKILL
    else:
        assert (process.returncode, output, errors) == (0, "done\n", "")
