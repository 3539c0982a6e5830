# SPDX-License-Identifier: Apache-2.0
"""One of two processes that save and restore together: python -m tests.faults.two_hosts PORT INDEX FOLDER.

The second one cannot read what the first one can; both say what they restored.
"""

import sys
from pathlib import Path

import jax

PORT, INDEX, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{PORT}", 2, INDEX)

import json  # noqa: E402 (after the processes have met)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from hybridlm.cluster import from_first, gathered, one_problem  # noqa: E402
from hybridlm.errors import ConfigError, RunError  # noqa: E402
from hybridlm.train import checkpoint, manifest  # noqa: E402
from hybridlm.train.checkpoint import Checkpoints  # noqa: E402

mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())


def make_state(step: int) -> dict:
    rows = np.arange(64, dtype=np.float32).reshape(8, 8) * step
    return {
        "params": {"w": jax.make_array_from_callback((8, 8), split, lambda index: rows[index])},
        "opt_state": jax.make_array_from_callback((8, 8), split, lambda index: -rows[index]),
        "step": jax.device_put(jnp.int32(step), whole),
    }


def restore(checkpoints: Checkpoints) -> int:
    """The step restored, once its values are seen to be right."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0))
    step, state, record = checkpoints.restore_latest(like)
    expected = make_state(step)
    for found, right in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        for a, b in zip(found.addressable_shards, right.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    assert record["data"] == {"step": step}
    return step


def broken_for_one(module, name: str, checkpoints: Checkpoints) -> int:
    """What both restore while a function fails in the second process for the newest checkpoint."""
    function = getattr(module, name)
    newest = str(checkpoints.steps()[-1])

    def failing(path, *args):
        if newest in Path(path).parts:
            raise OSError(5, "Input/output error", str(path))
        return function(path, *args)

    if INDEX == 1:
        setattr(module, name, failing)
    step = restore(checkpoints)
    setattr(module, name, function)
    return step


def refused() -> None:
    raise ConfigError("the first one does not want to")


said = {"gathered": gathered({"of": INDEX}), "problem": one_problem("mine" if INDEX else None)}
try:
    from_first(refused)
except (ConfigError, RunError) as error:
    said["refused"] = f"{type(error).__name__}: {error}"
checkpoints = Checkpoints(FOLDER / "c", keep=9)
for step in (1, 2, 3, 4):
    checkpoints.save(step, make_state(step), {}, {"data": {"step": step}})
checkpoints.wait()
gathered(None)
files = json.loads((FOLDER / "c" / "4" / manifest.NAME).read_bytes().split(b"\n")[0])["files"]
said["files"] = sorted(name.split("/d/")[0] for name in files if "/ocdbt.process_" in name and "/d/" in name)
said["left"] = [path.name for path in (FOLDER / "c" / "4").glob("manifest-*")]
said["whole"] = restore(checkpoints)
said["arrays"] = broken_for_one(checkpoint, "_item", checkpoints)
said["files unreadable"] = broken_for_one(manifest, "_size", checkpoints)
said["record"] = broken_for_one(checkpoint, "read_json", checkpoints)
said["set aside"] = sorted(path.name.split("-")[0] for path in (FOLDER / "broken").iterdir())
checkpoints.close()
print(json.dumps(said), flush=True)
jax.distributed.shutdown()
