# SPDX-License-Identifier: Apache-2.0
"""Runs an op with gradients for all its arrays, and its oracle in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.compat import enable_x64
from tests.tolerances import check_close

POSITIONAL = {"ssd": ("x", "dt", "A", "B", "C"), "attention": ("q", "k", "v"), "causal_conv1d": ("x", "w", "b")}
INTEGERS = ("segment_ids", "positions")
QUICK = {"xla_backend_optimization_level": 0}


def run(op: str, inputs: dict, *, weights: list | None = None, optimize: bool = False, **settings) -> dict[str, np.ndarray]:
    """Outputs and gradients of sum(output * weight), by name: out0, out1, d<input>. `inputs` as made by cases.py.

    Compiled without machine-code optimisation, which halves the time of these tests; slow tests optimize.
    """
    arrays = {name: jnp.asarray(a) for name, a in inputs.items() if a is not None and name not in INTEGERS}
    fixed = {name: jax.tree.map(jnp.asarray, inputs[name]) for name in INTEGERS if inputs.get(name) is not None}

    def outputs(arrays):
        named = {**arrays, **fixed}
        args = [named.pop(name, None) for name in POSITIONAL[op]]
        out = getattr(pallas_kernels, op)(*args, **named, **settings)
        return out if isinstance(out, tuple) else (out,)

    if weights is None:
        weights = make_weights([out.shape for out in jax.eval_shape(outputs, arrays)])

    def loss(arrays):
        out = outputs(arrays)
        # Weights in the dtype of each output, so that the cotangent is the same number for all of them.
        return sum(jnp.sum((o * w.astype(o.dtype)).astype(jnp.float32 if o.dtype != jnp.float64 else o.dtype))
                   for o, w in zip(out, weights, strict=True)), out  # fmt: skip

    function = jax.value_and_grad(loss, has_aux=True)
    (_, out), grads = jax.jit(function, compiler_options=None if optimize else QUICK)(arrays)
    named = {f"out{i}": o for i, o in enumerate(out)} | {f"d{name}": g for name, g in grads.items()}
    return {name: np.asarray(a, np.float64) for name, a in named.items()}


def make_weights(shapes, seed: int = 11) -> list[np.ndarray]:
    """Loss weights, exact in bfloat16."""
    rng = np.random.default_rng(seed)
    return [np.asarray(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16), np.float32) for shape in shapes]


def oracle(op: str, inputs: dict, *, weights: list | None = None, **settings) -> dict[str, np.ndarray]:
    """`run` of the reference in float64, on the very numbers of `inputs`."""
    settings = {k: v for k, v in settings.items() if k not in ("implementation", "chunk", "optimize")}
    with enable_x64():
        wide = {
            name: a if a is None or name in INTEGERS else np.asarray(a).astype(np.float64) for name, a in inputs.items()
        }
        return run(op, wide, weights=weights, implementation="reference", **settings)


def check_against_oracle(op: str, inputs: dict, *, dtype="float32", **settings) -> None:
    """Every output and gradient of the op within the tolerance table of its float64 reference."""
    actual = run(op, inputs, **settings)
    expected = oracle(op, inputs, **settings)
    assert actual.keys() == expected.keys()
    for name in actual:
        check_close(actual[name], expected[name], dtype=dtype, what=f"{op}.{name}")

