# SPDX-License-Identifier: Apache-2.0
"""Runs the Hopper kernels of ssd in Mosaic's interpreter, as a process: `ssd_gpu_interpreted.py CASE...`.

One thread of a thread block waits for another: XLA must have enough of them (NPROC in the environment), whatever the
machine has. Products are plain ones here (``interpret`` of the kernels); barriers, slots, masks and layouts of the
arguments are the kernels' own.
"""

import sys

import jax
import jax.numpy as jnp

from pallas_kernels import oracle
from pallas_kernels.ssd import cases, gpu

# Few long rows, so that they are cut into pieces.
PIECES = cases.Case("pieces", 1, 2060, 2, 64, 1, 64, layout="packed", initial=True, final=True)


def evaluate(inputs: dict, settings: dict) -> dict:
    """Outputs and gradients of `sum(output * weight)` by name."""
    arrays, fixed = oracle.split(inputs)

    def call(arrays):
        given = {**arrays, **fixed}
        positional = [given.pop(name) for name in oracle.POSITIONAL["ssd"]]
        out = gpu.ssd_gpu(*positional, **given, **settings, interpret=True)
        return out if isinstance(out, tuple) else (out,)

    def loss(arrays):
        out = call(arrays)
        weights = oracle.make_weights([o.shape for o in out])
        return sum(jnp.vdot(o.astype(jnp.float32), w) for o, w in zip(out, weights, strict=True)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return {f"out{i}": o for i, o in enumerate(out)} | {f"d{name}": grad for name, grad in grads.items()}


def compare(case) -> bool:
    """Prints the error of every tensor of a case; whether all are within the tolerance table."""
    inputs, settings = cases.make_inputs(case, "bfloat16"), cases.make_settings(case)
    actual = evaluate(inputs, settings)
    expected = oracle.oracle("ssd", inputs, **settings)
    largest = max(oracle.rms(value) for key, value in expected.items() if key.startswith("d"))
    good = actual.keys() == expected.keys()
    for key, value in expected.items():
        floor = oracle.SMALL_GRADIENT * largest if key.startswith("d") else 0.0
        error, limit = oracle.relative_rms(actual[key], value, floor), oracle.bound("bfloat16", f"ssd.{key}")
        good &= error <= limit
        print(
            f"{case.name}.{key}: relative RMS {error:.1e} of {limit:.0e}{'' if error <= limit else ' FAIL'}", flush=True
        )
    return good


if __name__ == "__main__":
    known = cases.CASES | {PIECES.name: PIECES}
    sys.exit(0 if all([compare(known[name]) for name in sys.argv[1:]]) else 1)
