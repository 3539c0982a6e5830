# SPDX-License-Identifier: Apache-2.0
"""Compare-and-swap and the lease built on it: on a disk, whose TensorStore driver swaps too, and in a bucket."""

import json
import multiprocessing
import os
import threading
import time

import pytest

from hybridlm import storage
from hybridlm.errors import RunError
from hybridlm.storage.cell import Cell
from hybridlm.train import lease
from hybridlm.train.lease import Lease

PLACES = ["disk", *(pytest.param(name, marks=pytest.mark.buckets) for name in ("s3", "gs"))]


@pytest.fixture
def path(request, tmp_path):
    """Of an object on the disk or in a bucket."""
    if request.param == "disk":
        return tmp_path / "in_use.json"
    address = request.getfixturevalue("bucket" if request.param == "s3" else "gs")
    return storage.as_path(f"{address}/run/in_use.json")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leases that run out within a second."""
    for name, seconds in {"RENEW_SECONDS": 0.05, "STALE_SECONDS": 0.8, "POLL_SECONDS": 0.1}.items():
        monkeypatch.setattr(lease, name, seconds)


@pytest.mark.parametrize("path", PLACES, indirect=True)
def test_of_two_that_change_one_state_one_does(path):
    one, other = Cell(path), Cell(path)
    content, missing = one.read()
    assert content is None
    state = one.swap(missing, b"one")
    assert state is not None and other.swap(missing, b"other") is None and other.read() == (b"one", state)
    newer = other.swap(state, b"other")
    one.clear(state)  # not any more
    assert one.read() == (b"other", newer) and one.swap(state, b"one") is None
    other.clear(newer)
    assert one.read()[0] is None and one.swap(missing, b"again") is not None


@pytest.mark.parametrize("path", PLACES, indirect=True)
def test_many_at_once_agree_on_one(path):
    Cell(path)
    won, start = [], threading.Barrier(6)

    def run(number: int) -> None:
        cell = Cell(path)
        start.wait()
        for _ in range(3):
            content, state = cell.read()
            if content is None and cell.swap(state, f"{number}".encode()) is not None:
                won.append(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and Cell(path).read()[0] == f"{won[0]}".encode()


@pytest.mark.parametrize("path", PLACES, indirect=True)
def test_a_folder_in_use_is_refused_and_then_free(path):
    """Whoever comes sees the renewals; when it is let go, the next takes it at once."""
    said = []
    with Lease(path) as holder:
        time.sleep(1.0)  # longer than an unrenewed one lives
        told = rf"is in use by process {os.getpid()} on .*--run.dir=NEW"
        with pytest.raises(RunError, match=told), Lease(path, said.append):
            pass
        holder.check()
    assert said and Cell(path).read()[0] is None
    began = time.monotonic()
    with Lease(path):
        assert time.monotonic() - began < 0.7


def left_behind(path, **changed) -> None:
    """The object of an owner of another machine that never let it go."""
    values = {"owner": "process 1 on other", "process": None, "token": "other", "time": time.time(), **changed}
    cell = Cell(path)
    assert cell.swap(cell.read()[1], json.dumps(values).encode()) is not None


@pytest.mark.parametrize("path", PLACES, indirect=True)
def test_an_owner_that_is_gone_runs_out(path):
    left_behind(path)
    said, began = [], time.monotonic()
    with Lease(path, said.append):
        assert time.monotonic() - began >= 0.8
    assert len(said) == 1 and "is held by process 1 on other" in said[0]


@pytest.mark.parametrize("path", ["disk"], indirect=True)
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b'{"time": "x", "process": [1]}'])
def test_a_damaged_object_runs_out_too(path, content):
    cell = Cell(path)
    cell.swap(cell.read()[1], content)
    with Lease(path, lambda _: None) as holder:
        holder.check()


def _hold(path) -> None:
    Lease(path).__enter__()
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("path", ["disk"], indirect=True)
def test_what_surely_is_gone_need_not_be_waited_for(path, monkeypatch):
    """A killed process of this machine; an object that is older than any clock is wrong."""
    killed = multiprocessing.get_context("spawn").Process(target=_hold, args=(path,))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -9 and Cell(path).read()[0] is not None
    monkeypatch.setattr(lease, "STALE_SECONDS", 1e9)
    with Lease(path, pytest.fail):
        pass
    left_behind(path, time=time.time() - 700)
    with Lease(path, pytest.fail):
        pass


@pytest.mark.parametrize("path", ["disk"], indirect=True)
def test_an_owner_that_was_held_up_ends(path, monkeypatch):
    """As by SIGSTOP: it renews nothing for a while, another takes the folder, and it finds that before it writes."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 1e9)
    with Lease(path) as held_up:
        monkeypatch.setattr(lease, "_is_gone", lambda content: False)
        with Lease(path, lambda _: None) as other:
            with pytest.raises(RunError, match="taken over"):
                held_up.check()
            other.check()
            taken = Cell(path).read()
    assert taken[0] is not None and Cell(path).read()[0] is None  # `other` let it go; the first one left it alone


@pytest.mark.parametrize("path", ["disk"], indirect=True)
def test_an_answer_that_was_lost_is_no_loss(path, monkeypatch):
    """The write went through, its answer did not: the repeated one is refused, and yet the lease is held."""
    with Lease(path) as holder:
        swap = Cell.swap

        def lost(self, state, content):
            swap(self, state, content)
            return swap(self, state, content)

        monkeypatch.setattr(Cell, "swap", lost)
        time.sleep(0.3)
        holder.check()
        assert json.loads(Cell(path).read()[0])["token"] == holder._token


@pytest.mark.parametrize("path", ["disk"], indirect=True)
def test_a_store_that_is_silent_for_too_long_ends_the_run(path, monkeypatch):
    with Lease(path) as holder:

        def silent(*_):
            raise OSError(5, "no answer")

        monkeypatch.setattr(Cell, "swap", silent)
        time.sleep(0.3)
        holder.check()  # it may come back
        time.sleep(0.7)
        with pytest.raises(RunError, match="could not be renewed"):
            holder.check()
        monkeypatch.undo()
