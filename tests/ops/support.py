# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.oracle` as the tests use it: compiled without machine-code optimisation, which halves their time."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import op as door
from pallas_kernels import oracle as oracles

QUICK = {"xla_backend_optimization_level": 0}
OPTIMIZED = {"xla_backend_optimization_level": 3}
"""As shipped, also where the flags of the tests say otherwise."""


@contextlib.contextmanager
def served_by(function, takes: tuple[str, ...] = (), only: str | None = None):
    """Within, calls of ops (of one of them) are served by `function`, an interpreted kernel, say, but those of the
    reference."""
    select = door.select

    def choose(op, implementation, args, kwargs):
        if implementation == "reference" or op.name != (only or op.name):
            return select(op, implementation, args, kwargs)
        return door.Implementation(function, takes=takes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(door, "select", choose)
        yield


def run(op: str, inputs: dict, **settings):
    """Outputs and gradients by name, see `pallas_kernels.oracle.evaluate`."""
    settings.setdefault("weights", loss_weights(op, inputs, **settings))
    return oracles.evaluate(op, inputs, compiler_options=QUICK, **settings)


def oracle(op: str, inputs: dict, **settings):
    """The same of the reference in float64, see `pallas_kernels.oracle.oracle`."""
    settings.setdefault("weights", loss_weights(op, inputs, **settings))
    return oracles.oracle(op, inputs, compiler_options=QUICK, **settings)


def check_curvature(loss, A) -> None:
    """The gradient of the gradient of A agrees with a difference of gradients."""
    grad = jax.jit(jax.grad(loss))
    curvature = jax.jit(jax.grad(lambda A: jnp.sum(jax.grad(loss)(A))))(A)
    steps = [jnp.sum(grad(A + e)) for e in (1e-2, -1e-2)]
    np.testing.assert_allclose(curvature.sum(), (steps[0] - steps[1]) / 2e-2, rtol=1e-2)


def loss_weights(op: str, inputs: dict, **settings) -> list[np.ndarray]:
    """Of the op's outputs, as `pallas_kernels.oracle` draws them; traced once for each shape, of the reference."""
    settings = {name: settings[name] for name in settings if name not in ("implementation", "chunk", "function")}
    given = {name: array for name, array in inputs.items() if array is not None}
    leaves, tree = jax.tree.flatten(given)
    known = tuple((np.shape(leaf), jnp.result_type(leaf).name) for leaf in leaves)
    key = (op, tree, known, tuple(sorted((name, repr(value)) for name, value in settings.items())))
    if key not in _SHAPES:
        reference = functools.partial(oracles.call, op, implementation="reference", **settings)
        _SHAPES[key] = [out.shape for out in jax.eval_shape(reference, given)]
    return oracles.make_weights(_SHAPES[key])


_SHAPES: dict[tuple, list] = {}


def check_against_oracle(op: str, inputs: dict, *, dtype="float32", optimize: bool = False, **settings) -> None:
    """Every output and gradient of the op within the tolerance table of its float64 reference."""
    settings |= {"compiler_options": OPTIMIZED if optimize else QUICK, "weights": loss_weights(op, inputs, **settings)}
    _within(op, oracles.evaluate(op, inputs, **settings), oracles.oracle(op, inputs, **settings), dtype)


def check_outputs(op: str, inputs: dict, *, dtype="float32", **settings) -> None:
    """The outputs alone, of a forward pass alone: where a fault is in them, its gradients need not be compiled."""
    program = jax.jit(lambda inputs: oracles.call(op, inputs, **settings), compiler_options=QUICK)
    actual = {f"out{i}": np.asarray(out, np.float64) for i, out in enumerate(program(inputs))}
    expected = oracle(op, inputs, **settings)
    _within(op, actual, {name: expected[name] for name in actual}, dtype)


def run_by_one_program(op: str, inputs: dict, *, change=None, **settings) -> dict[str, np.ndarray]:
    """`run` by a program that calls of the same shapes share; `change` names what a test has changed in the op."""
    program = _program(op, tuple(sorted(settings.items())), change)
    return oracles._named(program, op, inputs, loss_weights(op, inputs, **settings), settings)


def check_by_one_program(op: str, inputs: dict, *, dtype="float32", change=None, **settings) -> None:
    """`check_against_oracle` by a program that calls of the same shapes share, as `run_by_one_program`."""
    actual = run_by_one_program(op, inputs, change=change, **settings)
    _within(op, actual, oracle(op, inputs, **settings), dtype)


@functools.cache
def _program(op: str, settings: tuple, change):
    return oracles._program(op, dict(settings), QUICK)


def _within(op: str, actual: dict, expected: dict, dtype: str) -> None:
    for name, (error, limit) in oracles.errors(op, actual, expected, dtype).items():
        assert error <= limit, f"{op}.{name}: relative RMS {error:.2e} above {limit:.0e} ({dtype})"
