# SPDX-License-Identifier: Apache-2.0
"""config.json files with the keys that publishers leave in them: nothing in their way, and the published size."""

import json
from pathlib import Path

import jax
import pytest

from hybridlm.config.find import load_config
from hybridlm.hf.checkpoint import open_checkpoint
from hybridlm.hf.compare import difference_of
from hybridlm.hf.config_json import load_json
from hybridlm.model.init import abstract

FILES = load_json(Path(__file__).with_name("published.json"))
"""Name of our config, or of the checkpoint where we have none, -> config.json."""
COUNTS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Mamba-Codestral-7B": 7_285_403_648,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
}


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_read_as_its_size(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FILES[name]))
    checkpoint = open_checkpoint(tmp_path)
    model = checkpoint.stated
    if ":" in name:
        assert difference_of(load_config(name).model, model) is None
    else:
        assert sum(p.size for p in jax.tree.leaves(abstract(model).shapes)) == COUNTS[name]
