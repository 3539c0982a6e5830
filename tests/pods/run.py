# SPDX-License-Identifier: Apache-2.0
"""A process of a small run, on two devices: main(FOLDER, MESH, ORDER, *WORDS), as JSON.

MESH: fields of MeshConfig. ORDER: devices of all processes as the mesh has them. WORDS: overrides. The run's folder and
its cache are FOLDER/run and what `--data.cache_dir` says.
"""

import json
import sys
from pathlib import Path

import jax

import pallas_kernels  # noqa: F401  before anything computes: see pallas_kernels.compat


def main(folder: str, mesh: str, order: str, *words: str) -> int:
    """Joins, trains, ends; the exit code."""
    from hybridlm.cli.start import start
    from hybridlm.config import MeshConfig
    from hybridlm.config.overrides import override
    from hybridlm.errors import ConfigError
    from hybridlm.probes.in_training import IN_TRAINING
    from hybridlm.sharding import make_mesh
    from hybridlm.train import loop
    from tests.contributing.runs import small_run

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_default_matmul_precision", "highest")
    start()
    places = json.loads(order)
    loop.make_mesh = lambda config: make_mesh(config, [jax.devices()[i] for i in places])
    try:
        config = override(small_run(Path(folder), mesh=MeshConfig(**json.loads(mesh))), words)
        return loop.train(config, probes=IN_TRAINING)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
