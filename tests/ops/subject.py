# SPDX-License-Identifier: Apache-2.0
"""An implementation of an op as its contract sees it: inputs, results, what the float64 reference gives.

Each subject is run on the smallest case that shows all of its contract (CONTRACT of the op's cases). Interpreted
kernels take seconds to compile, so properties share what is compiled: rows of all tokens, and rows of half of them.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from pallas_kernels import assume_platform, oracle
from pallas_kernels.layouts import make_segment_ids
from pallas_kernels.op import KERNELS, Implementation, Op
from pallas_kernels.ops import OPS
from tests.ops.interpreter import interpreted
from tests.ops.support import QUICK, loss_weights, served_by

ABSENT = {"tpu": {"generation": "v5e"}, "gpu": {"capability": "9.0"}}  # the devices that kernels are traced for


@dataclasses.dataclass(frozen=True)
class Subject:
    """An implementation of an op; changed in what it computes where `change` is given: a function of its results."""

    name: str
    implementation: str
    change: Callable | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.implementation}"

    @property
    def op(self) -> Op:
        return OPS[self.name]

    @property
    def is_kernel(self) -> bool:
        return self.implementation in KERNELS

    @property
    def way(self) -> Implementation:
        return self.op.implementations[self.implementation]

    @property
    def case(self):
        return self.op.cases_module().CONTRACT[self.implementation]

    @functools.cached_property
    def dtype(self) -> str:
        """float32, or bfloat16 of a kernel that serves no other."""
        return "bfloat16" if self.why_not("float32") else "float32"

    def inputs(self, dtype: str | None = None, **changes) -> dict:
        """Arrays of the case by name."""
        case = dataclasses.replace(self.case, **changes)
        inputs = self.op.cases_module().make_inputs(case, dtype or self.dtype)
        return {name: array for name, array in inputs.items() if array is not None}

    @property
    def settings(self) -> dict:
        return self.op.cases_module().make_settings(self.case)

    def why_not(self, dtype: str) -> str | None:
        """Why the implementation does not serve the case in a dtype."""
        if not self.is_kernel:
            return None
        try:
            self.trace(self.inputs(dtype))
        except NotImplementedError as error:
            return str(error).partition("\n---")[0]  # JAX adds a note on its frames
        return None

    def trace(self, inputs: dict):
        """Traces the implementation as it is compiled for its device, not interpreted."""
        with self.device():
            return jax.eval_shape(functools.partial(self.call, **self.settings), inputs)

    def device(self):
        """What is assumed where a kernel is traced for its device."""
        if not self.is_kernel:
            return contextlib.nullcontext()
        return assume_platform(self.implementation, **ABSENT[self.implementation])

    def call(self, arrays: dict, **settings) -> tuple:
        """The results on arrays by name, by the implementation as it is named."""
        implementation = "auto" if self.change else self.implementation
        return oracle.call(self.name, arrays, implementation=implementation, **settings)

    @contextlib.contextmanager
    def serving(self):
        """Within, `call` runs here: kernels are interpreted, a change is made."""
        with contextlib.ExitStack() as stack:
            if self.is_kernel:
                stack.enter_context(interpreted(self.name, self.implementation))
            if self.change:
                function = self.way.load()
                stack.enter_context(
                    served_by(lambda *args, **more: self.change(function(*args, **more)), only=self.name)
                )
            yield

    def run(self, inputs: dict, weights=None, **settings) -> dict[str, np.ndarray]:
        """Outputs and gradients of sum(output * weight) by name, as `oracle.evaluate` gives them."""
        settings = {**self.settings, **settings}
        arrays, fixed = oracle.split(self.name, inputs)
        weights = self.weights(inputs) if weights is None else weights
        with self.serving():
            function = compiled(self, tuple(sorted(settings.items())))
            out, grads = function(arrays, fixed, list(weights))
        named = {f"out{i}": o for i, o in enumerate(out)} | {f"d{name}": grad for name, grad in grads.items()}
        return {name: np.asarray(array, np.float64) for name, array in named.items()}

    def weights(self, inputs: dict) -> list[np.ndarray]:
        """Loss weights of the outputs, whose shapes the reference knows soonest."""
        return loss_weights(self.name, inputs, **self.settings)

    def check(self, actual: dict, expected: dict, dtype: str | None = None, what: str = "") -> None:
        """Every tensor within the tolerance table; gradients too, where the implementation has them."""
        expected = {name: expected[name] for name in expected if self.way.gradients or name.startswith("out")}
        for name, (error, limit) in oracle.errors(self.name, actual, expected, dtype or self.dtype).items():
            assert error <= limit, f"{self}{what}.{name}: relative RMS {error:.1e} above {limit:.0e}"


def subjects() -> list[Subject]:
    return [Subject(name, implementation) for name, op in OPS.items() for implementation in op.implementations]


@functools.cache
def compiled(subject: Subject, settings: tuple):
    """(outputs, gradients by name) of arrays, integers and loss weights; compiled once for each shape."""

    def both(arrays, fixed, weights):
        def outputs(arrays):
            return subject.call({**arrays, **fixed}, **dict(settings))

        if not subject.way.gradients:
            return outputs(arrays), {}
        out, pull = jax.vjp(outputs, arrays)
        return out, pull(tuple(w.astype(o.dtype) for w, o in zip(weights, out, strict=True)))[0]

    return jax.jit(both, compiler_options=QUICK)


@contextlib.contextmanager
def compiling_anew():
    """Within, nothing compiled before is used: for tests that change how an implementation goes about its work."""
    compiled.cache_clear()
    try:
        yield
    finally:
        compiled.cache_clear()


_ORACLES: dict[tuple, dict] = {}
"""What was asked of the float64 reference before: most implementations are shown the same."""


def expected_of(subject: Subject, inputs: dict) -> dict:
    """Of rows without ids as of one document each: one program for both."""
    arrays = tuple((name, np.asarray(a).tobytes(), np.shape(a), str(a.dtype)) for name, a in sorted(inputs.items()))
    key = (subject.name, str(sorted(subject.settings.items(), key=str)), arrays)
    if key not in _ORACLES:
        inputs = {**layout_of(subject, "one"), **inputs}
        settings = {**subject.settings, "compiler_options": QUICK}
        _ORACLES[key] = oracle.oracle(subject.name, inputs, weights=subject.weights(inputs), **settings)
    return _ORACLES[key]


def layout_of(subject: Subject, layout: str) -> dict:
    """segment_ids of a layout by name, where the op has such."""
    if not subject.op.has_segments:
        return {}
    inputs = subject.inputs()
    return {"segment_ids": make_segment_ids(layout, *inputs[subject.op.tokens[0]].shape[:2], seed=3)}


def tokens_of(subject: Subject, inputs: dict, part: slice) -> dict:
    """Inputs of a part of the tokens."""
    names = (*subject.op.tokens, "segment_ids")
    return {name: array[:, part] if name in names else array for name, array in inputs.items()}
