# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels of ssd: per-token vectors and interpreted kernels anywhere, the real ones on a Hopper GPU.

The interpreter runs host callbacks that wait for each other, so it gets a process with enough threads of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, oracle
from pallas_kernels.layouts import LAYOUTS, make_segment_ids
from pallas_kernels.ops.ssd import cases
from pallas_kernels.oracle import compare

gpu = pytest.importorskip("pallas_kernels.ops.ssd.gpu.api", reason="this JAX has no Pallas Mosaic GPU")

TOKENS, CHUNKS = 200, 4
HERE = Path(__file__).parent


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
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_piece_starts_equal_the_walk(reverse, layout):
    rng = np.random.default_rng(1)
    pieces, heads, chunks = 3, 2, 10
    ids = make_segment_ids(layout, 1, chunks * gpu.TILE, seed=2)
    dt = jnp.asarray(rng.random((1, chunks * gpu.TILE, heads), np.float32) * 0.01)
    begun = None if ids is None else gpu.document_vectors(jnp.asarray(ids), chunks)[1]
    ab = gpu.decay_vectors(dt, -jnp.ones(heads), chunks, begun)
    update = rng.standard_normal((chunks, heads, 1, 1)).astype(np.float32)
    decay = np.exp2(np.asarray(ab)[0, :, :, 0, -1])[..., None, None]

    def run(state, order):
        for chunk in order:
            state = decay[chunk] * state + update[chunk]
        return state

    size = gpu.Walk(1, chunks * gpu.TILE, heads, 1, 64, chunks, pieces).piece_chunks
    parts = [list(range(p * size, min((p + 1) * size, chunks)))[:: -1 if reverse else 1] for p in range(pieces)]
    init = rng.standard_normal((heads, 1, 1)).astype(np.float32)
    local = np.stack([run(np.zeros_like(init), part) for part in parts])
    starts = np.asarray(gpu.piece_starts(jnp.asarray(local[None]), ab, jnp.asarray(init[None]), reverse))[0]
    state = init
    for p in reversed(range(pieces)) if reverse else range(pieces):
        np.testing.assert_allclose(starts[p], state, rtol=1e-5, atol=1e-6)
        state = run(state, parts[p])


def arguments(case, dtype=jnp.bfloat16):
    inputs = cases.make_inputs(case, dtype)
    return {name: None if v is None else jnp.asarray(v) for name, v in inputs.items()}


def test_supports_names_argument_and_limit():
    case = cases.Case("wide", 1, 16, 2, 64, 1, gpu.MAX_STATE + 64)
    given = arguments(case)
    positional = [given.pop(name) for name in ("x", "dt", "A", "B", "C")]
    assert str(gpu.MAX_STATE) in gpu.supports(*positional, **given)
    assert "float32" in gpu.supports(positional[0].astype(jnp.float32), *positional[1:], **given)


def interpret(*names):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "ssd_gpu_interpreted.py"), *names]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.newer
@pytest.mark.quick
def test_kernels_interpreted():
    interpret("scattered", "pieces", "interior")


@pytest.mark.newer
@pytest.mark.slow
def test_kernels_interpreted_on_all_cases():
    interpret(*(case.name for case in cases.TEST_CASES + cases.WIDTH_CASES), "scattered")


@pytest.mark.hopper
@pytest.mark.parametrize("layout", ["dense", "scattered"])
def test_decay_kernels_equal_xla(layout):
    from tests.ops.ssd_gpu_interpreted import decay_kernels

    assert decay_kernels(layout, interpret=False)


@pytest.mark.parametrize("case", cases.TEST_CASES + cases.WIDTH_CASES, ids=lambda case: case.name)
@pytest.mark.hopper
def test_kernels_against_the_recurrence(case):
    inputs = cases.make_inputs(case, "bfloat16")
    if case.state > gpu.MAX_STATE:
        pytest.skip(f"state size above {gpu.MAX_STATE}")
    errors = compare("ssd", inputs, dtype="bfloat16", implementation="gpu", return_final_state=case.final)
    bad = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1]}
    assert not bad, bad


@pytest.mark.newer
@pytest.mark.quick
@pytest.mark.parametrize("heads", [2, 64])
def test_gradients_trace_in_a_shard_map_that_checks_what_varies(heads):
    """64 heads have their decays and the gradients of dt by kernels, too."""
    P = jax.sharding.PartitionSpec
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    case = cases.Case("checked", 2, 200, heads, 64, 1, 64, layout="packed", initial=True, final=True)
    arrays, fixed = oracle.split(cases.make_inputs(case, "bfloat16"))
    specs = {name: P() if name in ("A", "D") else P("data") for name in arrays}

    @jax.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=True)
    def scan(arrays, ids):
        with dispatch.assume_platform("gpu"):
            settings = {"return_final_state": True, "implementation": "gpu"}
            return oracle.call("ssd", {**arrays, "segment_ids": ids}, **settings)

    def loss(arrays):
        return sum(out.astype(jnp.float32).sum() for out in scan(arrays, fixed["segment_ids"]))

    grads = jax.eval_shape(jax.grad(loss), arrays)
    assert {name: grad.shape for name, grad in grads.items()} == {name: array.shape for name, array in arrays.items()}
