# SPDX-License-Identifier: Apache-2.0
"""What every implementation of every op must hold: one function a property, of a `Subject`. Asks ops by their values.

Each subject is run on the smallest case that shows all of its contract (CONTRACT of the op's cases). Interpreted
kernels take seconds to compile, so properties share what is compiled: rows of all tokens, and rows of half of them.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform, oracle
from pallas_kernels.compat import enable_x64
from pallas_kernels.layouts import make_segment_ids
from pallas_kernels.op import KERNELS, Implementation, Op, select
from pallas_kernels.ops import OPS
from tests.ops.interpreter import interpreted
from tests.ops.support import QUICK, loss_weights, served_by, split

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
        arrays, fixed = split(self.name, inputs)
        weights = self.weights(inputs) if weights is None else weights
        with self.serving():
            function = _compiled(self, tuple(sorted(settings.items())))
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
def _compiled(subject: Subject, settings: tuple):
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
    _compiled.cache_clear()
    try:
        yield
    finally:
        _compiled.cache_clear()


_ORACLES: dict[tuple, dict] = {}
"""What was asked of the float64 reference before: most implementations are shown the same."""


def _oracle(subject: Subject, inputs: dict) -> dict:
    """Of rows without ids as of one document each: one program for both."""
    arrays = tuple((name, np.asarray(a).tobytes(), np.shape(a), str(a.dtype)) for name, a in sorted(inputs.items()))
    key = (subject.name, str(sorted(subject.settings.items(), key=str)), arrays)
    if key not in _ORACLES:
        inputs = {**_layout(subject, "one"), **inputs}
        settings = {**subject.settings, "compiler_options": QUICK}
        _ORACLES[key] = oracle.oracle(subject.name, inputs, weights=subject.weights(inputs), **settings)
    return _ORACLES[key]


def _layout(subject: Subject, layout: str) -> dict:
    """segment_ids of a layout by name, where the op has such."""
    if not subject.op.has_segments:
        return {}
    inputs = subject.inputs()
    return {"segment_ids": make_segment_ids(layout, *inputs[subject.op.tokens[0]].shape[:2], seed=3)}


def _tokens(subject: Subject, inputs: dict, part: slice) -> dict:
    """Inputs of a part of the tokens."""
    names = (*subject.op.tokens, "segment_ids")
    return {name: array[:, part] if name in names else array for name, array in inputs.items()}


# The properties. Each raises AssertionError where it does not hold.


def check_oracle(subject: Subject) -> None:
    """Results and gradients are those of the float64 reference: of several documents a row, of padding."""
    inputs = {**subject.inputs(), **_layout(subject, "scattered")}
    subject.check(subject.run(inputs), _oracle(subject, inputs))


def check_without_ids(subject: Subject) -> None:
    """They are where each row is one document and nobody says so."""
    if subject.op.has_segments:
        subject.check(subject.run(subject.inputs()), _oracle(subject, subject.inputs()))


def check_an_error_is_seen(subject: Subject) -> None:
    """Guards the contract itself: any tensor off by 5% fails it."""
    inputs = {**subject.inputs(), **_layout(subject, "scattered")}
    actual, expected = subject.run(inputs), _oracle(subject, inputs)
    for name in actual:
        with pytest.raises(AssertionError, match=rf"\.{name}: relative RMS"):
            subject.check({**actual, name: 1.05 * actual[name]}, expected)


def check_packed(subject: Subject) -> None:
    """Two documents of a row give what each gives alone; gradients of what they share are the sum."""
    if not subject.op.has_segments:
        return
    inputs = subject.inputs()
    n_batch, n_tokens = inputs[subject.op.tokens[0]].shape[:2]
    half = n_tokens // 2
    ids = np.repeat([[5, 2]], half, axis=1).repeat(n_batch, axis=0).astype(np.int32)
    weights = subject.weights(inputs)
    packed = subject.run({**inputs, "segment_ids": ids}, weights)
    parts = []
    for number in (0, 1):
        own = slice(number * half, (number + 1) * half)
        alone = _tokens(subject, {**inputs, "segment_ids": ids}, own)
        kept = [weights[0][:, own]]
        for name, weight in zip(subject.op.states, weights[1:], strict=True):
            alone[name] = inputs[name] * (number == 0)
            kept.append(weight * (number == 1))
        parts.append(subject.run(alone, kept))
    subject.check(packed, _joined(subject, *parts), what=" packed")


def _joined(subject: Subject, first: dict, second: dict) -> dict:
    """Of two parts of all tokens: by token one behind the other, states at their ends, else the sum."""
    by_token = {"out0", *(f"d{name}" for name in subject.op.tokens)}
    joined = {}
    for name in first:
        if name in by_token:
            joined[name] = np.concatenate([first[name], second[name]], axis=1)
        elif name.startswith("out"):
            joined[name] = second[name]
        else:
            joined[name] = first[name] if name[1:] in subject.op.states else first[name] + second[name]
    return joined


def check_states(subject: Subject) -> None:
    """Cut in two and handed over through the state, values and gradients are those of the whole; padding at the cut."""
    if not subject.op.has_states:
        return
    inputs = subject.inputs()
    n_batch, n_tokens = inputs[subject.op.tokens[0]].shape[:2]
    half = n_tokens // 2
    ids = np.ones((n_batch, n_tokens), np.int32)
    ids[0, half - 2 : half + 3] = 0
    ids[1:, : half // 2] = 4
    ids[1:, -half // 2 :] = 3
    inputs["segment_ids"] = ids
    weights = subject.weights(inputs)
    first, second = (_tokens(subject, inputs, part) for part in (slice(0, half), slice(half, None)))
    left = subject.run(first, [weights[0][:, :half], *weights[1:]])
    states = {name: left[f"out{i}"].astype(inputs[name].dtype) for i, name in enumerate(subject.op.states, 1)}
    later = subject.run({**second, **states}, [weights[0][:, half:], *weights[1:]])
    handed = [later[f"d{name}"].astype(np.float32) for name in subject.op.states]
    earlier = subject.run(first, [weights[0][:, :half], *handed])
    subject.check(subject.run(inputs, weights), _joined(subject, earlier, later), what=" in two calls")


def check_padding(subject: Subject) -> None:
    """Padding anywhere may hold anything: nothing changes; its results and gradients are zero."""
    if not subject.op.has_segments:
        return
    garbage = np.nan if subject.op.padding_may_be_nan else 7.0
    for layout in ("right", "left", "interior", "scattered", "empty"):
        inputs = {**subject.inputs(), **_layout(subject, layout)}
        padded = inputs["segment_ids"] == 0
        assert padded.any(), layout
        dirty = dict(inputs)
        for name in subject.op.tokens:
            there = padded.reshape(*padded.shape, *(1,) * (inputs[name].ndim - 2))
            dirty[name] = np.where(there, np.asarray(garbage, inputs[name].dtype), inputs[name])
        clean = subject.run(inputs)
        for name, value in subject.run(dirty).items():
            np.testing.assert_array_equal(value, clean[name], err_msg=f"{subject} {layout}: {name}")
        for name in ("out0", *(f"d{name}" for name in subject.op.tokens)):
            assert not clean[name][padded].any(), f"{subject} {layout}: {name}"
        empty = ~(~padded).any(axis=1)
        for i, name in enumerate(subject.op.states, 1):
            np.testing.assert_array_equal(clean[f"out{i}"][empty], np.float64(inputs[name])[empty])


def check_padding_cut_out(subject: Subject) -> None:
    """Padding is as if it were not there: a row with it cut out gives the same, and so do all with it at their ends."""
    if not subject.op.has_segments:
        return
    inputs = {**subject.inputs(), **_layout(subject, "scattered")}
    whole, weights = subject.run(inputs), subject.weights(inputs)
    by_token = {"out0", *(f"d{name}" for name in subject.op.tokens)}
    order = np.argsort(inputs["segment_ids"] == 0, axis=1, kind="stable")
    moved = lambda a: np.take_along_axis(a, order.reshape(*order.shape, *(1,) * (a.ndim - 2)), axis=1)
    names = (*subject.op.tokens, "segment_ids")
    ends = {name: moved(array) if name in names else array for name, array in inputs.items()}
    at_ends = subject.run(ends, [moved(weights[0]), *weights[1:]])
    expected = {name: moved(value) if name in by_token else value for name, value in whole.items()}
    subject.check(at_ends, expected, what=" padding at the end")
    for row, keep in enumerate(inputs["segment_ids"][:1] != 0):
        own = {n: a[row : row + 1] if n in (*subject.op.rows, "segment_ids") else a for n, a in inputs.items()}
        kept = [weights[0][row : row + 1, keep], *(weight[row : row + 1] for weight in weights[1:])]
        alone = subject.run(_tokens(subject, own, keep), kept)
        names = [n for n in alone if n.startswith("out") or n[1:] in subject.op.rows]
        cut = {n: whole[n][row : row + 1][:, keep] if n in by_token else whole[n][row : row + 1] for n in names}
        subject.check({n: alone[n] for n in names}, cut, what=f" row {row}")


def check_causal(subject: Subject) -> None:
    """No result up to a token depends on what is behind it: such gradients are exactly zero, the others are not."""
    if not subject.op.tokens:
        return
    inputs = {**subject.inputs(), **_layout(subject, "one")}
    weights = subject.weights(inputs)
    last = weights[0].shape[1] // 2
    weights[0][:, last + 1 :] = 0
    found = subject.run(inputs, [weights[0], *(0 * weight for weight in weights[1:])])
    for name in subject.op.tokens:
        assert not found[f"d{name}"][:, last + 1 :].any(), f"{subject}: d{name} behind token {last}"
        assert found[f"d{name}"][:, last].any(), f"{subject}: d{name} at token {last}"


def check_one_token(subject: Subject) -> None:
    if not subject.op.tokens:
        return
    inputs = _tokens(subject, {**subject.inputs(), **_layout(subject, "one")}, slice(0, 1))
    subject.check(subject.run(inputs), _oracle(subject, inputs), what=" one token")


def check_no_rows(subject: Subject) -> None:
    """A batch of no rows: empty results, zero gradients of what rows share."""
    inputs = {**subject.inputs(), **_layout(subject, "packed")}
    names = (*subject.op.rows, "segment_ids")
    empty = {name: array[:0] if name in names else array for name, array in inputs.items()}
    empty |= {name: 0 * inputs[name] for name in subject.op.integers if name in inputs and name not in names}
    arrays, fixed = split(subject.name, empty)

    def both(arrays, fixed):
        out, pull = jax.vjp(lambda arrays: subject.call({**arrays, **fixed}, **subject.settings), arrays)
        return out, pull(tuple(jnp.zeros_like(o) for o in out))[0]

    with subject.device():
        out, grads = jax.jit(both, compiler_options=QUICK)(arrays, fixed)
    assert out[0].size == 0 and out[0].ndim == subject.weights(inputs)[0].ndim
    assert {name: grad.shape for name, grad in grads.items()} == {name: a.shape for name, a in arrays.items()}
    assert not any(np.any(grad) for grad in grads.values())


def check_hints(subject: Subject) -> None:
    """Sizes that are hints change nothing beyond rounding."""
    inputs = {**subject.inputs(), **_layout(subject, "packed")}
    expected = subject.run(inputs) if subject.op.hints else None
    for name, values in subject.op.hints.items():
        for value in values:
            subject.check(subject.run(inputs, **{name: value}), expected, what=f" {name}={value}")


def check_eager(subject: Subject) -> None:
    """Not compiled as a whole, the same."""
    inputs = {**subject.inputs(), **_layout(subject, "packed")}
    with subject.serving():
        out = subject.call({name: jnp.asarray(array) for name, array in inputs.items()}, **subject.settings)
    expected = subject.run(inputs)
    actual = {f"out{i}": np.asarray(o, np.float64) for i, o in enumerate(out)}
    subject.check(actual, {name: expected[name] for name in actual})


def check_checkpoint(subject: Subject) -> None:
    """Under jax.checkpoint, which computes results again for their gradients, the same."""
    if not subject.way.gradients:
        return
    inputs = {**subject.inputs(), **_layout(subject, "packed")}
    arrays, fixed = split(subject.name, inputs)
    weights = subject.weights(inputs)

    def loss(arrays):
        out = subject.call({**arrays, **fixed}, **subject.settings)
        return sum(jnp.vdot(o.astype(jnp.float32), weight) for o, weight in zip(out, weights))

    with subject.serving():
        grads = jax.jit(jax.grad(jax.checkpoint(loss)), compiler_options=QUICK)(arrays)
    expected = subject.run(inputs, weights)
    actual = {name: expected[name] for name in expected if name.startswith("out")}
    subject.check(actual | {f"d{n}": np.asarray(grad, np.float64) for n, grad in grads.items()}, expected)


def check_traces_under_checkpoint(subject: Subject) -> None:
    """As compiled for its device: gradients through jax.checkpoint have their arguments' shapes."""
    if not subject.way.gradients:
        return
    arrays, fixed = split(subject.name, {**subject.inputs(), **_layout(subject, "packed")})

    def loss(arrays):
        return sum(out.astype(jnp.float32).sum() for out in subject.call({**arrays, **fixed}, **subject.settings))

    with subject.device():
        found = jax.eval_shape(jax.grad(jax.checkpoint(loss)), arrays)
    assert {name: grad.shape for name, grad in found.items()} == {name: a.shape for name, a in arrays.items()}


