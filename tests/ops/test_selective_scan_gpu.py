# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels of selective_scan: marks and places anywhere, the kernels interpreted, the real ones on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import assume_platform
from pallas_kernels.layouts import LAYOUTS, make_segment_ids
from pallas_kernels.op import select
from pallas_kernels.ops import OPS
from pallas_kernels.ops.selective_scan import cases
from pallas_kernels.oracle import compare
from tests.ops.interpreter import interpreted, needs_gpu_interpreter
from tests.ops.support import check_against_oracle

gpu = pytest.importorskip("pallas_kernels.ops.selective_scan.gpu.api", reason="this JAX has no Pallas Mosaic GPU")
threads = pytest.importorskip("pallas_kernels.ops.selective_scan.gpu.threads")
exponentials = pytest.importorskip("pallas_kernels.ops.selective_scan.gpu.exponentials")
plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

DRAWN = (
    cases.Case("ragged", 2, 301, 192, 16, layout="packed", decay="mixed", initial=True, final=True, seed=1),
    cases.Case("whole", 1, 64, 128, 16, skip=False, final=True, seed=2),
    cases.Case("grouped", 2, 97, 256, 16, 2, layout="scattered", decay="weak", initial=True, final=True, seed=3),
    cases.Case("long", 1, 2000, 128, 12, initial=True, seed=4),
)
by_name = pytest.mark.parametrize("case", (*cases.TEST_CASES, *DRAWN), ids=lambda case: case.name)


def test_supports_names_argument_and_limit():
    def why(dtype="bfloat16", state=16, **changed):
        inputs = {**cases.make_inputs(cases.Case("refused", 1, 8, 4, state), dtype), **changed}
        return gpu.supports(*(inputs[name] for name in ("x", "dt", "A", "B", "C")))

    assert why() is None and why("float32") is None and why("float16", state=3) is None
    assert why(dt=np.zeros((1, 8, 4))) == "dtype of dt_BTD (float64) not one of bfloat16, float16, float32"
    assert why(A=np.zeros((4, 16))) == "dtype of A_DN (float64) is not float32"
    assert why(x=np.zeros((1, 8, 4))) == "dtype of x_BTD (float64) not one of bfloat16, float16, float32"
    assert why(B=np.zeros((1, 8, 16))) == "dtype of B_BTN (float64) not one of bfloat16, float16, float32"
    assert gpu.slower(np.zeros((1, 31, 4))) == "T (31) below 32, to which the kernels pad"
    assert gpu.slower(np.zeros((1, 32, 4))) is None
    assert why(state=17) == "state size of A_DN (17) above 16"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_marks_say_padding_and_first_tokens(layout):
    """Against a walk over the tokens: padding 1, a document's first token but a row's first far below 0, else 0."""
    ids = make_segment_ids(layout, 3, 70, seed=5)
    if ids is None:
        assert gpu._marks(None) == (None, None)
        return
    marks, real = gpu._marks(jnp.asarray(ids))
    np.testing.assert_array_equal(real, ids != 0)
    for row, found in zip(ids, np.asarray(marks), strict=True):
        last = 0
        for token, mark in zip(row, found, strict=True):
            first = bool(last and token and token != last)
            assert mark == (gpu.PADDING if token == 0 else gpu.BETWEEN_DOCUMENTS if first else 0.0)
            last = token or last
    assert np.finfo(np.float32).tiny > 2.0**gpu.BETWEEN_DOCUMENTS and gpu.PADDING > 0


@pytest.mark.parametrize(
    ("batch", "channels", "groups", "width"), [(4, 4096, 1, 2), (1, 4096, 1, 1), (1, 8192, 1, 1), (1, 6, 133, 2)]
)
def test_threads_have_one_channel_where_two_would_leave_multiprocessors_idle(batch, channels, groups, width):
    with assume_platform("gpu", capability="9.0", multiprocessors=132):
        assert gpu._width(batch, channels * groups if groups > 1 else channels, groups) == width


