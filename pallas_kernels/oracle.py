# SPDX-License-Identifier: Apache-2.0
"""Compares an implementation of an op, gradients included, with its float64 reference; holds the one tolerance table.

Used by the tests and by `python -m pallas_kernels.bench OP --check`. Works on the inputs that the ops' cases.py make.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ops
from pallas_kernels.compat import enable_x64
from pallas_kernels.ops import OPS

# Relative RMS allowed by dtype of the activations; a tensor is looked up by its longest matching prefix, "" is the
# rest. Rounding a result to bfloat16 alone is 1.7e-3, to float16 2e-4, and gradients add up a few of those.
RELATIVE_RMS = {
    "float64": {"": 1e-10},
    "float32": {"": 1e-5},
    "float16": {"": 2e-3},
    "bfloat16": {"": 1e-2},
}

# A gradient much smaller than the others of its call is a sum that cancels: its error counts relative to this share
# of them.
SMALL_GRADIENT = 1e-2


def call(op: str, inputs: dict, *, function: Callable | None = None, **settings) -> tuple:
    """The op, or `function` in its place, on inputs by name; always a tuple of outputs."""
    inputs = {name: array for name, array in inputs.items() if array is not None}
    args = [inputs.pop(name, None) for name in OPS[op].positional]
    out = (function or ops.function(op))(*args, **inputs, **settings)
    return out if isinstance(out, tuple) else (out,)


def split(op: str, inputs: dict) -> tuple[dict, dict]:
    """(arrays that have gradients, the others), as they are given."""
    given = {name: array for name, array in inputs.items() if array is not None}
    fixed = {name: given.pop(name) for name in OPS[op].integers if name in given}
    return given, fixed


def make_weights(shapes, seed: int = 11) -> list[np.ndarray]:
    """Loss weights of outputs, exact in bfloat16."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape).astype(jnp.bfloat16), np.float32) for shape in shapes]


def evaluate(op: str, inputs: dict, *, weights=None, compiler_options=None, **settings) -> dict[str, np.ndarray]:
    """Outputs and gradients of sum(output * weight) by name (out0, out1, d<input>), widened to float64 arrays."""
    return _named(_program(op, settings, compiler_options), op, inputs, weights, settings)


def _program(op: str, settings: Mapping, compiler_options):
    """((loss, outputs), gradients by name) of arrays, integers and loss weights."""

    def loss(arrays, fixed, weights):
        out = call(op, {**arrays, **fixed}, **settings)
        parts = [
            jnp.vdot(o.astype(jnp.promote_types(o.dtype, jnp.float32)), w) for o, w in zip(out, weights, strict=True)
        ]
        return sum(parts), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=compiler_options)


@functools.cache
def _reference(op: str, settings: tuple, compiler_options: tuple):
    """`_program` of the reference, which is asked of the same shapes again and again."""
    return _program(op, {**dict(settings), "implementation": "reference"}, dict(compiler_options) or None)


def _named(program: Callable, op: str, inputs: dict, weights, settings: Mapping) -> dict[str, np.ndarray]:
    """What a program gives of inputs, by name, in float64."""
    arrays, fixed = split(op, inputs)
    if weights is None:
        outputs = jax.eval_shape(lambda arrays, fixed: call(op, {**arrays, **fixed}, **settings), arrays, fixed)
        weights = make_weights([out.shape for out in outputs])
    (_, out), grads = program(arrays, fixed, list(weights))
    named = {f"out{i}": o for i, o in enumerate(out)} | {f"d{name}": grad for name, grad in grads.items()}
    return {name: np.asarray(array, np.float64) for name, array in named.items()}


def oracle(op: str, inputs: dict, *, weights=None, compiler_options=None, **settings) -> dict[str, np.ndarray]:
    """`evaluate` of the reference in float64 on the CPU, on the very numbers of `inputs`."""
    settings = {k: v for k, v in settings.items() if k not in ("implementation", "chunk", "function")}
    if any(isinstance(value, (np.ndarray, jax.Array)) for value in settings.values()):  # which no cache looks up
        program = _program(op, {**settings, "implementation": "reference"}, compiler_options)
    else:
        program = _reference(op, tuple(sorted(settings.items())), tuple(sorted((compiler_options or {}).items())))
    with enable_x64(), jax.default_device(jax.devices("cpu")[0]):
        wide = {
            name: array if array is None or name in OPS[op].integers else np.asarray(array).astype(np.float64)
            for name, array in inputs.items()
        }
        return _named(program, op, wide, weights, {**settings, "implementation": "reference"})


def compare(op: str, inputs: dict, *, dtype, compiler_options=None, **settings) -> dict[str, tuple[float, float]]:
    """By output and gradient: (relative RMS against the oracle, limit)."""
    actual = evaluate(op, inputs, compiler_options=compiler_options, **settings)
    return errors(op, actual, oracle(op, inputs, compiler_options=compiler_options, **settings), dtype)


def errors(op: str, actual: dict, expected: dict, dtype) -> dict[str, tuple[float, float]]:
    """By output and gradient, as `evaluate` names them: (relative RMS, limit)."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"{op}: tensors {sorted(actual)}, expected {sorted(expected)}")
    largest = max((rms(value) for name, value in expected.items() if name.startswith("d")), default=0.0)
    return {
        name: (
            relative_rms(actual[name], expected[name], floor=SMALL_GRADIENT * largest if name.startswith("d") else 0.0),
            bound(dtype, f"{op}.{name}"),
        )
        for name in actual
    }


def bound(dtype, what: str = "") -> float:
    """The relative RMS allowed for tensor `what` computed in `dtype`."""
    table = RELATIVE_RMS[jnp.dtype(dtype).name]
    return table[max((prefix for prefix in table if what.startswith(prefix)), key=len)]


def relative_rms(actual, expected, floor: float = 0.0) -> float:
    """RMS of the difference over that of the expected tensor (over `floor` if larger); inf where not finite."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape or not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return float("inf")
    difference, scale = rms(actual - expected), max(rms(expected), floor)
    return difference / scale if scale else (float("inf") if difference else 0.0)


def rms(array) -> float:
    return float(np.sqrt(np.mean(np.square(array)))) if np.size(array) else 0.0