def _mapped(subject: Subject, how: str):
    """call(rows, shared, fixed) on two sets of rows at once, stacked on a new first axis."""

    def one(rows, shared, fixed):
        return subject.call({**rows, **shared, **fixed}, **subject.settings)

    if how == "vmap":
        return jax.vmap(one, (0, None, 0))
    if how == "scan":
        return lambda rows, shared, fixed: jax.lax.scan(
            lambda _, given: (None, one(given[0], shared, given[1])), None, (rows, fixed)
        )[1]
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    first = lambda tree: jax.tree.map(lambda array: array[0], tree)
    return jax.shard_map(
        lambda rows, shared, fixed: jax.tree.map(lambda o: o[None], one(first(rows), shared, first(fixed))),
        mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"), check_vma=how == "checked shard_map",
    )  # fmt: skip


def _two_sets(subject: Subject) -> list[dict]:
    """Inputs of two calls that share what is not theirs by row."""
    first = {**subject.inputs(), **_layout(subject, "packed")}
    other = {**subject.inputs(seed=1), **_layout(subject, "right")}
    own = (*subject.op.rows, *subject.op.integers)
    return [first, {name: other[name] if name in own else first[name] for name in first}]


def _check_mapped(subject: Subject, how: str) -> None:
    sets = _two_sets(subject)
    arrays, fixed = zip(*(split(subject.name, inputs) for inputs in sets))
    stack = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    rows = stack([{n: a for n, a in given.items() if n in subject.op.rows} for given in arrays])
    shared = {n: a for n, a in arrays[0].items() if n not in subject.op.rows}
    weights = subject.weights(sets[0])

    def both(rows, shared, fixed):
        out, pull = jax.vjp(lambda *given: _mapped(subject, how)(*given, fixed), rows, shared)
        return out, pull(tuple(jnp.stack([w, w]).astype(o.dtype) for w, o in zip(weights, out)))

    with subject.serving():
        if subject.way.gradients:
            out, (drows, dshared) = jax.jit(both, compiler_options=QUICK)(rows, shared, stack(fixed))
        else:
            out = jax.jit(_mapped(subject, how), compiler_options=QUICK)(rows, shared, stack(fixed))
            drows = dshared = {}
    one, two = (subject.run(inputs, weights) for inputs in sets)
    actual = {f"out{i}": o for i, o in enumerate(out)} | {f"d{n}": g for n, g in (drows | dshared).items()}
    expected = {name: one[name] + two[name] if name[1:] in shared else np.stack([one[name], two[name]]) for name in one}
    subject.check({n: np.asarray(a, np.float64) for n, a in actual.items()}, expected, what=f" {how}")


