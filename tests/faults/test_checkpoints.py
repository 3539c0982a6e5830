# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were altered: no flipped bit is unnoticed, the older one is used, nothing is lost."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.errors import ConfigError, RunError
from hybridlm.train import manifest
from hybridlm.train.checkpoint import Checkpoints, finished_steps
from hybridlm.train.manifest import NAME, verify

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step: int) -> dict:
    """A train state of a few arrays, every value of which depends on the step."""
    rng = np.random.default_rng(step)
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(32, 16)), jnp.float32), "b": jnp.asarray(rng.normal(size=8))},
        "opt_state": {"mu": jnp.full((32, 16), step, jnp.float32)},
        "step": jnp.int32(step),
    }


def like(state: dict):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def record(step: int) -> dict:
    return {"data": {"step": step}, "meter": {"loss": ["Mean", 1.0, 2.0]}, "val_loss": 1.0 / step}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2, not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "c"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {"name": "x"}, record(step))
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy that may be."""
    shutil.copytree(saved, tmp_path / "c")
    return tmp_path / "c"


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, rng) -> str:
    """Flips a random bit of a file; what was done, in words."""
    content = bytearray(path.read_bytes())
    at, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[at] ^= 1 << bit
    path.write_bytes(bytes(content))
    return f"bit {bit} of byte {at} of {path.name}"


def restore(folder):
    """(step, state, record) that a run gets from a folder, read as a run does."""
    checkpoints = Checkpoints(folder, keep=3, read_only=True)
    try:
        return checkpoints.restore_latest(like(make_state(0)), check=lambda found: found["data"])
    finally:
        checkpoints.close()


def falls_back(saved, folder, rng, name: str) -> None:
    """One flipped bit in a file of the newest checkpoint: it is noticed, and all comes from the older one."""
    shutil.copytree(saved, folder)
    where = flip(folder / "2" / name, rng)
    assert verify(folder / "2") is not None, where
    step, state, found = restore(folder)
    assert step == 1, where
    chex.assert_trees_all_equal(state, make_state(1))
    assert found == record(1)
    shutil.rmtree(folder)


def test_no_flipped_bit_is_unnoticed(saved, tmp_path):
    rng = np.random.default_rng(0)
    names = [path.relative_to(saved / "2").as_posix() for path in files(saved / "2")]
    assert {NAME, "loop/metadata", "config/metadata", "_CHECKPOINT_METADATA"} <= set(names)
    for name in [*names, *rng.choice(names, 2)]:  # each file once
        falls_back(saved, tmp_path / "c", rng, str(name))


@pytest.mark.slow
def test_no_flipped_bit_is_unnoticed_in_200(saved, tmp_path):
    rng = np.random.default_rng(1)
    paths = files(saved / "2")
    sizes = np.array([path.stat().st_size for path in paths], float)
    by_size = rng.choice(len(paths), 100, p=sizes / sizes.sum())
    for index in [*by_size, *rng.integers(len(paths), size=100)]:
        falls_back(saved, tmp_path / "c", rng, paths[index].relative_to(saved / "2").as_posix())


@pytest.mark.slow
def test_every_bit_of_the_manifest(copied):
    """Its own checksum covers the line breaks too."""
    file = copied / "2" / NAME
    content = file.read_bytes()
    for at in range(len(content)):
        for bit in range(8):
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            assert verify(copied / "2") == f"{NAME} is damaged", (at, bit)


OTHER_DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "instead of"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "instead of"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "unreadable": (lambda path: path.chmod(0), "cannot be read"),
}


@pytest.mark.parametrize("damage", OTHER_DAMAGES)
def test_a_file_that_is_not_as_it_was(copied, damage):
    """Said in a few words that name the file."""
    change, words = OTHER_DAMAGES[damage]
    if damage == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    for path in files(copied / "2"):
        name = path.relative_to(copied / "2").as_posix()
        if name == NAME:
            continue
        kept = path.read_bytes()
        change(path)
        problem = verify(copied / "2")
        assert name in problem and words in problem and "\n" not in problem
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(kept)
    assert verify(copied / "2") is None


def test_a_checkpoint_that_lost_its_manifest_is_damaged_and_one_of_before_is_not(copied, caplog):
    (copied / "2" / NAME).unlink()
    assert restore(copied)[0] == 1 and "manifest.json is missing" in caplog.text
    (copied / "1" / NAME).unlink()
    of_before = {"split": "train", "seed": 0, "batch_size": 1, "seq_len": 1, "fingerprint": "x", "step": 1}
    (copied / "1" / "loop" / "metadata").write_text(json.dumps({"data": of_before}))
    with caplog.at_level(logging.WARNING, "hybridlm"):
        assert restore(copied)[0] == 1
    assert "was written before checkpoints had checksums" in caplog.text


OF_BEFORE = {"split": "train", "seed": 0, "batch_size": 1, "seq_len": 1, "fingerprint": "x", "step": 2}
RECORDS = {
    "empty": {}, "a list": [], "null": None, "a number": -1, "a word": '"x"', "no JSON": "{", "no text": "\udcff",
    "nested": "[" * 100_000, "data a list": {"data": []}, "data empty": {"data": {}}, "no meter": {"data": OF_BEFORE},
    "step 41": {"data": OF_BEFORE | {"step": 41}, "meter": {}}, "step huge": {"data": OF_BEFORE | {"step": 10**18}},
    "step a word": {"data": OF_BEFORE | {"step": "2"}}, "meter a number": {"data": OF_BEFORE, "meter": 3},
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_a_damaged_record_is_a_damaged_checkpoint(copied, kind):
    """Of one without a manifest, where the values themselves have to tell."""
    value = RECORDS[kind]
    (copied / "2" / NAME).unlink()
    text = value if isinstance(value, str) else json.dumps(value)
    (copied / "2" / "loop" / "metadata").write_bytes(text.encode("utf-8", "surrogateescape"))
    checkpoints = Checkpoints(copied, keep=3)
    found = checkpoints.restore_latest(like(make_state(0)), check=lambda found: dict(found["meter"]))
    checkpoints.close()
    assert found[0] == 1 and [path.name.split("-")[0] for path in (copied.parent / "broken").iterdir()] == ["2"]


def test_arrays_of_before_that_cannot_be_read(copied, caplog):
    """Where no manifest tells, what the storage says is one short line."""
    for step in (1, 2):
        (copied / str(step) / NAME).unlink()
        text = json.dumps({"data": OF_BEFORE | {"step": step}, "meter": {}})
        (copied / str(step) / "loop" / "metadata").write_text(text)
    for path in (copied / "2" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert restore(copied)[0] == 1
    (line,) = [r.getMessage() for r in caplog.records if "going back" in r.getMessage()]
    assert len(line) < 250 and "\n" not in line and "<bound" not in line and "source locations" not in line


def test_the_step_of_the_arrays_counts_too(copied):
    """A folder that was renamed."""
    (copied / "2").rename(copied / "3")
    assert restore(copied)[0] == 1
    (copied / "1" / "loop" / "metadata").rename(copied / "record")
    state = make_state(1) | {"step": jnp.int32(7)}
    checkpoints = Checkpoints(copied.parent / "d", keep=3)
    checkpoints.save(4, state, {}, record(4))
    checkpoints.wait()
    with pytest.raises(RunError, match="its arrays are of step 7"):
        checkpoints.restore(4, like(state))
    checkpoints.close()


def test_a_users_mistake_is_no_damage(copied):
    """Where the record does not fit what the user wants, the checkpoint is not blamed."""

    def refuse(found):
        raise ConfigError("data changed")

    checkpoints = Checkpoints(copied, keep=3)
    with pytest.raises(ConfigError, match="data changed"):
        checkpoints.restore_latest(like(make_state(0)), check=refuse)
    checkpoints.close()
    assert finished_steps(copied) == [1, 2] and not (copied.parent / "broken").exists()


def test_hosts_share_the_bytes_and_each_looks_at_all_files(copied, monkeypatch):
    """Any byte is read by one of the hosts; a file that one cannot open is broken for it."""
    monkeypatch.setattr(manifest, "BLOCK", 64)
    manifest.seal(copied / "2")
    assert [verify(copied / "2", (i, 3)) for i in range(3)] == [None] * 3
    rng = np.random.default_rng(0)
    for path in files(copied / "2"):
        kept = path.read_bytes()
        flip(path, rng)
        told = [verify(copied / "2", (i, 3)) for i in range(3)]
        assert sum(problem is not None for problem in told) == (3 if path.name == NAME else 1)
        path.unlink()
        if path.name != NAME:
            assert all("missing" in verify(copied / "2", (i, 3)) for i in range(3))
        path.write_bytes(kept)


def test_folders_that_are_no_checkpoints_are_left_alone(copied):
    odd = ["\u00b2", "1\u0663", "007", "x", "3.part", "99999999999999999999999"]
    for name in odd:
        (copied / name).mkdir()
    (copied / "5").write_text("a file")
    assert finished_steps(copied) == [1, 2, 99999999999999999999999]
    checkpoints = Checkpoints(copied, keep=1)
    assert checkpoints.restore_latest(like(make_state(0)))[0] == 2  # the huge one is empty
    checkpoints.save(3, make_state(3), {}, record(3))
    checkpoints.close()
    assert finished_steps(copied) == [3] and {*odd[:5], "5"} <= {path.name for path in copied.iterdir()}


def test_which_stay(tmp_path):
    """The newest, those of every 4th step, the two of the lowest loss; a loss that is no number counts for none."""
    checkpoints = Checkpoints(tmp_path / "c", keep=2, every=4, best=2)
    losses = {1: 9.0, 2: 1.0, 3: float("nan"), 4: 5.0, 5: 2.0, 6: 7.0, 7: None, 8: 8.0, 9: 3.0, 10: None}
    for step, loss in losses.items():
        checkpoints.save(step, make_state(step), {}, record(step) | {"val_loss": loss})
    checkpoints.close()
    assert finished_steps(tmp_path / "c") == [2, 4, 5, 8, 9, 10]
    checkpoints = Checkpoints(tmp_path / "c", keep=1, best=1)  # the losses are in the records
    checkpoints.rate(10, 0.5)  # of an evaluation after the save
    checkpoints.save(11, make_state(11), {}, record(11) | {"val_loss": 4.0})
    checkpoints.close()
    assert finished_steps(tmp_path / "c") == [10, 11]


def test_going_back_moves_later_ones_away(copied):
    checkpoints = Checkpoints(copied, keep=3)
    checkpoints.save(3, make_state(3), {}, record(3))
    assert checkpoints.supersede(after=1) == [2, 3]
    assert checkpoints.steps() == [1]
    checkpoints.save(2, make_state(2), {}, record(2))
    checkpoints.close()
    assert finished_steps(copied) == [1, 2]
    moved = sorted(path.name.split("-")[0] for path in (copied.parent / "superseded").iterdir())
    assert moved == ["2", "3"] and all(verify(path) is None for path in (copied.parent / "superseded").iterdir())


def test_two_hosts_agree(tmp_path):
    """Real processes: each says what it wrote, and what one of them cannot read is broken for both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tests.faults.two_hosts", str(port)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [*words, str(i), str(tmp_path)],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert first["gathered"] == [{"of": 0}, {"of": 1}] and first["problem"] == "mine, says process 1"
    assert first["refused"] == "ConfigError: the first one does not want to"
    items = [f"{item}/ocdbt.process_{i}" for item in ("params", "trainer") for i in range(2)]
    assert sorted(set(first["files"])) == items and first["left"] == []
    assert [first[key] for key in ("whole", "arrays", "files unreadable", "record")] == [4, 3, 2, 1]
    assert first["set aside"] == ["2", "3", "4"]
    assert "says process 1" in outputs[0][1]
