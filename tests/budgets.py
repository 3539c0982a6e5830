# SPDX-License-Identifier: Apache-2.0
"""What each published pod setting may exchange and hold: `python -m tests.budgets [--compiled] [NAME ...]` writes it.

`tests/budgets.json` has for each setting what its train step asks for (traced: seconds each) and what the TPU compiler
makes of it (compiled: minutes each; only with --compiled, else those figures stay), as `hybridlm plan --budget` writes
them. `tests/test_budgets.py` compares.
Needs libtpu. Bytes are of one device and one step.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax

from hybridlm.config.find import pod_names, read_config
from hybridlm.model.pattern import spots
from hybridlm.plan import budget, collectives
from hybridlm.plan.compiled import compile
from hybridlm.plan.counted import shard_bytes
from hybridlm.plan.described import Described, described
from hybridlm.plan.slices import slice_devices
from hybridlm.plan.traced import flops
from hybridlm.train.layout import unrolled

FILE = Path(__file__).with_suffix(".json")


@contextlib.contextmanager
def setting(name: str) -> Iterator[Described]:
    """The run of a published pod setting, "hybrid_8b:v5p:8x8x16", on the slices that it is for."""
    with described(read_config(name), slice_devices(name.partition(":")[2])) as run:
        yield run


def traced(run: Described) -> tuple[budget.Figures, jax.stages.Traced]:
    """Figures of the traced step, and that."""
    step = run.trace()
    state = sum(map(shard_bytes, jax.tree.leaves(run.program.state_like)))
    exchanges = collectives.totals(collectives.of_traced(step))
    model = unrolled(run.config.model, run.mesh)
    sublayers = len(spots(model.pattern, model.unroll))
    computed = flops(step, run.mesh.size).all
    return budget.traced(state, sublayers, computed, exchanges, collectives.kernels_of_traced(step)), step


def compiled(step: jax.stages.Traced) -> budget.Figures:
    """Figures of the compiled step."""
    return budget.compiled(compile(step.lower(), "tpu"))


def read() -> dict[str, dict[str, budget.Figures]]:
    """The committed budgets: setting -> "traced" or "compiled" -> figure -> number."""
    return budget.read(FILE)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(pod_names())}; none: all")
    parser.add_argument("--compiled", action="store_true", help="compile them too: minutes each")
    args = parser.parse_args(argv)
    for name in args.names or pod_names():
        with setting(name) as run:
            figures, step = traced(run)
            found = {"traced": figures, "compiled": compiled(step) if args.compiled else {}}
        budget.write(FILE, name, found)
        print(name, json.dumps(read()[name], indent=1))
    stale = read().keys() - set(pod_names())
    if stale:
        FILE.write_text(
            json.dumps({n: f for n, f in read().items() if n not in stale}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