def check_vmap(subject: Subject) -> None:
    _check_mapped(subject, "vmap")


def check_scan(subject: Subject) -> None:
    _check_mapped(subject, "scan")


def check_shard_map(subject: Subject) -> None:
    _check_mapped(subject, "shard_map")


def check_checked_shard_map(subject: Subject) -> None:
    """One that checks over which axes arrays vary."""
    _check_mapped(subject, "checked shard_map")


def check_traces_in_a_checked_shard_map(subject: Subject) -> None:
    """As compiled for its device: gradients of rows that differ by device, with respect to what is equal on all."""
    inputs = {**subject.inputs(), **_layout(subject, "packed")}
    arrays, fixed = split(subject.name, inputs)
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = {name: P("data") if name in subject.op.rows else P() for name in arrays}

    @jax.shard_map(mesh=mesh, in_specs=(spec, P("data")), out_specs=P("data"), check_vma=True)
    def call(arrays, fixed):
        return subject.call({**arrays, **fixed}, **subject.settings)

    def loss(arrays):
        return sum(out.astype(jnp.float32).sum() for out in call(arrays, fixed))

    doubled = {name: np.concatenate([a, a]) if name in subject.op.rows else a for name, a in arrays.items()}
    fixed = {name: np.concatenate([a, a]) for name, a in fixed.items()}
    with subject.device():
        found = jax.eval_shape(jax.grad(loss) if subject.way.gradients else loss, doubled)
    if subject.way.gradients:
        assert {name: grad.shape for name, grad in found.items()} == {name: a.shape for name, a in doubled.items()}


