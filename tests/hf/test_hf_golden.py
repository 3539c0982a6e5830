# SPDX-License-Identifier: Apache-2.0
"""Each family against its published implementation, and against itself: packed, cached, chunked, sharded, trained."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import hybridlm
from hybridlm.config import MeshConfig
from hybridlm.sharding import make_mesh
from tests.hf.hf_support import (
    ATOL,
    FOLDER,
    GOLDEN,
    extend,
    forward,
    golden,
    loss_and_gradients,
    norms_by_name,
    packed_logits,
    plan_of,
    published_norm,
    tokens,
)


def by_default(*names: str) -> list:
    """All families; those not named, for which these stand by default, are slow."""
    return [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in GOLDEN]


every = pytest.mark.parametrize("name", GOLDEN)
ALIKE = ("lfm2_moe", "lfm3", "hunyuan_v1_dense", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "bailing_hybrid", "inkling",
         "qwen4_exp", "qwen2", "qwen3", "bamba", "granitemoehybrid", "nemotron_h", "nemotron_h_moe", "zamba", "mamba",
         "mamba2", "falcon_mamba", "qwen3_next", "jamba", "minimax")  # fmt: skip
"""Families whose mixers others have, or whose caches and gradients the tests of mixers and ops hold each time: of these
the slow tests alone take derivatives and generate."""
most = pytest.mark.parametrize("name", by_default(*(name for name in GOLDEN if name not in ALIKE)))


@every
@pytest.mark.quick
def test_logits(name):
    np.testing.assert_allclose(packed_logits(name)[:2], golden(name)[1]["logits"], rtol=0, atol=ATOL)


@every
def test_packed_logits(name):
    """Two documents in a row are two documents."""
    np.testing.assert_allclose(packed_logits(name)[2], golden(name)[1]["packed_logits"], rtol=0, atol=ATOL)


@most
def test_greedy_tokens(name):
    model, arrays, _ = golden(name)
    np.testing.assert_array_equal(hybridlm.generate(model, tokens(name), max_new_tokens=8), arrays["greedy_ids"])


@most
def test_loss_and_gradient_norms(name):
    model, arrays, meta = golden(name)
    value, grads = loss_and_gradients(name)(jax.device_get(nnx.state(model)))
    assert float(value) == pytest.approx(float(arrays["loss"]), rel=1e-5)
    plan = plan_of(name)
    norms = norms_by_name(plan, grads)
    for published, norm in meta["grad_norms"].items():  # null: of what nothing is learned
        assert published_norm(plan, norms, published) == pytest.approx(norm or 0.0, rel=1e-3), published


@most
def test_twenty_steps_learn(name):
    """All parameters but those of choices and slopes of fixed decays get a gradient, and the loss of a batch falls."""
    params = nnx.state(golden(name)[0])
    start, tree = jax.tree.flatten(jax.device_get(params))
    values, losses = start, []
    mean, square = ([np.zeros_like(value) for value in values] for _ in range(2))
    for i in range(1, 21):  # Adam, in NumPy: the program is that of the test above
        loss, grads = loss_and_gradients(name)(jax.tree.unflatten(tree, values))
        grads = jax.tree.leaves(jax.device_get(grads))
        mean = [0.9 * m + 0.1 * g for m, g in zip(mean, grads, strict=True)]
        square = [0.999 * s + 0.001 * g * g for s, g in zip(square, grads, strict=True)]
        rate = 3e-3 * (1 - 0.999**i) ** 0.5 / (1 - 0.9**i)
        moved = zip(values, mean, square, strict=True)
        values = [value - np.float32(rate) * m / (np.sqrt(s) + 1e-8) for value, m, s in moved]
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    changed = [np.any(a != b) for a, b in zip(values, start, strict=True)]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)]
    still = [path for path, moved in zip(paths, changed, strict=True) if not moved]
    index = "w_index']", "mixer']['q_norm", "mixer']['k_norm"
    assert all(any(name in path for name in ("selection_bias", "slopes", *index)) for path in still), still


@pytest.mark.parametrize("name", by_default("llama", "zamba2"))
def test_chunked_prefill(name):
    """Chunks of any size, single tokens among them, give the logits of one call."""
    model, arrays, _ = golden(name)
    inputs = tokens(name)
    cache, logits, start = model.init_cache(*inputs.shape), [], 0
    for size in (5, 5, 1, 1, 5):
        part, cache = extend(model, inputs[:, start : start + size], cache)
        logits.append(part)
        start += size
    np.testing.assert_allclose(np.concatenate(logits, axis=1), arrays["logits"], rtol=0, atol=ATOL)


@every
def test_round_trip_is_bit_exact(name, tmp_path):
    """What to_hf writes holds the tensors that from_hf read, under the same names; read again it is the same model."""
    model, _, _ = golden(name)
    hybridlm.to_hf(model, tmp_path / "out", max_shard_bytes=40_000)
    published, written = load_file(FOLDER / name / "model.safetensors"), {}
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        written |= load_file(file)
    assert sorted(published) == sorted(written)
    for key, value in published.items():
        assert value.dtype == written[key].dtype
        np.testing.assert_array_equal(value, written[key], err_msg=key)
    again = hybridlm.from_hf(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


@pytest.mark.parametrize("name", by_default("llama", "zamba2", "kimi_linear"))
def test_eight_devices_equal_one(name):
    """Loaded straight to 2 x 2 x 2 devices: no device holds a whole matrix, the logits are the same."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        model = hybridlm.from_hf(FOLDER / name, mesh=mesh)
        assert model.embedding[...].addressable_shards[0].data.size == model.embedding[...].size // 4
        logits = forward(model, np.tile(tokens(name), (2, 1)))
    expected = np.tile(golden(name)[1]["logits"], (2, 1, 1))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ATOL)
