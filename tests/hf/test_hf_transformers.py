# SPDX-License-Identifier: Apache-2.0
"""Through transformers itself (the `parity` extra): any configuration of a family, loaded, written and loaded again."""

import json

import numpy as np
import pytest

import hybridlm
from tests.hf.hf_support import ATOL, FOLDER, GOLDEN, forward, golden
from tests.hf.variants import VARIANTS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
CASES = [pytest.param(name, {**base, **change}, id=f"{name}-{i}", marks=() if i == 0 else pytest.mark.slow)
         for name in VARIANTS for i, (base, change) in enumerate(VARIANTS[name])]  # fmt: skip
INPUTS = np.random.default_rng(0).integers(3, 48, (2, 19)).astype(np.int32)


def randomised(name: str, values: dict, seed: int = 0):
    """A published model without a parameter at 0 or 1; skips what the installed transformers does not know."""
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **values)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        biases = [buffer for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")]
        for parameter in [*model.parameters(), *biases]:
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def logits_of(model, inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(inputs, dtype=torch.long), use_cache=False).logits.numpy()


@pytest.mark.parametrize(("name", "values"), CASES)
def test_variant(name, values, tmp_path):
    """Logits as published; written, transformers finds every key and no other, and computes the same."""
    published = randomised(name, values)
    published.save_pretrained(tmp_path / "in")
    if name == "nemotron_h":  # its clamp of dt is NVIDIA's here, see the module
        (tmp_path / "in" / "config.json").write_text(
            (tmp_path / "in" / "config.json").read_text().replace('"time_step_min": 1e-12', '"time_step_min": 0.001')
        )
    model = hybridlm.from_hf(tmp_path / "in")
    expected = logits_of(published, INPUTS)
    np.testing.assert_allclose(forward(model, INPUTS), expected, rtol=0, atol=ATOL * max(1, np.abs(expected).max() / 5))
    hybridlm.to_hf(model, tmp_path / "out", max_shard_bytes=30_000)
    check_loads(tmp_path / "out", published)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in GOLDEN]
)
def test_golden_round_trip(name, tmp_path):
    """Of the other families the test above does that."""
    hybridlm.to_hf(golden(name)[0], tmp_path / "out")
    check_loads(tmp_path / "out", transformers.AutoModelForCausalLM.from_pretrained(FOLDER / name))


def check_loads(folder, published) -> None:
    """transformers loads the folder with no missing and no unexpected key, and every tensor is the published one."""
    again, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(again) is type(published)
    expected, found = published.state_dict(), again.state_dict()
    assert list(expected) == list(found)
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    assert json.loads((folder / "config.json").read_text())["model_type"] == published.config.model_type
