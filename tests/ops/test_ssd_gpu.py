# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels of ssd: per-token vectors and interpreted kernels anywhere, the real ones on a Hopper GPU."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform, oracle, ssd
from pallas_kernels.layouts import LAYOUTS, make_segment_ids
from pallas_kernels.ops.ssd import cases
from pallas_kernels.ops.ssd.context import _ends
from pallas_kernels.oracle import compare
from tests.ops.interpreter import interpreted, needs_gpu_interpreter
from tests.ops.support import QUICK, check_against_oracle
from tests.tolerances import check_close

gpu = pytest.importorskip("pallas_kernels.ops.ssd.gpu.api", reason="this JAX has no Pallas Mosaic GPU")

TOKENS, CHUNKS = 200, 4
# Few long rows, so that they are cut into pieces: two, of which the first is walked before in two parts.
PIECES = cases.Case("pieces", 1, 1020, 2, 64, 1, 64, layout="packed", initial=True, final=True)


def documents(ids):
    """Per token: index of the document its state belongs to, padding counted to the document before it."""
    out, document, last = [], 0, 0
    for value in ids:
        if value and last and value != last:
            document += 1
        last = value or last
        out.append(document)
    return np.array(out)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "dense"])
def test_document_vectors_say_where_documents_begin(layout):
    ids = make_segment_ids(layout, 2, TOKENS, seed=5)
    real, begun = np.asarray(gpu.document_vectors(jnp.asarray(ids), CHUNKS))
    before = np.asarray(gpu.gpu_decay.last_real_before(jnp.asarray(ids), CHUNKS))
    padded = np.pad(ids, ((0, 0), (0, CHUNKS * gpu.TILE - TOKENS)))
    for row in range(2):
        document = documents(padded[row])
        for chunk in range(CHUNKS):
            own = slice(chunk * gpu.TILE, (chunk + 1) * gpu.TILE)
            is_real = padded[row, own] != 0
            np.testing.assert_array_equal(real[row, chunk], np.where(is_real.all(), 2, is_real))
            carried = document[chunk * gpu.TILE - 1] if chunk else 0
            np.testing.assert_array_equal(begun[row, chunk], document[own] - carried)
            earlier = np.flatnonzero(padded[row, : own.start])
            assert before[row, chunk] == (earlier[-1] if earlier.size else -1)


def test_last_real_token_in_two_passes(monkeypatch):
    ids = jnp.asarray(make_segment_ids("scattered", 2, TOKENS, seed=5))
    expected = gpu.gpu_decay.last_real_before(ids, CHUNKS)
    monkeypatch.setattr(gpu.gpu_decay, "MOST_PAIRS", 0)
    np.testing.assert_array_equal(gpu.gpu_decay.last_real_before(ids, CHUNKS), expected)


