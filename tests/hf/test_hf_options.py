# SPDX-License-Identifier: Apache-2.0
"""What config.json can say in more than one way, or what the published implementation says otherwise than its authors:
LFM2, Hunyuan, RecurrentGemma, xLSTM, ZAYA1, Qwen4-Exp. No model is made."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hybridlm
from hybridlm.config import NTK, Attention, ConfigError, Proportional, Rope
from hybridlm.hf.config_json import read_values, write_values
from hybridlm.hf.families import family_of
from tests.hf.hf_support import FOLDER, golden
from tests.hf.variants import GRIFFIN, LFM2, LFM3, LLAMA, QWEN4, RWKV, XLSTM, ZAYA, rope


def config_of(model_type: str, values: dict):
    return read_values(family_of(model_type), {"model_type": model_type, **values})


def refused(model_type: str, values: dict) -> str:
    with pytest.raises(ConfigError) as error:
        config_of(model_type, values)
    return str(error.value)


def test_lfm2_widths_and_layers_as_older_files_say_them():
    older = {k: v for k, v in LFM2.items() if k not in ("intermediate_size", "layer_types")}
    older |= {
        "block_ff_dim": 60,
        "tie_embedding": False,
        "full_attn_idxs": [1],
        "block_use_swiglu": True,
        "conv_dim": 32,
    }
    config = config_of("lfm2", older)
    assert config == config_of("lfm2", LFM2 | {"tie_word_embeddings": False})
    assert (config.pattern, config.blocks["-"].d_ff, config.tie_embeddings) == ("C-*-C-", 40, False)
    assert config_of("lfm2", LFM2 | {"block_ffn_dim_multiplier": 1.3}).blocks["-"].d_ff == 56  # 52 and up to eights
    assert config_of("lfm2", LFM2 | {"block_auto_adjust_ff_dim": False}).blocks["-"].d_ff == 60


def test_lfm3_rotations_of_its_class():
    config = config_of("lfm3", LFM3)
    assert config.pattern == "C-C-*-C-w-"
    assert config.blocks["*"].rope == Rope(1e6, 0.5, Proportional())
    assert (config.blocks["w"].rope, config.blocks["w"].window) == (Rope(1e4), 4)
    assert set(config.norm_after) == set("C*w-")
    given = {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 5.0}}}
    assert refused("lfm3", LFM3 | given) == "config.json: rope_parameters has no full_attention"
    assert "rope_parameters (conv): only full_attention, sliding_attention" in refused(
        "lfm3", LFM3 | {"rope_parameters": {"conv": {"rope_theta": 1.0}}}
    )


def test_lfm3_gates_by_either_name(tmp_path):
    """As files have them, and as the published implementation holds them in memory."""
    tensors = load_file(FOLDER / "lfm3" / "model.safetensors")
    assert any("gate_proj" in name for name in tensors)
    renamed = {name.replace("self_attn.gate_proj", "self_attn.g_proj"): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FOLDER / "lfm3" / "config.json").read_text())
    again, model = hybridlm.from_hf(tmp_path), golden("lfm3")[0]
    hybridlm.to_hf(again, tmp_path / "out")
    assert again.config == model.config
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == sorted(tensors)


def test_hunyuan_alpha_in_old_and_new_files():
    stretched = {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0}}
    old = config_of("hunyuan_v1_dense", LLAMA | stretched | {"rope_theta": 500.0, "use_qk_norm": True})
    new = config_of("hunyuan_v1_dense", LLAMA | rope("dynamic", alpha=1000.0, factor=1.0))
    assert old == new and new.blocks["*"].rope == Rope(500.0, scaling=NTK(1000.0))
    values, _ = write_values(family_of("hunyuan_v1_dense"), new)
    assert values["rope_parameters"] == {"rope_type": "dynamic", "rope_theta": 500.0, "alpha": 1000.0, "factor": 1.0}
    assert "alpha is missing" in refused("hunyuan_v1_dense", LLAMA | rope("dynamic", factor=2.0))
    assert "rope_type ('dynamic') is not supported" in refused("llama", LLAMA | rope("dynamic", factor=2.0))


def test_recurrent_gemma_sees_as_many_tokens_before_as_the_window_says():
    """And itself, as in Google's code; transformers has one fewer. Written it is the same number again."""
    config = config_of("recurrent_gemma", GRIFFIN | {"attention_window_size": 5})
    assert next(block.window for block in config.blocks.values() if isinstance(block, Attention)) == 6
    values, _ = write_values(family_of("recurrent_gemma"), config)
    assert values["attention_window_size"] == 5
    assert values["block_types"] == ["recurrent", "recurrent", "attention"]


def test_recurrent_gemma_scales_embeddings_by_a_root_in_bfloat16():
    assert (
        config_of("recurrent_gemma", GRIFFIN | {"hidden_size": 2560, "num_attention_heads": 10}).embedding_multiplier
        == 50.5
    )


def test_rwkv_has_a_last_norm_of_its_own_epsilon():
    config = config_of("rwkv", RWKV | {"layer_norm_epsilon": 1e-3, "rescale_every": 6})
    assert (config.norm_eps, config.final_norm_eps) == (1e-3, 1e-5)
    assert config_of("rwkv", RWKV).final_norm_eps is None


