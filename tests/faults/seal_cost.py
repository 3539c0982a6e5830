# SPDX-License-Identifier: Apache-2.0
"""What the manifest costs of a save, and its verification of a restore: python -m tests.faults.seal_cost FOLDER [GB].

A train state of float32 noise (what compresses least), Adam's shape: parameters and two of each. Five saves.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np

from hybridlm.train import manifest, sealed_path
from hybridlm.train.checkpoint import Checkpoints

SAVES = 5


def noise(gigabytes: float) -> dict:
    """A train state of so many GB."""
    n = int(gigabytes * 1e9 / 3 / 8 / 4 / 1024)
    draw = np.random.default_rng(0).standard_normal
    tree = lambda: {f"w{i}": jax.numpy.asarray(draw((n, 1024), np.float32)) for i in range(8)}
    return {"params": tree(), "opt_state": (tree(), tree()), "step": jax.numpy.int32(1)}


def main(words: list[str]) -> None:
    """Prints a line a save: seconds in all, of the manifest, the share; then those of a restore."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.seal_cost")
    parser.add_argument("folder", type=Path, help="where to write, on the disk in question")
    parser.add_argument("gigabytes", type=float, nargs="?", default=1.6, help="of the train state (1.6)")
    args = parser.parse_args(words)
    folder, state = args.folder, noise(args.gigabytes)
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    seal, spent = sealed_path.seal, []

    def timed(path: Path) -> None:
        began = time.monotonic()
        seal(path)
        spent.append(time.monotonic() - began)

    sealed_path.seal = timed
    checkpoints = Checkpoints(folder / "c", keep=1)
    shares = []
    for step in range(1, SAVES + 1):
        began = time.monotonic()
        checkpoints.save(step, state | {"step": jax.numpy.int32(step)}, {}, {})
        checkpoints.wait()
        seconds = time.monotonic() - began
        shares.append(spent[-1] / (seconds - spent[-1]))
        print(
            f"save {step}: {n_bytes / 1e9:.2f} GB, {seconds:.2f} s, manifest {spent[-1]:.3f} s, {shares[-1]:.2%}",
            flush=True,
        )
    print(f"median {np.median(shares):.2%} of what a save takes without it")
    began = time.monotonic()
    assert manifest.verify(folder / "c" / str(SAVES)) is None
    verified = time.monotonic() - began
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    began = time.monotonic()
    checkpoints.restore(SAVES, like)
    print(f"verify {verified:.2f} s of a restore of {time.monotonic() - began:.2f} s, from the page cache")
    checkpoints.close()
    shutil.rmtree(folder / "c")


if __name__ == "__main__":
    main(sys.argv[1:])