def test_decay_vectors_are_cumulative_sums_and_hide_the_tail():
    rng = np.random.default_rng(0)
    dt, a = rng.random((2, TOKENS, 3), np.float32), -rng.random(3, np.float32)
    vectors = np.asarray(gpu.decay_vectors(jnp.asarray(dt), jnp.asarray(a), CHUNKS))
    wide = np.pad(dt.astype(np.float64), ((0, 0), (0, CHUNKS * gpu.TILE - TOKENS), (0, 0)))
    wide = wide.reshape(2, CHUNKS, gpu.TILE, 3).transpose(0, 1, 3, 2)
    expected = np.cumsum(wide * a[:, None], axis=-1)
    np.testing.assert_allclose(vectors[..., 0, :], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(np.exp2(vectors[..., 0, :] - vectors[..., 1, :]), wide, rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout, parts", [("dense", 1), ("packed", 1), ("packed", 2)])
def test_piece_starts_equal_the_walk(reverse, layout, parts):
    """Of three pieces, two of which are walked before, each in as many parts; the last one is shorter."""
    rng = np.random.default_rng(1)
    pieces, heads, chunks, size = 3, 2, 10, 4
    ids = make_segment_ids(layout, 1, chunks * gpu.TILE, seed=2)
    dt = jnp.asarray(rng.random((1, chunks * gpu.TILE, heads), np.float32) * 0.01)
    begun = None if ids is None else gpu.document_vectors(jnp.asarray(ids), chunks)[1]
    ab = gpu.decay_vectors(dt, -jnp.ones(heads), chunks, begun)
    update = rng.standard_normal((chunks, heads, 1, 1)).astype(np.float32)
    decay = np.exp2(np.asarray(ab)[0, :, :, 0, -1])[..., None, None]

    def run(state, begin, end):
        order = range(begin, min(end, chunks))
        for chunk in reversed(order) if reverse else order:
            state = decay[chunk] * state + update[chunk]
        return state

    init, of_part = rng.standard_normal((heads, 1, 1)).astype(np.float32), size // parts
    begins = [size * reverse + i * of_part for i in range((pieces - 1) * parts)]
    local = np.stack([run(np.zeros_like(init), begin, begin + of_part) for begin in begins])
    starts = gpu.piece_starts(jnp.asarray(local[None]), ab, jnp.asarray(init[None]), pieces, size, reverse)
    state = init
    for p in reversed(range(pieces)) if reverse else range(pieces):
        np.testing.assert_allclose(np.asarray(starts)[0, p], state, rtol=1e-5, atol=1e-6)
        state = run(state, p * size, (p + 1) * size)


def arguments(case, dtype=jnp.bfloat16):
    inputs = cases.make_inputs(case, dtype)
    return {name: None if v is None else jnp.asarray(v) for name, v in inputs.items()}


def test_supports_names_argument_and_limit():
    case = cases.Case("wide", 1, 16, 2, 64, 1, gpu.MAX_STATE + 64)
    given = arguments(case)
    positional = [given.pop(name) for name in ("x", "dt", "A", "B", "C")]
    assert str(gpu.MAX_STATE) in gpu.supports(*positional, **given)
    assert "float32" in gpu.supports(positional[0].astype(jnp.float32), *positional[1:], **given)


def check_interpreted(case):
    """On a device where thread blocks of two heads are too few for PIECES, and where those of one are enough for rows
    of four heads in all, as `apart_scattered` has them."""
    inputs, settings = cases.make_inputs(case, "bfloat16"), cases.make_settings(case)
    with interpreted("ssd", "gpu", multiprocessors=5):
        check_against_oracle("ssd", inputs, dtype="bfloat16", implementation="gpu", **settings)


@needs_gpu_interpreter
@pytest.mark.quick
@pytest.mark.parametrize(
    "case", [cases.CASES["scattered"], cases.CASES["apart_scattered"], PIECES], ids=lambda case: case.name
)
def test_kernels_interpreted(case):
    check_interpreted(case)


@needs_gpu_interpreter
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        cases.CASES["apart_scattered"],
        pytest.param(dataclasses.replace(PIECES, tokens=1100), marks=pytest.mark.slow),
    ],
    ids=lambda case: case.name,
)
def test_what_tokens_do_to_a_state(case, reverse):
    """By a walk, as by one matrix product: of x and B, and from the last token to the first."""
    given = arguments(case)
    given = [given[name] for name in ("x", "dt", "A", "C" if reverse else "B", "decay", "segment_ids")]
    with interpreted("ssd", "gpu"):
        actual = gpu.ends(*given, reverse=reverse)
    exact = [a if a is None or a.dtype == jnp.int32 else a.astype(jnp.float32) for a in given]
    for name, value, expected in zip(("decay", "state"), actual, _ends(*exact, reverse=reverse), strict=True):
        check_close(value, expected, dtype="bfloat16", what=f"ends.{name}")


@pytest.mark.newer
def test_gradients_take_no_arrays_of_no_size():
    """Of two chunks, of which the state's rounding reaches all: a scatter of no indices would be passed in, and GPUs'
    compiler does not survive that in a shard_map."""
    case = cases.Case("two_chunks", 1, 2 * gpu.TILE, 2, 64, 1, 64, initial=True)
    given = arguments(case)
    positional = [given.pop(name) for name in ("x", "dt", "A", "B", "C")]
    with assume_platform("gpu", capability="9.0"):
        loss = lambda *args: ssd(*args, **given, implementation="gpu").astype(jnp.float32).sum()
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*positional)
    sizes = [v.aval.size for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name.startswith("scatter")
             for v in eqn.invars]  # fmt: skip
    assert sizes and all(sizes)


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _equations(inner)


@needs_gpu_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("case", cases.TEST_CASES + cases.WIDTH_CASES, ids=lambda case: case.name)
def test_kernels_interpreted_on_all_cases(case):
    check_interpreted(case)