def check_dtypes(subject: Subject) -> None:
    """float16, bfloat16 and float32 within the table, or refused in one line that names the dtype."""
    served = []
    for dtype in ("float16", "bfloat16", "float32"):
        if reason := subject.why_not(dtype):
            assert dtype in reason and "\n" not in reason, reason
            continue
        served.append(dtype)
        inputs = {**subject.inputs(dtype), **_layout(subject, "packed")}
        subject.check(subject.run(inputs), _oracle(subject, inputs), dtype, what=f" {dtype}")
    assert len(served) == 3 or (subject.is_kernel and served)


def check_float64(subject: Subject) -> None:
    """float64 arrays: reference and xla are as exact as that, kernels refuse them in one line."""
    inputs = {**subject.inputs("float32"), **_layout(subject, "packed")}
    with enable_x64():
        wide = {n: a if n in subject.op.integers else np.asarray(a, np.float64) for n, a in inputs.items()}
        if subject.is_kernel:
            arrays = tuple(jax.ShapeDtypeStruct(wide[n].shape, wide[n].dtype) for n in subject.op.positional)
            with subject.device(), pytest.raises(NotImplementedError, match=r"^[^\n]*float64[^\n]*$"):
                select(subject.op, subject.implementation, arrays, {})
            return
        actual = subject.run(wide)
    subject.check(actual, _oracle(subject, inputs), "float64")


