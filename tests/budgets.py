# SPDX-License-Identifier: Apache-2.0
"""What each published pod setting may exchange and hold: `python -m tests.budgets [--compiled] [NAME ...]` writes it.

`tests/budgets.json` has for each setting what its train step asks for (traced: seconds each) and what the TPU compiler
makes of it (compiled: minutes each; only with --compiled, else those figures stay). `tests/test_budgets.py` compares.
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
import numpy as np

from hybridlm.config.find import pod_names, read_config
from hybridlm.plan import collectives, hlo
from hybridlm.plan.described import Described, described
from hybridlm.plan.slices import slice_devices

FILE = Path(__file__).with_suffix(".json")


@contextlib.contextmanager
def setting(name: str) -> Iterator[Described]:
    """The run of a published pod setting, "hybrid_8b:v5p:8x8x16", on the slices that it is for."""
    with described(read_config(name), slice_devices(name.partition(":")[2])) as run:
        yield run


def traced(run: Described) -> tuple[dict, jax.stages.Traced]:
    """{figure: number} of the traced step, and that."""
    step = run.trace()
    leaves = jax.tree.leaves(run.program.state_like)
    state = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)
    figures = {"state bytes": state} | _exchanged(collectives.of_traced(step))
    return figures | {f"{name} runs": runs for name, runs in collectives.kernels_of_traced(step).items()}, step


def compiled(step: jax.stages.Traced) -> dict[str, int]:
    """{figure: number} of the compiled step."""
    program = step.lower().compile()
    parsed = hlo.parse(program.as_text())
    peak = program.memory_analysis().peak_memory_in_bytes
    return {"peak bytes": peak, "largest array bytes": hlo.largest(parsed, 1)[0].bytes} | _exchanged(
        hlo.collectives(parsed), by_axes=False
    )


def _exchanged(found, *, by_axes: bool = True) -> dict[str, int]:
    totals = collectives.totals(found, by_axes=by_axes)
    return {f"{key} {what}": getattr(total, what) for key, total in totals.items() for what in ("runs", "bytes")}


def raised(figures: dict[str, int], budget: dict[str, int], share: float = 0.02) -> list[str]:
    """Lines for what is above the budget by more than the share of it, or not in it."""
    return [
        f"{name}: {number:,}, budget {budget.get(name, 0):,}"
        for name, number in figures.items()
        if number > budget.get(name, 0) * (1 + share)
    ]


def read() -> dict[str, dict[str, dict[str, int]]]:
    """The committed budgets: setting -> "traced" or "compiled" -> figure -> number."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(pod_names())}; none: all")
    parser.add_argument("--compiled", action="store_true", help="compile them too: minutes each")
    args = parser.parse_args(argv)
    budgets = read() if FILE.exists() else {}
    for name in args.names or pod_names():
        with setting(name) as run:
            figures, step = traced(run)
            kept = budgets.get(name, {}).get("compiled", {})
            budgets[name] = {"traced": figures, "compiled": compiled(step) if args.compiled else kept}
        known = {name: budgets[name] for name in pod_names() if name in budgets}
        FILE.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(budgets[name], indent=1))


if __name__ == "__main__":
    main()
