# SPDX-License-Identifier: Apache-2.0
"""`pallas_kernels.oracle` as the tests use it: compiled without machine-code optimisation, which halves their time."""

import contextlib

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
    return oracles.evaluate(op, inputs, compiler_options=QUICK, **settings)


def oracle(op: str, inputs: dict, **settings):
    """The same of the reference in float64, see `pallas_kernels.oracle.oracle`."""
    return oracles.oracle(op, inputs, compiler_options=QUICK, **settings)


def check_curvature(loss, A) -> None:
    """The gradient of the gradient of A agrees with a difference of gradients."""
    grad = jax.jit(jax.grad(loss))
    curvature = jax.jit(jax.grad(lambda A: jnp.sum(jax.grad(loss)(A))))(A)
    steps = [jnp.sum(grad(A + e)) for e in (1e-2, -1e-2)]
    np.testing.assert_allclose(curvature.sum(), (steps[0] - steps[1]) / 2e-2, rtol=1e-2)


def check_against_oracle(op: str, inputs: dict, *, dtype="float32", optimize: bool = False, **settings) -> None:
    """Every output and gradient of the op within the tolerance table of its float64 reference."""
    options = OPTIMIZED if optimize else QUICK
    for name, (error, limit) in oracles.compare(op, inputs, dtype=dtype, compiler_options=options, **settings).items():
        assert error <= limit, f"{op}.{name}: relative RMS {error:.2e} above {limit:.0e} ({dtype})"
