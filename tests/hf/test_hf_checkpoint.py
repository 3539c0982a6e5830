# SPDX-License-Identifier: Apache-2.0
"""A folder is opened once; which of its files count; what damaged ones say."""

import json
import logging
import os
import shutil
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import hybridlm
from hybridlm.config import MeshConfig
from hybridlm.config.find import load_config
from hybridlm.errors import ConfigError
from hybridlm.hf import checkpoint, load, tensors
from hybridlm.hf.families import KNOWN, llama
from hybridlm.hf.tensors import INDEX, read_entries
from hybridlm.model.init import abstract
from hybridlm.model.model import HybridLM
from hybridlm.sharding import make_mesh
from tests.hf.hf_support import FOLDER, golden

SINGLE = "model.safetensors"


@pytest.fixture
def counts(monkeypatch):
    """How often each thing is done that an opened checkpoint costs; files by their names."""
    counted = Counter()

    def count(owner, name, key=lambda *args: None):
        done = getattr(owner, name)

        def counting(*args, **options):
            counted[key(*args) or name.strip("_")] += 1
            return done(*args, **options)

        monkeypatch.setattr(owner, name, counting)

    abstract.cache_clear()
    count(checkpoint, "load_json", lambda file: file.name)
    count(tensors, "read_header", lambda file: file.name)
    count(load, "make_plan")
    count(HybridLM, "__init__", lambda *_: "abstract model")
    count(tensors.Entry, "equals")
    return counted


@pytest.fixture
def tied(tmp_path):
    """A tied checkpoint in three files, which holds its output twice; its vocabulary is no other test's."""
    values = json.loads((FOLDER / "zamba2" / "config.json").read_text())
    arrays = load_file(FOLDER / "zamba2" / SINGLE)
    embedding = arrays["model.embed_tokens.weight"]
    arrays["model.embed_tokens.weight"] = arrays["lm_head.weight"] = np.concatenate([embedding, embedding[:3]])
    (tmp_path / "config.json").write_text(json.dumps({**values, "vocab_size": len(embedding) + 3}))
    write_shards(tmp_path, arrays, 3)
    return tmp_path