def test_places_are_a_permutation_of_a_warp():
    places = threads.places()
    assert places.shape == (2, threads.STATES)
    np.testing.assert_array_equal(np.sort(places.reshape(-1)), np.arange(threads.LANES))
    np.testing.assert_array_equal(places % threads.QUAD, np.tile(np.arange(16) // threads.HELD, (2, 1)))


def test_decays_by_polynomial_are_right_where_they_are_slow():
    """1 - 2^f, by which a state decays, to 2e-5 of itself, and 2^f to 1e-5, in float32 as the kernel has it."""
    f = np.linspace(-0.5, 0.5, 10001, dtype=np.float32)
    found = np.polynomial.polynomial.polyval(f, np.array((0.0, *exponentials.POLYNOMIAL), np.float32))
    exact = np.expm1(f.astype(np.float64) * np.log(2))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=2e-5)
    np.testing.assert_allclose(1 + found, 1 + exact, rtol=1e-5)


@needs_gpu_interpreter
@pytest.mark.slow
@by_name
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_interpreted_on_all_cases(case, dtype):
    if case.name == "long":
        pytest.skip("minutes")
    with interpreted("selective_scan", "gpu"):
        settings = cases.make_settings(case)
        check_against_oracle(
            "selective_scan", cases.make_inputs(case, dtype), dtype=dtype, implementation="gpu", **settings
        )


@needs_gpu_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_interpreted_on_documents_in_groups_over_several_tiles(dtype, monkeypatch):
    """Two channels a thread; bfloat16, of the step sizes too, is made float32 in the kernel."""
    monkeypatch.setattr(gpu, "_width", lambda *_: 2)
    case = cases.Case("documents", 1, 75, 8, 5, 2, layout="scattered", decay="mixed", initial=True, final=True)
    with interpreted("selective_scan", "gpu"):
        settings, inputs = cases.make_settings(case), cases.make_inputs(case, dtype)
        inputs["dt"] = inputs["dt"].astype(jnp.dtype(dtype))
        check_against_oracle("selective_scan", inputs, dtype=dtype, implementation="gpu", **settings)


@needs_gpu_interpreter
def test_states_kept_are_linear_in_tokens_and_few():
    """Between forward and backward: the arguments and a state every 32 tokens, no array [T, D, N]."""
    s = jax.ShapeDtypeStruct
    tokens, channels = 1024, 64
    args = (s((1, tokens, channels), "bfloat16"), s((1, tokens, channels), "float32"), s((channels, 16), "float32"),
            s((1, tokens, 1, 16), "float32"), s((1, tokens, 1, 16), "float32"))  # fmt: skip
    kept = jax.eval_shape(lambda *a: jax.vjp(gpu.selective_scan_gpu, *a)[1], *args)
    largest = max(np.prod(a.shape) for a in jax.tree.leaves(kept))
    assert largest == tokens * channels and gpu.forward.TILE == 32


def sums(width):
    """What the threads of a warpgroup do among each other, in a kernel of its own: (results, plain results)."""
    own, rng = threads.Threads(width), np.random.default_rng(0)
    arrays = rng.standard_normal((4, own.channels, 16)).astype(np.float32)

    def body(arrays, row, narrow, both, states, wide, sums):
        each = [plgpu.load(arrays.at[i], layout=own.both, optimized=False) for i in range(4)]
        both[...] = own.spread(plgpu.load(row, layout=own.row, optimized=False))
        states[...] = own.sum_states(*map(own.sum_own, each))
        wide[...] = own.widen(plgpu.load(narrow, layout=own.row, optimized=False), own.row)
        sums[...] = own.sum_channels(*each[:2])

    sizes = (own.channels, 16), (4, own.channels), (own.channels,), (4, 32)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sizes]
    row, narrow = jnp.asarray(arrays[0, :, 0]), jnp.asarray(arrays[0, :, 0], jnp.bfloat16)
    found = plgpu.kernel(body, out_type=shapes)(jnp.asarray(arrays), row, narrow)
    by_warp = arrays[:2].reshape(2, 4, -1, 16).sum(2).swapaxes(0, 1)
    plain = np.broadcast_to(arrays[0, :, :1], arrays[0].shape), arrays.sum(-1), narrow.astype(jnp.float32), by_warp
    return (*found[:3], np.asarray(found[3])[:, threads.places()]), plain


@pytest.mark.hopper
@pytest.mark.parametrize("width", [1, 2, 4])
def test_sums_over_threads_on_the_device(width):
    for found, plain in zip(*sums(width), strict=True):
        np.testing.assert_allclose(found, plain, atol=1e-5)


@pytest.mark.hopper
@pytest.mark.parametrize("chosen", [(), (0,), (0, 7)])
def test_exponentials_on_the_device(chosen):
    """Slow decays as right as fast ones, whichever of a thread's are by the polynomial."""
    own, rng = threads.Threads(2), np.random.default_rng(0)
    exponents = -np.exp(3 * rng.standard_normal((own.channels, 16))).astype(np.float32)
    exponents[::7] = -300.0

    def body(exponents, found):
        held = plgpu.load(exponents, layout=own.both, optimized=False)
        found[...] = exponentials.exp2(own, held, chosen)

    found = np.asarray(plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(exponents.shape, jnp.float32))(exponents))
    exact = np.exp2(exponents.astype(np.float64))
    np.testing.assert_allclose(found, exact, rtol=2e-5, atol=2e-38)
    np.testing.assert_allclose(1 - found, 1 - exact, rtol=1e-4, atol=1e-7)


@pytest.mark.hopper
@by_name
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("steps", ["float32", "bfloat16"])
def test_kernels_against_the_recurrence(case, dtype, width, steps, monkeypatch):
    monkeypatch.setattr(gpu, "_width", lambda *_: width)
    inputs, settings = cases.make_inputs(case, dtype), cases.make_settings(case)
    inputs["dt"] = inputs["dt"].astype(jnp.dtype(steps))
    errors = compare("selective_scan", inputs, dtype=dtype, implementation="gpu", **settings)
    bad = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not bad, bad


@pytest.mark.newer
@pytest.mark.parametrize(("tokens", "state", "choice"), [(32, 16, "gpu"), (31, 16, "xla"), (32, 32, "xla")])
def test_auto_takes_the_kernels_for_what_they_serve_but_short_rows(tokens, state, choice):
    op, array = OPS["selective_scan"], jax.ShapeDtypeStruct
    maps = array((1, tokens, 1, state), "bfloat16")
    args = array((1, tokens, 8), "bfloat16"), array((1, tokens, 8), "float32"), array((8, state), "float32"), maps, maps
    with assume_platform("gpu", capability="9.0"):
        assert select(op, "auto", args, {}) is op.implementations[choice]
        if state > 16:
            with pytest.raises(NotImplementedError, match=r"state size of A_DN \(32\) above 16"):
                select(op, "gpu", args, {})
