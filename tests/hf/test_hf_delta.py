# SPDX-License-Identifier: Apache-2.0
"""Forms of checkpoints of the delta rule's families that the golden ones have not."""

import json

import numpy as np
import pytest
from flax import nnx
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

import hybridlm
from hybridlm.errors import ConfigError
from hybridlm.hf.config_json import find_family, read_values
from hybridlm.hf.families import family_of
from hybridlm.layers import Attention, GatedDeltaNet, KimiDelta, LatentAttention
from tests.hf.hf_support import FOLDER, golden
from tests.model.model_support import VARIANTS, named, small


def same_model(folder, name) -> None:
    """A folder is read as the golden checkpoint is, bit for bit."""
    again, model = hybridlm.from_hf(folder), golden(name)[0]
    assert again.config == model.config
    parameters = named(nnx.state(again))
    for path, value in named(nnx.state(model)).items():
        np.testing.assert_array_equal(parameters[path], value, err_msg=path)


def write(folder, values, tensors) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "model.safetensors")


def read(name):
    """config.json and the tensors of a golden checkpoint."""
    return json.loads((FOLDER / name / "config.json").read_text()), load_file(FOLDER / name / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_the_language_model_of_one_that_sees(name, tmp_path):
    """As on the hub: text_config, model.language_model., experts in two tensors, and parts that are left out. What is
    written is a model of text."""
    values, tensors = read(name)
    outer = {
        "model_type": name, "text_config": {**values, "tie_word_embeddings": True, "mtp_num_hidden_layers": 1},
        "vision_config": {"depth": 2}, "image_token_id": 3, "tie_word_embeddings": False,
    }  # fmt: skip
    seen = {"model.visual.blocks.0.norm1.weight": np.ones(3, np.float32), "mtp.fc.weight": np.ones(2, np.float32)}
    for key, value in tensors.items():
        if ".experts." not in key:
            seen[key.replace("model.", "model.language_model.")] = value
    for layer in range(4 if name == "qwen3_5_moe" else 0):
        at = f"model.layers.{layer}.mlp.experts."
        kinds = ("gate", "up", "down")
        of = {kind: np.stack([tensors[f"{at}{e}.{kind}_proj.weight"] for e in range(4)]) for kind in kinds}
        prefix = at.replace("model.", "model.language_model.")
        seen[f"{prefix}gate_up_proj"] = np.concatenate([of["gate"], of["up"]], axis=1)
        seen[f"{prefix}down_proj"] = of["down"]
    write(tmp_path / "sees", outer, seen)
    same_model(tmp_path / "sees", name)
    hybridlm.to_hf(hybridlm.from_hf(tmp_path / "sees"), tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == f"{name}_text"
    written = load_file(tmp_path / "text" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all((written[key] == value).all() for key, value in tensors.items())


def test_types_of_one_that_sees_are_kept(tmp_path):
    """Matrices in bfloat16 are written so, what is exact stays exact."""
    values, tensors = read("qwen3_5")
    del values["dtype"]
    outer = {"model_type": "qwen3_5", "text_config": {**values, "dtype": "bfloat16"}}
    seen = {key.replace("model.", "model.language_model."): value for key, value in tensors.items()}
    matrices = {key for key, value in seen.items() if value.ndim == 2}
    write(tmp_path / "sees", outer, {k: v.astype(bfloat16) if k in matrices else v for k, v in seen.items()})
    hybridlm.to_hf(hybridlm.from_hf(tmp_path / "sees"), tmp_path / "text")
    written = load_file(tmp_path / "text" / "model.safetensors")
    for key, value in tensors.items():
        expected = value.astype(bfloat16) if value.ndim == 2 else value
        assert written[key].dtype == expected.dtype, key
        np.testing.assert_array_equal(written[key], expected, err_msg=key)
    assert json.loads((tmp_path / "text" / "config.json").read_text())["dtype"] == "bfloat16"


def test_convolutions_cut_where_their_widths_are(tmp_path):
    """As on the hub, where transformers cuts them into thirds: the same model, written as it was read."""
    values, tensors = read("olmo_hybrid")
    for layer in range(3):
        names = [f"model.layers.{layer}.linear_attn.{kind}_conv1d.weight" for kind in "qkv"]
        rows = np.concatenate([tensors[name] for name in names])
        assert [len(tensors[name]) for name in names] == [32, 32, 32]
        tensors |= zip(names, np.split(rows, [24, 48]), strict=True)
    write(tmp_path / "in", values, tensors)
    same_model(tmp_path / "in", "olmo_hybrid")
    hybridlm.to_hf(hybridlm.from_hf(tmp_path / "in"), tmp_path / "out")
    model = golden("olmo_hybrid")[0]
    hybridlm.to_hf(model, tmp_path / "other", like=tmp_path / "in")
    for folder in ("out", "other"):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert all((written[key] == value).all() for key, value in tensors.items())
    del tensors["model.layers.0.linear_attn.q_conv1d.weight"]
    write(tmp_path / "in", values, tensors)
    with pytest.raises(ConfigError, match=r"1 missing: model.layers.0.linear_attn.q_conv1d.weight$"):
        hybridlm.from_hf(tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("olmo_hybrid", "layers.3.post_attention_layernorm.", "layers.3.feedforward_layer_norm."),
        ("olmo_hybrid", ".attention_layer_norm.", ".input_layernorm."),
        ("kimi_linear", "layers.0.mlp.", "layers.0.block_sparse_moe."),
    ],
)
def test_names_as_transformers_writes_them(name, old, new, tmp_path):
    values, tensors = read(name)
    renamed = {key.replace(old, new): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    write(tmp_path, values, renamed)
    same_model(tmp_path, name)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    values, tensors = read("bailing_hybrid")
    more = {"model.layers.4.eh_proj.weight": np.ones(2, np.float32)}
    write(tmp_path, values | {"num_nextn_predict_layers": 1}, tensors | more)
    same_model(tmp_path, "bailing_hybrid")
    write(tmp_path, values, tensors | {"model.layers.3.eh_proj.weight": np.ones(2, np.float32)})
    with pytest.raises(ConfigError, match=r"1 unknown: model.layers.3.eh_proj.weight$"):
        hybridlm.from_hf(tmp_path)


def blocks(name, **changes):
    """Our blocks of a golden config.json with changes."""
    values = read(name)[0] | changes
    return read_values(family_of(values["model_type"]), values).blocks.values()


def test_what_config_json_says_in_other_words():
    """Older and newer spellings, and what stands for nothing."""
    given = {"num_heads": 2, "head_dim": 6, "kda_layers": [1, 3, 4], "full_attn_layers": [2]}
    given["short_conv_kernel_size"] = 3
    kimi = next(b for b in blocks("kimi_linear", linear_attn_config=given) if isinstance(b, KimiDelta))
    assert (kimi.n_heads, kimi.d_key, kimi.decay_rank, kimi.d_conv) == (2, 6, 6, 3)
    for given in (None, {"rope_type": "default", "rope_theta": None}):
        attention = next(b for b in blocks("olmo_hybrid", rope_parameters=given) if isinstance(b, Attention))
        assert attention.rope is None
    assert next(b for b in blocks("olmo_hybrid") if isinstance(b, GatedDeltaNet)).neg_eigval
    latent = next(b for b in blocks("bailing_hybrid", max_position_embeddings=99) if isinstance(b, LatentAttention))
    assert latent.rope.interleaved
    assert latent.rope.theta == 6e6


@pytest.mark.parametrize("pattern", ["D", "*D", "-", "K", "L", "D-*", "KEL", "E*D-L-"])
def test_what_no_published_family_has(pattern):
    """Every published family is asked, and says no; our own format has it."""
    blocks = {"D": VARIANTS["delta"], "K": VARIANTS["kimi"], "L": VARIANTS["latent"], "*": VARIANTS["norm_of_all"]}
    blocks |= {"-": VARIANTS["mlp"], "E": VARIANTS["moe"]}
    assert find_family(small(pattern, blocks)).model_type == "hybridlm"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("kimi_linear", {"num_shared_experts": 0}, r"num_shared_experts \(0\) must be positive"),
        ("kimi_linear", {"mla_use_nope": False}, r"mla_use_nope \(False\) is not supported: only True"),
        (
            "kimi_linear", {"layer_types": None, "linear_attn_config": {"kda_layers": [1, 2], "full_attn_layers": [3]}},
            r"linear_attn_config: kda_layers and full_attn_layers do not name each of the 4 layers from 1 on",
        ),
        ("kimi_linear", {"mlp_layer_types": ["dense"]}, r"num_hidden_layers \(4\) is not the length of mlp_l"),
        ("bailing_hybrid", {"no_kda_lora": False}, r"no_kda_lora \(False\) is not supported: only True or None"),
        ("qwen3_5", {"attn_output_gate": False}, r"attn_output_gate \(False\) is not supported: only True"),
        ("qwen3_5_moe", {"num_experts": 0}, r"num_experts \(0\) must be positive"),
        ("qwen3_next", {"layer_types": ["conv"] * 4}, r"layer_types \('conv'\) is not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured(name, change, message):
    with pytest.raises(ConfigError, match=f"^config.json: {message}"):
        blocks(name, **change)
