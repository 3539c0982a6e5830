# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact, the newest few, other meshes, broken ones, a full disk."""

import errno
import gc
import logging
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hybridlm.errors import RunError
from hybridlm.train.checkpoint import Checkpoints, finished_steps

# reads of broken files leave failed futures behind, which tensorstore reports when they are collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected_here():
    """Those futures are collected in this test, not at some point of a later one."""
    yield
    gc.collect()


def make_state(step: int) -> dict:
    keys = jax.random.split(jax.random.key(step), 2)
    return {
        "params": {"w": jax.random.normal(keys[0], (64, 32)), "layers": [jax.random.normal(keys[1], (8,))]},
        "opt_state": (jnp.full((64, 32), step, jnp.float32), jnp.int32(step)),
        "key": jax.random.key_data(keys[0]),
    }


def like(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state)


def save_steps(folder, steps, keep=3):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, make_state(step), {"name": "x"}, {"data": {"step": step}, "loss": 0.1 + step})
    checkpoints.close()


def assert_equal(actual, expected):
    chex.assert_trees_all_equal(actual, expected, strict=True)


def test_round_trip_and_the_newest_few(tmp_path):
    save_steps(tmp_path / "c", [1, 2, 3, 4], keep=2)
    assert finished_steps(tmp_path / "c") == [3, 4]
    checkpoints = Checkpoints(tmp_path / "c", 2)
    step, state, record = checkpoints.restore_latest(like(make_state(0)))
    assert step == 4 and record == {"data": {"step": 4}, "loss": 4.1}
    assert_equal(state, make_state(4))
    params_alone, _ = checkpoints.restore(3, {"params": like(make_state(0))["params"]})
    assert_equal(params_alone, {"params": make_state(3)["params"]})
    checkpoints.close()


def test_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", 2)
    assert checkpoints.restore_latest(like(make_state(0))) is None
    checkpoints.close()


def test_the_state_can_be_donated_while_it_is_written(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "c", 2)
    state = make_state(1) | {"opt_state": (jnp.ones((1000, 1000)), jnp.int32(1))}
    expected = jax.device_get(state)
    expected = jax.tree.map(np.copy, expected)
    checkpoints.save(1, state, {}, {})
    overwrite(state)
    _, restored, _ = checkpoints.restore_latest(like(expected, jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    assert_equal(restored, expected)
    checkpoints.close()


def test_another_mesh(tmp_path):
    save_steps(tmp_path / "c", [1])
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = like(make_state(0), NamedSharding(mesh, P()))
    shapes["params"]["w"] = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    checkpoints = Checkpoints(tmp_path / "c", 2)
    _, state, _ = checkpoints.restore_latest(shapes)
    assert state["params"]["w"].sharding.spec == P("fsdp")
    assert_equal(state, make_state(1))
    checkpoints.close()


def cut_arrays(folder):
    """Halves the largest file of each item."""
    for item in ("params", "trainer"):
        file = max((f for f in (folder / item).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_files(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


DAMAGES = {
    "arrays cut": cut_arrays,
    "files empty": empty_files,
    "parameters missing": lambda folder: shutil.rmtree(folder / "params"),
    "loop record missing": lambda folder: shutil.rmtree(folder / "loop"),
    "empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


OFTEN = ("arrays cut", "loop record missing")


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in DAMAGES]
)
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_used(tmp_path, caplog, damage):
    save_steps(tmp_path / "c", [1, 2])
    DAMAGES[damage](tmp_path / "c" / "2")
    checkpoints = Checkpoints(tmp_path / "c", 3)
    with caplog.at_level(logging.WARNING, "hybridlm"):
        step, state, _ = checkpoints.restore_latest(like(make_state(0)))
    assert step == 1 and "checkpoint of step 2 cannot be read" in caplog.text
    assert_equal(state, make_state(1))
    assert [f.name.split("-")[0] for f in (tmp_path / "broken").iterdir()] == ["2"]
    checkpoints.save(2, make_state(2), {}, {})
    checkpoints.close()
    assert finished_steps(tmp_path / "c") == [1, 2]


def test_unfinished_writes_are_cleared(tmp_path):
    save_steps(tmp_path / "c", [1, 2])
    shutil.copytree(tmp_path / "c" / "2", tmp_path / "c" / "3.orbax-checkpoint-tmp-17")
    checkpoints = Checkpoints(tmp_path / "c", 3)
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, make_state(3), {}, {})
    checkpoints.close()
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == ["1", "2", "3"]


def test_where_none_can_be_read_nothing_is_moved(tmp_path):
    save_steps(tmp_path / "c", [1, 2])
    for step in ("1", "2"):
        cut_arrays(tmp_path / "c" / step)
    checkpoints = Checkpoints(tmp_path / "c", 3)
    with pytest.raises(RunError, match="none of the checkpoints"):
        checkpoints.restore_latest(like(make_state(0)))
    checkpoints.close()
    assert finished_steps(tmp_path / "c") == [1, 2] and not (tmp_path / "broken").exists()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np, jax.numpy as jnp
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.errors import RunError
rng = np.random.default_rng(0)
state = {"params": {"w": jnp.asarray(rng.normal(size=(300, 300)))}, "step": jnp.int32(1)}
checkpoints = Checkpoints(Path(sys.argv[1]), 2)
checkpoints.save(1, state, {}, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, state, {}, {})
    checkpoints.wait()
except RunError as error:
    print("SAID", error)
"""


def test_a_write_that_fails_is_one_line_and_loses_nothing(tmp_path):
    """A limit on the size of files stands in for a full disk: the write of the arrays fails in the same place."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "c")], capture_output=True, text=True, timeout=120
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert len(said) == 1, done.stderr[-2000:]
    assert "cannot write the checkpoint of step 2" in said[0] and "step 1 is untouched" in said[0]
    checkpoints = Checkpoints(tmp_path / "c", 2)
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_no_space_is_told_apart_from_a_bug(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "c", 2)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(RunError, match=r"checkpoint of step 7 in .*: No space left on device"):
        checkpoints.save(7, make_state(1), {}, {})

    def wrong(*args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(checkpoints._manager, "save", wrong)
    with pytest.raises(TypeError):
        checkpoints.save(8, make_state(1), {}, {})
    checkpoints._manager.close()
