# SPDX-License-Identifier: Apache-2.0
"""Folders as they come: prefixes, copies, shards, types, tokenizers; and what is refused, in one line that names it."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import hybridlm
from hybridlm.config import MLP, Attention, MeshConfig, ModelConfig
from hybridlm.errors import ConfigError
from hybridlm.hf.axes import parse, piece
from hybridlm.sharding import make_mesh
from tests.hf.hf_support import FOLDER, forward, golden, plan_of
from tests.model.model_support import build


@pytest.fixture
def copy(tmp_path):
    """copy(family, change_config, change_tensors): a golden checkpoint in a new folder, changed."""

    def make(name, change_config=None, change_tensors=None):
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        config = json.loads((FOLDER / name / "config.json").read_text())
        tensors = load_file(FOLDER / name / "model.safetensors")
        if change_config:
            config = change_config(config) or config
        if change_tensors:
            tensors = change_tensors(tensors) or tensors
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def same(a: nnx.Module, b: nnx.Module) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


# What is refused ----------------------------------------------------------------------------------------------------


def test_missing_unknown_and_misshapen_tensors_in_one_line(copy):
    def spoil(tensors):
        del tensors["model.layers.1.self_attn.k_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.7.mystery"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].copy()

    with pytest.raises(ConfigError) as error:
        hybridlm.from_hf(copy("llama", change_tensors=spoil))
    text = str(error.value)
    assert "2 missing: model.norm.weight, model.layers.1.self_attn.k_proj.weight" in text
    assert "1 unknown: model.layers.7.mystery" in text
    assert "1 misshapen: lm_head.weight [64, 31] where [64, 32] is wanted" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "hidden_act", "quick_gelu"),
        ("llama", "attention_dropout", 0.1),
        ("llama", "quantization_config", {"bits": 4}),
        ("llama", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("llama", "rope_parameters", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}),
        ("llama", "partial_rotary_factor", 0.5),
        ("qwen3", "layer_types", ["full_attention", "chunked_attention"]),
        ("mamba2", "hidden_act", "tanh"),
        ("mamba2", "a_new_option", 3),
        ("nemotron_h", "num_nextn_predict_layers", 1),
        ("zamba2", "use_long_context", True),
        ("zamba2", "num_mem_blocks", 0),
        ("zamba", "attention_hidden_size", 48),
    ],
)
def test_options_that_are_not_supported_are_named(copy, name, key, value):
    with pytest.raises(ConfigError, match=key if key != "rope_scaling" else "rope_type") as error:
        hybridlm.from_hf(copy(name, change_config=lambda config: {**config, key: value}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [({"model_type": "gpt2"}, "model_type .'gpt2'. is not supported: known are llama"), ({}, "model_type is missing")],
)
def test_unknown_families(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        hybridlm.from_hf(tmp_path)


def test_folders_that_are_no_checkpoints(tmp_path, copy):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        hybridlm.from_hf(tmp_path / "nowhere")
    folder = copy("llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="cut short"):
        hybridlm.from_hf(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no safetensors files"):
        hybridlm.from_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        hybridlm.from_hf(folder)


def test_quantised_tensors(copy):
    folder = copy("llama", change_tensors=lambda t: {**t, "model.norm.weight": np.ones(32, np.int8)})
    with pytest.raises(ConfigError, match=r"1 misshapen: model\.norm\.weight of type I8"):
        hybridlm.from_hf(folder)


def test_models_that_no_family_can_express(tmp_path):
    config = ModelConfig(32, 16, "*-", {"*": Attention(2, d_head=8, gate="head"), "-": MLP(8)})
    model = build(config)
    with pytest.raises(ConfigError, match=r"llama cannot express this model: blocks\.\*\.gate is head where None"):
        hybridlm.to_hf(model, tmp_path / "out", family="llama")
    ahead = ModelConfig(32, 16, "*", {"*": Attention(2, d_head=8, direction="bidirectional")})
    with pytest.raises(ConfigError, match="no published family can express this model"):
        hybridlm.to_hf(build(ahead), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_not_written_over(tmp_path):
    model = golden("llama")[0]
    hybridlm.to_hf(model, tmp_path, max_shard_bytes=30_000)
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        hybridlm.to_hf(model, tmp_path)
    hybridlm.to_hf(model, tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    same(hybridlm.from_hf(tmp_path), model)


# What is accepted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("nemotron_h", "backbone.", "model."), ("mamba2", "backbone.", "model."), ("llama", "model.", "")],
)
def test_prefixes(copy, name, old, new):
    """A file of the inner model alone, or with the prefix of another release."""
    rename = lambda key: new + key.removeprefix(old) if key.startswith(old) else key
    folder = copy(name, change_tensors=lambda tensors: {rename(key): value for key, value in tensors.items()})
    same(hybridlm.from_hf(folder), golden(name)[0])


def test_older_keys(copy):
    def older(config):
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        return {**config, "rope_scaling": None, "torch_dtype": config.pop("dtype")}

    assert hybridlm.from_hf(copy("llama", older)).config == golden("llama")[0].config
    pattern = lambda config: {**config, "hybrid_override_pattern": "M-M*-", "layers_block_type": None}
    assert hybridlm.from_hf(copy("nemotron_h", pattern)).config == golden("nemotron_h")[0].config


@pytest.mark.parametrize("name", ["zamba", "zamba2"])
def test_shared_weights_under_every_name(copy, tmp_path, name):
    """Untied files hold a shared block at each depth: equal copies are read, different ones refused; written alike."""
    copies = {new: old for new, old in plan_of(name).copies.items() if new != "lm_head.weight"}
    assert copies
    folder = copy(name, change_tensors=lambda t: {**t, **{new: t[old] for new, old in copies.items()}})
    same(hybridlm.from_hf(folder), golden(name)[0])
    new, old = next((new, old) for new, old in copies.items() if new.endswith("q_proj.weight"))
    other = copy(name, change_tensors=lambda t: {**t, new: t[old] + 1})
    with pytest.raises(ConfigError, match=f"1 unequal: {new} to {old}"):
        hybridlm.from_hf(other)

    def untie(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}

    untied = hybridlm.from_hf(copy(name, lambda config: {**config, "tie_word_embeddings": False}, untie))
    hybridlm.to_hf(untied, tmp_path / "out")
    assert set(copies) < set(load_file(tmp_path / "out" / "model.safetensors"))
    same(hybridlm.from_hf(tmp_path / "out"), untied)


def test_tied_outputs(copy):
    """An equal output is the embedding; a different one unties; one alone stands for both."""
    equal = lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]}
    assert hybridlm.from_hf(copy("zamba2", change_tensors=equal)).config.tie_embeddings
    different = lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1}
    assert not hybridlm.from_hf(copy("zamba2", change_tensors=different)).config.tie_embeddings
    alone = lambda t: {**t, "lm_head.weight": t.pop("model.embed_tokens.weight")}
    same(hybridlm.from_hf(copy("zamba2", change_tensors=alone)), golden("zamba2")[0])


def test_bfloat16(copy, tmp_path):
    """Read into float32 or kept; written back, the same bits."""
    half = lambda tensors: {key: value.astype(ml_dtypes.bfloat16) for key, value in tensors.items()}
    folder = copy("falcon_h1", lambda config: {**config, "dtype": "bfloat16"}, half)
    wide, kept = hybridlm.from_hf(folder), hybridlm.from_hf(folder, dtype="bfloat16")
    assert wide.config.compute_dtype == "bfloat16"
    assert wide.embedding[...].dtype == np.float32
    assert kept.embedding[...].dtype == ml_dtypes.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(kept))} == {np.dtype(ml_dtypes.bfloat16), np.dtype("f4")}
    for model, out in ((wide, tmp_path / "wide"), (kept, tmp_path / "kept")):
        hybridlm.to_hf(model, out)
        written = load_file(out / "model.safetensors")
        for key, value in load_file(folder / "model.safetensors").items():
            np.testing.assert_array_equal(value.view(np.uint16), written[key].view(np.uint16))
        assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    hybridlm.to_hf(wide, tmp_path / "float32", dtype="float32")
    assert {value.dtype for value in load_file(tmp_path / "float32" / "model.safetensors").values()} == {np.dtype("f4")}


def test_tokenizer_and_other_keys_are_carried_along(copy, tmp_path):
    folder = copy("llama", lambda config: {**config, "eos_token_id": [2, 7], "max_position_embeddings": 77})
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "notes.txt",
    ):
        (folder / file).write_text(f"{file} text")
    model = hybridlm.from_hf(folder)
    hybridlm.to_hf(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["eos_token_id"], written["max_position_embeddings"]) == ([2, 7], 77)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json text"
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    assert not (tmp_path / "out" / "notes.txt").exists()
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="is gone: name one with like="):
        hybridlm.to_hf(model, tmp_path / "again")
    hybridlm.to_hf(model, tmp_path / "again", like=tmp_path / "out")
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_progress_and_sharded_export(tmp_path):
    """Parameters spread over devices are written without being gathered whole; progress ends at the total."""
    mesh, seen = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), []
    with jax.set_mesh(mesh):
        model = hybridlm.from_hf(FOLDER / "bamba", mesh=mesh, progress=lambda *report: seen.append(report))
        assert seen[-1][1] == seen[-1][2] > 0
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
        hybridlm.to_hf(model, tmp_path, progress=lambda *report: seen.append(report))
    assert seen[-1][1] == seen[-1][2]
    same(hybridlm.from_hf(tmp_path), golden("bamba")[0])


def test_a_model_of_ones_own_finds_its_family(tmp_path):
    """Other symbols and derived sizes left out: the first family that says the same is written."""
    config = ModelConfig(
        32, 16, "am" * 3, {"a": Attention(2, d_head=8), "m": MLP(24, "geglu_tanh")}, compute_dtype="float32"
    )
    model = build(config)
    hybridlm.to_hf(model, tmp_path)
    again = hybridlm.from_hf(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    tokens = np.arange(8)[None]
    np.testing.assert_array_equal(forward(again, tokens), forward(model, tokens))


# Axes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "ours", "theirs"),
    [
        ("w: (c H P) D -> D c H P", (3, 2, 4, 5), (40, 3)),
        ("w: (H P -c) D -> D c H P", (3, 2, 4, 5), (40, 3)),
        ("w: F D -> D 1 F", (3, 2, 5), (5, 3)),
        ("w: (H P) 1 W -> H P W", (4, 5, 3), (20, 1, 3)),
        ("w: F D -> e D F", (6, 3, 5), (5, 3)),
        ("w: H", (4,), (4,)),
        ("w: (r P) D -> D (g r) P", (3, 8, 5), (10, 3)),
    ],
)
def test_moves_can_be_undone(spec, ours, theirs):
    part = piece(parse(spec), "w", ours, 1, 2, 4)
    assert part.shape == theirs
    value = np.random.default_rng(0).normal(size=(2, *ours))
    np.testing.assert_array_equal(part.to_ours(part.to_theirs(value[part.index])), value[part.index])


def test_rows_that_come_again_by_hand():
    """Of 2 keys with 2 values each: rows q0 v0 v1, q1 v2 v3."""
    rows = ["q: N D -> D g N", "v: (r P) D -> D (g r) P; g of q 1"]
    shapes, start, places = {"q": (1, 2, 1), "v": (1, 4, 1)}, 0, {}
    for g in range(2):
        for spec in rows:
            move = parse(spec)
            part = piece(move, move.path, shapes[move.path], None, g, 2)
            places[move.path, g] = start
            start += part.shape[0]
            assert part.index[1] == (g if move.path == "q" else slice(2 * g, 2 * g + 2))
    assert places == {("q", 0): 0, ("v", 0): 1, ("q", 1): 3, ("v", 1): 4}
    assert parse(rows[1]).count_of == ("q", 1)
    with pytest.raises(ValueError, match="3 g do not divide"):
        piece(parse(rows[1]), "v", (1, 4, 1), None, 0, 3)
    with pytest.raises(ValueError, match="a parenthesis on the right is of the counted axis and one more"):
        parse("v: (r P) D -> D (r P)")


def test_moves_by_hand():
    part = piece(parse("w: (P -c) D -> D c P"), "w", (1, 2, 3), None, None)
    np.testing.assert_array_equal(part.to_ours(np.arange(6)[:, None]), [[[1, 3, 5], [0, 2, 4]]])
    with pytest.raises(ValueError, match="must be on the right"):
        parse("w: A B -> A")
