# SPDX-License-Identifier: Apache-2.0
"""Kernels of one token of one row, interpreted, beside the sublayers as they stand without them, and float64."""

import contextlib
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from hybridlm.layers import MLP, Attention, Mamba2
from hybridlm.layers.mamba2 import GatedNorm
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM
from pallas_kernels import one_token
from pallas_kernels.oracle import relative_rms
from tests.ops.interpreter import mosaic_interpreted, needs_gpu_interpreter

pytestmark = needs_gpu_interpreter
D = 1024
BLOCKS = {
    "M": Mamba2(d_state=128, d_head=64, n_heads=64),
    "m": Mamba2(d_state=128, d_head=64, n_heads=64, n_groups=2, conv_bias=False, dt_limit=(0.01, 0.5),
                gated_norm=GatedNorm(before_gate=True, n_groups=1)),
    "*": Attention(n_heads=16, n_kv_heads=2, d_head=64, qk_norm=True, gate="elementwise"),
    "w": Attention(n_heads=16, d_head=64, window=4),
    "-": MLP(d_ff=1024),
}  # fmt: skip


@contextlib.contextmanager
def interpreted():
    """Where kernels serve, interpreted; gives the names of those that ran."""
    from pallas_kernels.one_token import mamba2_step, one_row

    names = []
    jax.clear_caches()  # what an earlier test traced would not be named again
    with contextlib.ExitStack() as stack:
        stack.enter_context(mosaic_interpreted())
        serves = lambda dtype: None if dtype == "bfloat16" else "of another type"
        stack.enter_context(mock.patch.object(one_token, "why_not", serves))
        for module in (mamba2_step, one_row):
            named = module.named_body
            noted = lambda name, *rest, named=named: (names.append(name), named(name, *rest))[1]
            stack.enter_context(mock.patch.object(module, "named_body", noted))
        yield names


def model(pattern: str, **options) -> HybridLM:
    config = ModelConfig(vocab_size=64, d_model=D, pattern=pattern, blocks=BLOCKS, **options)
    made = HybridLM(config, rngs=nnx.Rngs(0))
    noisy = lambda path, a: a + 0.2 * jax.random.normal(jax.random.key(len(str(path))), a.shape)
    nnx.update(made, jax.tree_util.tree_map_with_path(noisy, nnx.state(made)))
    return made


def steps(pattern: str, batch: int, n: int = 2, **options) -> list[np.ndarray]:
    """Hidden vectors of the next tokens one by one, and the arrays of the cache behind them."""
    made, rng = model(pattern, **options), np.random.default_rng(0)
    tokens_BT = rng.integers(0, 64, (batch, n)).astype(np.int32)
    step = jax.jit(lambda token_B, cache: made.extend_hidden(token_B[:, None], cache))
    cache, found = made.init_cache(batch, n), []
    for i in range(n):
        x_B1D, cache = step(tokens_BT[:, i], cache)
        found.append(np.asarray(x_B1D, np.float32))
    return [*found, *(np.asarray(a, np.float32) for a in jax.tree.leaves(cache))]


@pytest.mark.parametrize(
    ("pattern", "batch", "kernels"),
    [
        ("-", 1, {"normed", "silu"}),
        ("-", 3, set()),
        pytest.param("M*w", 1, {"normed", "gated_norm", "mamba2_step", "plain"}, marks=pytest.mark.slow),
        pytest.param("m-", 1, {"normed", "norm_gate", "mamba2_step", "silu"}, marks=pytest.mark.slow),
    ],
)
def test_steps(pattern, batch, kernels):
    """As near to float32 as the same steps without kernels, whose sums are rounded at other places."""
    exact = steps(pattern, batch, compute_dtype="float32", residual_multiplier=0.5)
    plain = steps(pattern, batch, compute_dtype="bfloat16", residual_multiplier=0.5)
    with interpreted() as names:
        fused = steps(pattern, batch, compute_dtype="bfloat16", residual_multiplier=0.5)
    assert set(names) == {name if name == "mamba2_step" else f"one_row_{name}" for name in kernels}
    for i, (actual, beside, expected) in enumerate(zip(fused, plain, exact, strict=True)):
        assert actual.shape == expected.shape
        error, usual = relative_rms(actual, expected), relative_rms(beside, expected)
        assert error <= 1.3 * usual + 1e-6, f"result {i}: {error:.2e}, without kernels {usual:.2e}"