@needs_gpu_interpreter
@pytest.mark.parametrize("name", ["interior", pytest.param("scattered", marks=pytest.mark.slow)])
def test_padding_may_hold_anything(name):
    """NaN in all padding changes nothing, in outputs and gradients."""
    case = cases.CASES[name]
    inputs, settings = cases.make_inputs(case, "bfloat16"), cases.make_settings(case)
    padding = inputs["segment_ids"] == 0
    dirty = {name: np.copy(inputs[name]) for name in ("x", "dt", "B", "C")}
    for array in dirty.values():
        array[padding] = np.nan

    def evaluate(inputs, weight):
        arrays, fixed = oracle.split("ssd", inputs)

        def both(arrays):
            out, pull = jax.vjp(lambda a: oracle.call("ssd", {**a, **fixed}, implementation="gpu", **settings), arrays)
            return out, pull((weight.astype(out[0].dtype), *map(jnp.ones_like, out[1:])))[0]

        with interpreted("ssd", "gpu"):
            return jax.jit(both, compiler_options=QUICK)(arrays)

    weight = jnp.asarray(np.random.default_rng(3).standard_normal(inputs["x"].shape), jnp.float32)
    clean = evaluate(inputs, weight)
    found = evaluate({**inputs, **dirty}, jnp.where(padding[..., None, None], jnp.nan, weight))
    jax.tree.map(np.testing.assert_array_equal, clean, found)


def check_decay_kernels(layout):
    """The kernels of decays and of their gradients, which serve multiples of 64 heads, equal their versions in XLA."""
    batch, tokens, heads, chunks = 2, 200, 64, 4
    rng = np.random.default_rng(4)
    dt = np.exp(rng.uniform(np.log(1e-6), np.log(80.0), (batch, tokens, heads))).astype(np.float32)
    dt[:, ::7] = 0.0
    dt, a = jnp.asarray(dt), -jnp.asarray(rng.uniform(0.1, 16.0, heads), jnp.float32)
    ids = make_segment_ids(layout, batch, tokens, seed=1)
    ids = None if ids is None else jnp.asarray(ids)
    ab, padding = gpu.gpu_decay.decays(dt, a, ids, chunks)
    real, begun = (None, None) if ids is None else gpu.document_vectors(ids, chunks)
    expected = gpu.decay_vectors(gpu._real_dt(dt, ids), a * gpu.LOG2E, chunks, begun)
    np.testing.assert_allclose(ab, expected, rtol=1e-5, atol=1e-4)
    if ids is not None:
        np.testing.assert_array_equal(padding, real)

    dt = jnp.maximum(dt, 0.01)  # x . v / dt of a smaller one would hide the rest
    shapes = {"source": (chunks, heads, 3), "target": (chunks, heads), "cross": (2, heads), "state": (2, heads)}
    sums = {
        name: jnp.asarray(rng.standard_normal((batch, *shape, gpu.TILE)), jnp.float32) for name, shape in shapes.items()
    }
    found = gpu.gpu_decay.gradients(*sums.values(), dt, a, ids, True)
    for actual, expected in zip(found, gpu._dt_grads(sums, dt, a, ids), strict=True):
        assert oracle.relative_rms(actual, np.asarray(expected, np.float64)) < 1e-5


@needs_gpu_interpreter
@pytest.mark.quick
def test_decay_kernels_interpreted():
    with interpreted("ssd", "gpu"):
        check_decay_kernels("scattered")


@pytest.mark.hopper
@pytest.mark.parametrize("layout", ["dense", "scattered"])
def test_decay_kernels_equal_xla(layout):
    check_decay_kernels(layout)


@pytest.mark.parametrize("case", cases.TEST_CASES + cases.WIDTH_CASES, ids=lambda case: case.name)
@pytest.mark.hopper
def test_kernels_against_the_recurrence(case):
    inputs = cases.make_inputs(case, "bfloat16")
    if case.state > gpu.MAX_STATE:
        pytest.skip(f"state size above {gpu.MAX_STATE}")
    errors = compare("ssd", inputs, dtype="bfloat16", implementation="gpu", return_final_state=case.final)
    bad = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not bad, bad


@needs_gpu_interpreter
@pytest.mark.quick
@pytest.mark.parametrize("heads", [2, 64])
def test_gradients_trace_in_a_shard_map_that_checks_what_varies(heads):
    """64 heads have their decays and the gradients of dt by kernels, too."""
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    case = cases.Case("checked", 2, 200, heads, 64, 1, 64, layout="packed", initial=True, final=True)
    arrays, fixed = oracle.split("ssd", cases.make_inputs(case, "bfloat16"))
    specs = {name: P() if name in ("A", "D") else P("data") for name in arrays}

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=True)
    def scan(arrays, ids):
        with assume_platform("gpu"):
            settings = {"return_final_state": True, "implementation": "gpu"}
            return oracle.call("ssd", {**arrays, "segment_ids": ids}, **settings)

    def loss(arrays):
        return sum(out.astype(jnp.float32).sum() for out in scan(arrays, fixed["segment_ids"]))

    grads = jax.eval_shape(jax.grad(loss), arrays)
    assert {name: grad.shape for name, grad in grads.items()} == {name: array.shape for name, array in arrays.items()}