def write_shards(folder, arrays, n: int) -> None:
    """Tensors in n files and their index."""
    parts = [dict(list(arrays.items())[i::n]) for i in range(n)]
    for i, part in enumerate(parts):
        save_file(part, folder / f"part-{i}.safetensors")
    weight_map = {name: f"part-{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


HEADERS = {"config.json": 1, "part-0.safetensors": 1, "part-1.safetensors": 1, "part-2.safetensors": 1, "equals": 1}


def test_from_hf_opens_a_folder_once(tied, counts):
    assert hybridlm.from_hf(tied).config.tie_embeddings
    assert counts == {**HEADERS, "make_plan": 1, "abstract model": 1}


def test_a_run_makes_the_model_and_its_plan_once(tied, counts):
    """`--init.hf` needs no model to find the config; the parameters' loading makes one."""
    config = load_config("continue_from_hf", [f"--init.hf={tied}"]).model
    assert config.tie_embeddings
    assert counts == HEADERS
    counts.clear()
    load.load_params(tied, config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    assert counts == {**HEADERS, "make_plan": 1, "abstract model": 1}


def test_a_config_without_a_tied_output_needs_no_tensors(tmp_path, counts):
    (tmp_path / "config.json").write_text((FOLDER / "llama" / "config.json").read_text())
    assert load_config("continue_from_hf", [f"--init.hf={tmp_path}"]).model.pattern == "*-*-"
    assert counts == {"config.json": 1}


# Files --------------------------------------------------------------------------------------------------------------


def test_a_stale_index_does_not_count(tmp_path):
    """Of an earlier, sharded save: transformers reads model.safetensors, whether the shards are still there or not."""
    arrays = load_file(FOLDER / "llama" / SINGLE)
    (tmp_path / "config.json").write_text((FOLDER / "llama" / "config.json").read_text())
    write_shards(tmp_path, {name: value + 1 for name, value in arrays.items()}, 2)
    save_file(arrays, tmp_path / SINGLE)
    embedding = arrays["model.embed_tokens.weight"]
    np.testing.assert_array_equal(hybridlm.from_hf(tmp_path).embedding[...], embedding)
    (tmp_path / "part-0.safetensors").unlink()
    np.testing.assert_array_equal(hybridlm.from_hf(tmp_path).embedding[...], embedding)


def test_only_what_the_index_lists_counts(tmp_path):
    ones = np.ones(3, np.float32)
    write_shards(tmp_path, {"a": ones, "b": ones}, 2)
    save_file({"a": ones, "b": 2 * ones, "c": ones}, tmp_path / "part-0.safetensors")
    assert {name: entry.open()[0] for name, entry in read_entries(tmp_path).items()} == {"a": 1, "b": 1}


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/x.safetensors", "", 5])
def test_files_outside_of_the_folder_are_not_read(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match=r"weight_map names .*, which is no file of its folder"):
        read_entries(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"weight_map": []}', '{"weight_map": null}', "{", "[" * 100_000])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ConfigError, match=f"{INDEX} (has no weight_map|cannot be read)") as error:
        read_entries(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        None, [], {}, {"dtype": "F32", "shape": [1]}, {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, {"dtype": 3, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, {"dtype": "F32", "shape": [1], "data_offsets": "ab"},
    ],
)  # fmt: skip
def test_a_damaged_header_is_named(tmp_path, spec):
    header = json.dumps({"weight": spec}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConfigError, match=f"{SINGLE} is cut short or damaged at the tensor weight"):
        read_entries(tmp_path)


def test_a_header_that_is_no_object_and_a_pipe(tmp_path):
    (tmp_path / SINGLE).write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ConfigError, match="damaged header"):
        read_entries(tmp_path)
    (tmp_path / SINGLE).unlink()
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(ConfigError, match=f"{SINGLE} is no file"):
        read_entries(tmp_path)


# Keys ---------------------------------------------------------------------------------------------------------------


def opened(tmp_path, name: str, **changes):
    """The opened folder of a golden config.json with other values."""
    values = json.loads((FOLDER / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
    return checkpoint.open_checkpoint(tmp_path)


def test_keys_of_tools_are_ignored_with_one_note(tmp_path, caplog):
    changes = {"unsloth_version": "2026.1", "_commit_hash": "abc", "is_causal": True}
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path, "llama", **changes).stated == checkpoint.open_checkpoint(FOLDER / "llama").stated
        opened(tmp_path, "llama", **changes)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/config.json: ignored, as they say nothing about the model: unsloth_version, _commit_hash"
    ]
    with pytest.raises(ConfigError, match=r"is_causal \(False\) is not supported"):
        opened(tmp_path, "llama", is_causal=False)
    with pytest.raises(ConfigError, match=r"not supported: new_option \(3\)"):
        opened(tmp_path, "llama", new_option=3)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [([0.25, None], (0.25, float("inf"))), ([None, 0.5], (0.0, 0.5)), (None, (0.0, float("inf")))],
)
def test_no_limit_of_dt_may_be_null(tmp_path, limit, expected):
    assert opened(tmp_path, "mamba2", time_step_limit=limit).stated.blocks["M"].dt_limit == expected
    with pytest.raises(ConfigError, match=r"time_step_limit .*must have a lower and an upper limit"):
        opened(tmp_path, "mamba2", time_step_limit=[1])


# Types --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nemotron_h_moe", "jamba"])
@pytest.mark.parametrize("moved", [False, True])
def test_what_is_float32_by_contract_is_written_so(tmp_path, name, moved):
    """Whatever type is asked for, or is the origin's where its tensors are gone."""
    model, like = hybridlm.from_hf(FOLDER / name), None
    if moved:
        like = tmp_path / "like"
        like.mkdir()
        opened(like, name, dtype="bfloat16")
    hybridlm.to_hf(model, tmp_path / "out", like=like, dtype=None if moved else "bfloat16")
    written, published = load_file(tmp_path / "out" / SINGLE), load_file(FOLDER / name / SINGLE)
    words = ("norm", "bias", "A_log", ".D", "conv1d")
    exact = {key for key in written if any(word in key for word in words)}
    assert {key for key, value in written.items() if value.dtype == np.float32} == exact
    assert {value.dtype.name for value in written.values()} == {"float32", "bfloat16"}
    for key in exact:
        np.testing.assert_array_equal(written[key], published[key])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_the_origin_rounds_is_rounded_only_where_nothing_is_lost(tmp_path):
    """A bfloat16 checkpoint, trained on: its matrices stay bfloat16, a changed recurrence parameter is float32 now."""
    import ml_dtypes

    half = {key: value.astype(ml_dtypes.bfloat16) for key, value in load_file(FOLDER / "mamba2" / SINGLE).items()}
    opened(tmp_path, "mamba2", dtype="bfloat16")
    save_file(half, tmp_path / SINGLE)
    model = hybridlm.from_hf(tmp_path)
    changed = model.groups[0][0].mixer.A_log
    changed[...] = changed[...] + 1e-5
    hybridlm.to_hf(model, tmp_path / "out")
    written = load_file(tmp_path / "out" / SINGLE)
    assert {key for key, value in written.items() if value.dtype == np.float32} == {k for k in half if "A_log" in k}


# Families -----------------------------------------------------------------------------------------------------------


def test_a_new_family_is_one_entry(tmp_path, monkeypatch):
    new = replace(llama.FAMILY, model_type="llama_like", architecture="LlamaLikeForCausalLM")
    monkeypatch.setitem(KNOWN, "llama_like", new)
    opened(tmp_path, "llama", model_type="llama_like")
    shutil.copy(FOLDER / "llama" / SINGLE, tmp_path)
    model = hybridlm.from_hf(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(golden("llama")[0]))
    hybridlm.to_hf(model, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("llama_like", ["LlamaLikeForCausalLM"])
