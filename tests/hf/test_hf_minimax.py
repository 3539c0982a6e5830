# SPDX-License-Identifier: Apache-2.0
"""What MiniMax-01's files have beside what the golden checkpoint shows: rotated widths, decays that are left out."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hybridlm
from hybridlm.config.find import load_config
from hybridlm.errors import ConfigError
from hybridlm.hf.config_json import write_values
from hybridlm.hf.families import family_of, minimax
from tests.hf.hf_support import FOLDER


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FOLDER / "minimax", tmp_path / "in")
    return tmp_path / "in"


def with_values(folder, **values):
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | values))


def test_decays_follow_from_the_config():
    """Those of the golden file, to rounding: what is written for a model that comes from no file."""
    model = hybridlm.from_hf(FOLDER / "minimax")
    published, made = load_file(FOLDER / "minimax" / "model.safetensors"), minimax.constants(model.config)
    assert made.keys() == {name for name in published if name.endswith("_decay")}
    for name, constant in made.items():
        assert constant.shape == published[name].shape == constant.make().shape
        np.testing.assert_allclose(constant.make(), published[name], rtol=3e-7, atol=1e-9)


def test_they_may_be_left_out(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: a for n, a in tensors.items() if not n.endswith("_decay")}, folder / "model.safetensors")
    hybridlm.to_hf(hybridlm.from_hf(folder), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_allclose(written[name], array, rtol=3e-7, atol=1e-9, err_msg=name)


def test_rotated_width(folder):
    """MiniMax-Text-01's files say it, beside keys of its own code."""
    with_values(folder, rotary_dim=4, postnorm=True, shared_intermediate_size=0, shared_moe_mode="sigmoid")
    config = hybridlm.from_hf(folder).config
    assert config.blocks["*"].rope.fraction == 0.5
    values, again = write_values(family_of("minimax"), config)
    assert values["rotary_dim"] == 4 and again.blocks == config.blocks
    assert load_config("minimax:456b").model.blocks["*"].rope.d_rotated(128) == 64


def test_what_is_not_supported_is_named(folder):
    for values, said in (
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise \(0.1\) is not supported: only 0.0"),
        ({"shared_intermediate_size": 8}, r"shared_intermediate_size \(8\) is not supported"),
        ({"layer_types": ["conv"] * 4}, r"'conv'\) is not supported: only linear_attention, full_attention"),
    ):
        with_values(folder, **values)
        with pytest.raises(ConfigError, match=said):
            hybridlm.from_hf(folder)
        shutil.copy(FOLDER / "minimax" / "config.json", folder / "config.json")