def check_x64_flag(subject: Subject) -> None:
    """With 64-bit types on, what is given in fewer bits is computed as without, and nothing in float64.

    Kernels, which count in 32 bits, say so in one line; `auto` takes xla.
    """
    inputs = {**subject.inputs(), **_layout(subject, "packed")}
    if subject.is_kernel:
        dtype = subject.dtype
        with enable_x64():
            reason = subject.why_not(dtype)
        assert reason and "jax_enable_x64" in reason and "\n" not in reason, reason
        return
    expected = subject.run(inputs)
    arrays, fixed = split(subject.name, inputs)
    weights = subject.weights(inputs)
    with enable_x64(), subject.serving():
        function = _compiled.__wrapped__(subject, tuple(sorted(subject.settings.items())))
        text = str(function.trace(arrays, fixed, weights).jaxpr)
        out, grads = function(arrays, fixed, weights)
    assert "f64[" not in text.replace("f64[]", "")
    named = {f"out{i}": o for i, o in enumerate(out)} | {f"d{name}": grad for name, grad in grads.items()}
    assert all(array.dtype != jnp.float64 for array in named.values())
    subject.check({name: np.asarray(array, np.float64) for name, array in named.items()}, expected)


def check_forward_mode(subject: Subject) -> None:
    """jax.jvp agrees with jax.vjp, where an implementation can give it; JAX says so where not."""
    inputs = {**subject.inputs("float32"), **_layout(subject, "packed")}
    with enable_x64(), subject.serving():
        wide = {n: a if n in subject.op.integers else np.asarray(a, np.float64) for n, a in inputs.items()}
        arrays, fixed = split(subject.name, wide)
        function = lambda arrays: subject.call({**arrays, **fixed}, **subject.settings)
        rng = np.random.default_rng(5)
        along = {name: rng.standard_normal(array.shape) for name, array in arrays.items()}
        if not subject.way.forward_mode:
            with pytest.raises(TypeError, match="custom_vjp"):
                jax.jit(lambda *given: jax.jvp(function, *given))((arrays,), (along,))
            return
        weights = tuple(np.float64(weight) for weight in subject.weights(wide))

        def both(arrays, along, weights):
            return jax.jvp(function, (arrays,), (along,))[1], jax.vjp(function, arrays)[1](weights)[0]

        tangents, grads = jax.jit(both, compiler_options=QUICK)(arrays, along, weights)
    forward = sum(np.vdot(w, t) for w, t in zip(weights, tangents))
    reverse = sum(np.vdot(along[name], grads[name]) for name in grads)
    np.testing.assert_allclose(forward, reverse, rtol=1e-9, err_msg=str(subject))