def test_xlstm_widths():
    config = config_of("xlstm", XLSTM | {"qk_dim_factor": 0.25, "num_blocks": 3})
    block = config.blocks["X"]
    assert (config.pattern, block.d_key, block.d_head, config.blocks["-"].d_ff) == ("X-X-X-", 2, 8, 88)
    message = "config.json: qk_dim_factor * hidden_size (10) not divisible by num_heads (4)"
    assert refused("xlstm", XLSTM | {"qk_dim_factor": 0.3125}) == message
    assert "weight_mode ('fused') is not supported" in refused("xlstm", XLSTM | {"weight_mode": "fused"})


def test_zaya_refuses_by_name():
    assert "lm_head_bias (True) is not supported" in refused("zaya", ZAYA | {"lm_head_bias": True})
    assert "num_experts_per_tok (2) is not supported" in refused("zaya", ZAYA | {"num_experts_per_tok": 2})
    slides = {"layer_types": ["hybrid", "hybrid_sliding", "hybrid"]}
    assert refused("zaya", ZAYA | slides) == "config.json: layer_types ('hybrid_sliding') needs sliding_window"


def test_qwen4_layers_as_files_say_them():
    """Layers of attention by either name or by how many there are; n-grams in front of theirs."""
    config = config_of("qwen4_exp_text", QWEN4)
    assert config.pattern == "DENDEDE*E" and config.stream_width == 2 * config.d_model
    layers = ["linear_attention"] * 3
    for kind in ("full_attention", "indexed_attention"):
        assert config_of("qwen4_exp_text", QWEN4 | {"layer_types": [*layers, kind]}) == config
    two = config_of("qwen4_exp_text", QWEN4 | {"ple_layer_ids": [3, 1]})
    assert two.pattern == "NDEDEaDE*E" and [two.blocks[s].index for s in "Na"] == [0, 1]
    assert set(two.blocks["N"].sizes).isdisjoint(two.blocks["a"].sizes)
    outer = {"text_config": {"model_type": "qwen4_exp_text", **QWEN4}, "vision_config": {}, "image_token_id": 9}
    assert config_of("qwen4_exp", outer) == config
    ends = config_of("qwen4_exp_text", QWEN4 | {"eos_token_id": [2, 7]})
    assert ends == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indexer_kv_heads": 2}, "indexer_kv_heads (2) is not supported: only 1"),
        ({"indexer_budget": None}, "of the index, indexer_budget is missing"),
        ({"indexer_budget": 5}, "budget (5) not divisible by block (2)"),
        ({"indexer_head_dim": 2}, "d_index (2) is less than the rotated width (4)"),
        ({"ple_layer_ids": [4]}, "ple_layer_ids (4) names a layer of attention: it must be linear_attention"),
        ({"ple_layer_ids": [5]}, "ple_layer_ids (5) must be from 1 to num_hidden_layers (4)"),
        ({"eos_token_id": None}, "ple_layer_ids needs eos_token_id"),
        ({"hc_count": 1}, "hc_count (1) must be above 1"),
        ({"hidden_act": "relu"}, "output_gate_type ('relu') is not supported: only silu, swish, sigmoid"),
        ({"split_ngram_parts": 7}, "n_files (7) must divide the 152 rows"),
        ({"ple_embed_dim": 10}, "d_embed (10) not divisible by the 4 hashes"),
    ],
)
def test_qwen4_refuses_by_name(change, message):
    assert message in refused("qwen4_exp_text", QWEN4 | change)


def test_qwen4_keeps_all_ends_of_text(tmp_path):
    """Of several the first is the n-grams'; the others are written again."""
    folder = tmp_path / "in"
    folder.mkdir()
    for file in ("model.safetensors", "config.json"):
        (folder / file).write_bytes((FOLDER / "qwen4_exp" / file).read_bytes())
    values = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [2, 5]}
    (folder / "config.json").write_text(json.dumps(values))
    hybridlm.to_hf(hybridlm.from_hf(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 5]
    numbers = load_file(tmp_path / "out" / "model.safetensors")
    multipliers = numbers["model.layers.1.ple.ple_embedding.layer_multipliers"]
    assert multipliers.dtype == np.int64 and (multipliers > 2**32).any()


@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe", "lfm3", "recurrent_gemma", "rwkv", "xlstm", "zaya"])
def test_a_config_with_other_numbers_of_layers_is_written_and_read(name):
    """Such as have no layer of a kind."""
    values = json.loads((FOLDER / name / "config.json").read_text())
    only = {"lfm2": ["conv"], "lfm2_moe": ["full_attention"], "lfm3": ["sliding_attention"], "zaya": ["hybrid"]}
    values |= {"num_hidden_layers": 1, "num_blocks": 1} if name == "xlstm" else {"num_hidden_layers": 1}
    values |= {"layer_types": only[name]} if name in only else {}
    values |= {"num_dense_layers": 0} if name == "lfm2_moe" else {}
    config = config_of(name, values)
    written, again = write_values(family_of(name), config)
    assert again == config and written["num_hidden_layers"] == 1
