# SPDX-License-Identifier: Apache-2.0
"""FLOPs by hand and by XLA's count of the compiled model; peaks by device name."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from hybridlm.config import MLP, Attention, Mamba2, ModelConfig
from hybridlm.config.find import load_config
from hybridlm.model.flops import forward_flops, train_flops
from hybridlm.model.model import HybridLM
from hybridlm.train.mfu import mfu, peak_flops

D, T = 64, 32


def test_model_adds_sublayers_and_logits():
    model = ModelConfig(vocab_size=100, d_model=D, pattern="--", blocks={"-": MLP(d_ff=100)})
    assert forward_flops(model, T) == 2 * (2 * 3 * 64 * 100) + 2 * 64 * 100
    assert train_flops(model, T) == 3 * forward_flops(model, T)


@pytest.mark.parametrize("pattern", ["M", "*", "-"])
def test_against_xla(pattern):
    """XLA counts what is computed: masked halves in full, and elementwise work; widths here make that small."""
    blocks = {"M": Mamba2(d_state=16, d_head=32, chunk=16), "*": Attention(n_heads=8, d_head=32), "-": MLP(d_ff=512)}
    config = ModelConfig(vocab_size=512, d_model=256, pattern=pattern, blocks=blocks, compute_dtype="float32")
    tokens = jnp.zeros((2, 16), jnp.int32)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))
    compiled = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens)).lower(params).compile()
    counted = compiled.cost_analysis()["flops"] / tokens.size
    assert forward_flops(config, 16) == pytest.approx(counted, rel=0.1)


def test_six_flops_a_parameter_and_token_at_scale():
    """Of a large model at a short context, 6 N is nearly all (Kaplan et al. 2020, section 2.1)."""
    model = load_config("hybrid_1b").model
    abstract = nnx.eval_shape(lambda: HybridLM(model, rngs=nnx.Rngs(0)))
    n_params = sum(x.size for x in jax.tree.leaves(nnx.state(abstract)))
    assert 1.0 < train_flops(model, 512) / (6 * n_params) < 1.1


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918),
        ("TPU7x", 1153.5), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4), ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA L4", 121),
    ],
)  # fmt: skip
def test_peaks(kind, tera):
    assert peak_flops(kind) == tera * 1e12


def test_no_mfu_where_the_peak_is_not_known():
    assert peak_flops("cpu") is None and mfu(1e3, 1e9, "cpu", 1) is None
    assert mfu(1000, 989.4e9 / 2, "NVIDIA H100 80GB HBM3", 1) == pytest.approx(0.5)
    assert mfu(1000, 989.4e9 / 2, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.25)