@functools.cache
def _hessian_product(subject: Subject) -> dict:
    """Of the sum of squared results, in float64, with a vector of ones."""
    inputs = {**subject.inputs("float32"), **_layout(subject, "packed")}
    with enable_x64(), subject.serving():
        wide = {n: a if n in subject.op.integers else np.asarray(a, np.float64) for n, a in inputs.items()}
        arrays, fixed = split(subject.name, wide)

        def loss(arrays):
            return sum(jnp.sum(o**2) for o in subject.call({**arrays, **fixed}, **subject.settings))

        along = {name: np.ones_like(array) for name, array in arrays.items()}
        return jax.jit(lambda a, t: jax.jvp(jax.grad(loss), (a,), (t,))[1], compiler_options=QUICK)(arrays, along)


def check_forward_over_reverse(subject: Subject) -> None:
    """jax.jvp of the gradient, a Hessian's product with a vector, is the reference's, where it goes through."""
    if not subject.way.gradient_forward_mode:
        with pytest.raises(TypeError, match="custom_vjp"):
            _hessian_product(subject)
        return
    expected = _hessian_product(Subject(subject.name, "reference"))
    for name, value in _hessian_product(subject).items():
        error = oracle.relative_rms(value, expected[name], floor=1e-6)
        assert error <= 1e-9, f"{subject}: d{name}: relative RMS {error:.1e}"


# What every implementation is held to each time: one compiled program.
FIRST = (check_oracle, check_padding, check_causal)
# What interpreted kernels are held to by default; together they take few compilations.
ESSENTIAL = (
    check_oracle,
    check_without_ids,
    check_an_error_is_seen,
    check_packed,
    check_states,
    check_padding,
    check_causal,
    check_no_rows,
    check_float64,
    check_x64_flag,
    check_traces_in_a_checked_shard_map,
    check_traces_under_checkpoint,
)
REST = (
    check_padding_cut_out,
    check_one_token,
    check_hints,
    check_eager,
    check_checkpoint,
    check_vmap,
    check_scan,
    check_shard_map,
    check_checked_shard_map,
    check_dtypes,
)
# Of implementations in plain JAX alone.
PLAIN = (check_forward_mode, check_forward_over_reverse)
