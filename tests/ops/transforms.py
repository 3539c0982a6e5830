# SPDX-License-Identifier: Apache-2.0
"""What holds of every implementation under JAX: not compiled, mapped, split, computed again, in other dtypes and modes
of differentiation. One function a property, each raises AssertionError where it does not hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import oracle
from pallas_kernels.compat import enable_x64
from pallas_kernels.op import select
from tests.ops.subject import Subject, compiled, expected_of, layout_of
from tests.ops.support import QUICK


def check_eager(subject: Subject) -> None:
    """Not compiled as a whole, the same."""
    inputs = {**subject.inputs(), **layout_of(subject, "packed")}
    with subject.serving():
        out = subject.call({name: jnp.asarray(array) for name, array in inputs.items()}, **subject.settings)
    expected = subject.run(inputs)
    actual = {f"out{i}": np.asarray(o, np.float64) for i, o in enumerate(out)}
    subject.check(actual, {name: expected[name] for name in actual})


def check_checkpoint(subject: Subject) -> None:
    """Under jax.checkpoint, which computes results again for their gradients, the same."""
    if not subject.way.gradients:
        return
    inputs = {**subject.inputs(), **layout_of(subject, "packed")}
    arrays, fixed = oracle.split(subject.name, inputs)
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
    arrays, fixed = oracle.split(subject.name, {**subject.inputs(), **layout_of(subject, "packed")})

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
    first = {**subject.inputs(), **layout_of(subject, "packed")}
    other = {**subject.inputs(seed=1), **layout_of(subject, "right")}
    own = (*subject.op.rows, *subject.op.integers)
    return [first, {name: other[name] if name in own else first[name] for name in first}]


def _check_mapped(subject: Subject, how: str) -> None:
    sets = _two_sets(subject)
    arrays, fixed = zip(*(oracle.split(subject.name, inputs) for inputs in sets))
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
    inputs = {**subject.inputs(), **layout_of(subject, "packed")}
    arrays, fixed = oracle.split(subject.name, inputs)
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
        inputs = {**subject.inputs(dtype), **layout_of(subject, "packed")}
        subject.check(subject.run(inputs), expected_of(subject, inputs), dtype, what=f" {dtype}")
    assert len(served) == 3 or (subject.is_kernel and served)


def check_float64(subject: Subject) -> None:
    """float64 arrays: reference and xla are as exact as that, kernels refuse them in one line."""
    inputs = {**subject.inputs("float32"), **layout_of(subject, "packed")}
    with enable_x64():
        wide = {n: a if n in subject.op.integers else np.asarray(a, np.float64) for n, a in inputs.items()}
        if subject.is_kernel:
            arrays = tuple(jax.ShapeDtypeStruct(wide[n].shape, wide[n].dtype) for n in subject.op.positional)
            with subject.device(), pytest.raises(NotImplementedError, match=r"^[^\n]*float64[^\n]*$"):
                select(subject.op, subject.implementation, arrays, {})
            return
        actual = subject.run(wide)
    subject.check(actual, expected_of(subject, inputs), "float64")


def check_x64_flag(subject: Subject) -> None:
    """With 64-bit types on, what is given in fewer bits is computed as without, and nothing in float64.

    Kernels, which count in 32 bits, say so in one line; `auto` takes xla.
    """
    inputs = {**subject.inputs(), **layout_of(subject, "packed")}
    if subject.is_kernel:
        dtype = subject.dtype
        with enable_x64():
            reason = subject.why_not(dtype)
        assert reason and "jax_enable_x64" in reason and "\n" not in reason, reason
        return
    expected = subject.run(inputs)
    arrays, fixed = oracle.split(subject.name, inputs)
    weights = subject.weights(inputs)
    with enable_x64(), subject.serving():
        function = compiled.__wrapped__(subject, tuple(sorted(subject.settings.items())))
        text = str(function.trace(arrays, fixed, weights).jaxpr)
        out, grads = function(arrays, fixed, weights)
    assert "f64[" not in text.replace("f64[]", "")
    named = {f"out{i}": o for i, o in enumerate(out)} | {f"d{name}": grad for name, grad in grads.items()}
    assert all(array.dtype != jnp.float64 for array in named.values())
    subject.check({name: np.asarray(array, np.float64) for name, array in named.items()}, expected)


def check_forward_mode(subject: Subject) -> None:
    """jax.jvp agrees with jax.vjp, where an implementation can give it; JAX says so where not."""
    inputs = {**subject.inputs("float32"), **layout_of(subject, "packed")}
    with enable_x64(), subject.serving():
        wide = {n: a if n in subject.op.integers else np.asarray(a, np.float64) for n, a in inputs.items()}
        arrays, fixed = oracle.split(subject.name, wide)
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
    inputs = {**subject.inputs("float32"), **layout_of(subject, "packed")}
    with enable_x64(), subject.serving():
        wide = {n: a if n in subject.op.integers else np.asarray(a, np.float64) for n, a in inputs.items()}
        arrays, fixed = oracle.split(subject.name, wide)

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
