# SPDX-License-Identifier: Apache-2.0
"""Runs the Hopper kernels of ssd in Mosaic's interpreter: `ssd_gpu_interpreted.py CASE... CASE_WITH_PADDING`.

The kernels of the decays, which serve multiples of 64 heads alone, are compared with their versions in XLA.

One thread of a thread block waits for another: XLA must have enough of them (NPROC in the environment), whatever the
machine has. Products are plain ones here (``interpret`` of the kernels); barriers, slots, masks and layouts of the
arguments are the kernels' own.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import oracle
from pallas_kernels.layouts import make_segment_ids
from pallas_kernels.ops import OPS
from pallas_kernels.ops.ssd import cases
from pallas_kernels.ops.ssd.gpu import api as gpu
from pallas_kernels.ops.ssd.gpu import decay as gpu_decay

# Few long rows, so that they are cut into pieces.
PIECES = cases.Case("pieces", 1, 2060, 2, 64, 1, 64, layout="packed", initial=True, final=True)


def evaluate(inputs: dict, settings: dict, padding=None) -> dict:
    """Outputs and gradients of `sum(output * weight)` by name; the gradient of y is NaN where ``padding [B, T]``."""
    arrays, fixed = oracle.split("ssd", inputs)

    def call(arrays):
        given = {**arrays, **fixed}
        positional = [given.pop(name) for name in OPS["ssd"].positional]
        out = gpu.ssd_gpu(*positional, **given, **settings, interpret=True)
        return out if isinstance(out, tuple) else (out,)

    @jax.jit
    def both(arrays):
        out, pull = jax.vjp(call, arrays)
        weights = [jnp.asarray(w, o.dtype) for o, w in zip(out, oracle.make_weights([o.shape for o in out]))]
        if padding is not None:
            weights[0] = jnp.where(padding[..., None, None], jnp.nan, weights[0])
        return out, pull(tuple(weights))[0]

    out, grads = both(arrays)
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


def ignores_padding(case) -> bool:
    """Whether NaN in all padding changes nothing, in outputs and gradients."""
    inputs, settings = cases.make_inputs(case, "bfloat16"), cases.make_settings(case)
    padding = inputs["segment_ids"] == 0
    dirty = dict(inputs)
    for name in ("x", "dt", "B", "C"):
        dirty[name] = inputs[name].copy()
        dirty[name][padding] = np.nan
    clean, found = evaluate(inputs, settings), evaluate(dirty, settings, padding)
    bad = [name for name in clean if not np.array_equal(np.asarray(clean[name]), np.asarray(found[name]))]
    print(f"{case.name}: padding changes {', '.join(bad) or 'nothing'}")
    return not bad


def decay_kernels(layout, interpret=True) -> bool:
    """Whether the kernels of decays and of their gradients agree with XLA."""
    batch, tokens, heads, chunks = 2, 200, 64, 4
    rng = np.random.default_rng(4)
    dt = np.exp(rng.uniform(np.log(1e-6), np.log(80.0), (batch, tokens, heads))).astype(np.float32)
    dt[:, ::7] = 0.0
    dt, a = jnp.asarray(dt), -jnp.asarray(rng.uniform(0.1, 16.0, heads), jnp.float32)
    ids = make_segment_ids(layout, batch, tokens, seed=1)
    ids = None if ids is None else jnp.asarray(ids)
    ab, padding = gpu_decay.decays(dt, a, ids, chunks, interpret)
    real, begun = (None, None) if ids is None else gpu.document_vectors(ids, chunks)
    expected = gpu.decay_vectors(gpu._real_dt(dt, ids), a * gpu.LOG2E, chunks, begun)
    good = np.allclose(ab, expected, rtol=1e-5, atol=1e-4) and (ids is None or np.array_equal(padding, real))

    dt = jnp.maximum(dt, 0.01)  # x . v / dt of a smaller one would hide the rest
    shapes = {"source": (chunks, heads, 3), "target": (chunks, heads), "cross": (2, heads), "state": (2, heads)}
    sums = {
        name: jnp.asarray(rng.standard_normal((batch, *shape, gpu.TILE)), jnp.float32) for name, shape in shapes.items()
    }
    found = gpu_decay.gradients(*sums.values(), dt, a, ids, True, interpret)
    expected = gpu._dt_grads(sums, dt, a, ids)
    errors = [oracle.relative_rms(v, np.asarray(w, np.float64)) for v, w in zip(found, expected, strict=True)]
    print(f"decays of {layout} documents: {'as' if good else 'NOT as'} by XLA, gradients {max(errors):.1e} of 1e-05")
    return good and max(errors) < 1e-5


if __name__ == "__main__":
    known = cases.CASES | {PIECES.name: PIECES}
    *names, dirty = sys.argv[1:]
    good = [compare(known[name]) for name in names]
    good += [ignores_padding(known[dirty]), decay_kernels("scattered")]
    sys.exit(0 if all(good) else 1)
