# SPDX-License-Identifier: Apache-2.0
"""Scaled rotary embeddings beside those of transformers (the `parity` extra), frequency by frequency."""

import numpy as np
import pytest

from hybridlm.config import Linear, Llama3, Rope, YaRN
from hybridlm.layers.rope import dynamic_ntk, frequencies

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
CASES = [
    ("linear", {"factor": 4.0}, None, Linear(4.0)),
    ("llama3", {"factor": 8.0, **LLAMA3}, None, Llama3(8.0, 1.0, 4.0, 256)),
    *[("yarn", {"factor": f, "original_max_position_embeddings": n}, None, YaRN(f, n))
      for f, n in ((4.0, 4096), (16.0, 128), (2.5, 100))],
    ("yarn", {"factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 16.0, "beta_slow": 2.0,
              "attention_factor": 1.25, "truncate": False}, None, YaRN(8.0, 512, 16.0, 2.0, 1.25, False)),
    *[("dynamic", {"factor": factor}, n, dynamic_ntk(n, 1024, factor)) for factor in (1.0, 2.0)
      for n in (100, 1024, 1025, 5000)],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "length", "scaling"), CASES)
def test_frequencies(kind, values, length, scaling):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, max_position_embeddings=1024,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0, **values},
    )  # fmt: skip
    expected, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", length)
    found, found_scale = frequencies(Rope(500.0, scaling=scaling), 64)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-6)
    assert found_scale == pytest.approx(scale)
