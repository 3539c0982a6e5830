# SPDX-License-Identifier: Apache-2.0
"""Published folders from elsewhere: what is not a file of theirs is not read, and what a key must be is said."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import hybridlm
from hybridlm import ConfigError
from hybridlm.cli import main
from hybridlm.hf import checkpoint, swap
from hybridlm.hf.save import copy_tokenizer
from tests.faults.mutations import Sound
from tests.hf.hf_support import FOLDER, golden

SINGLE = "model.safetensors"


@pytest.fixture
def copy(tmp_path):
    """A copy of a golden checkpoint with a tokenizer file."""
    folder = tmp_path / "published"
    shutil.copytree(FOLDER / "llama", folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Sound(tmp_path_factory.mktemp("sound"))


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# What is not followed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", SINGLE, "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["out", "in", "device", "nothing", "loop", "pipe"])
def test_links_and_pipes_are_named_and_not_read(copy, tmp_path, name, kind):
    file, other = copy / name, tmp_path / "other"
    shutil.copy(file, other)
    shutil.copy(file, copy / "beside")
    file.unlink()
    targets = {"out": other, "in": copy / "beside", "device": "/dev/zero", "nothing": copy / "none", "loop": file}
    os.mkfifo(file) if kind == "pipe" else file.symlink_to(targets[kind])
    with pytest.raises(ConfigError) as error:
        copy_tokenizer(copy, tmp_path) if "tokenizer" in name else hybridlm.from_hf(copy)
    assert str(file) in one_line(error) and ("is a link" in str(error.value) or "is no file" in str(error.value))


def test_a_snapshot_of_the_hub_cache_is_read(copy, tmp_path):
    """There, every file is a link to a blob of the repository, and only such links are followed."""
    repository = tmp_path / "models--some--model"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate((copy / "config.json", copy / SINGLE)):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert hybridlm.from_hf(snapshot).config == golden("llama")[0].config
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(copy / "config.json")
    with pytest.raises(ConfigError, match="is a link"):
        hybridlm.from_hf(snapshot)


# Keys ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("llama", "hidden_size", "64", "hidden_size ('64') must be a number"),
        ("llama", "hidden_size", 32.0, "hidden_size (32.0)"),
        ("llama", "hidden_size", None, "hidden_size (None)"),
        ("llama", "num_hidden_layers", 10**12, "num_hidden_layers (1000000000000) must be a number of at most 10000"),
        ("llama", "rms_norm_eps", float("nan"), "rms_norm_eps (nan) must be a number"),
        ("llama", "vocab_size", True, "vocab_size (True) must be a number"),
        ("llama", "attention_bias", "no", "attention_bias ('no') must be true or false"),
        ("llama", "rope_parameters", "x", "rope_parameters"),
        ("llama", "dtype", 3, "dtype (3) must be a text"),
        ("mamba2", "time_step_limit", [1], "time_step_limit"),
        ("mamba2", "state_size", -3, "state_size (-3)"),
        ("mamba2", "time_step_min", "x", "time_step_min ('x') must be a number"),
        ("jamba", "attn_layer_period", 0, "attn_layer_period"),
        ("nemotron_h", "layers_block_type", 5, "layers_block_type"),
        ("granitemoehybrid", "logits_scaling", 0, "logits_scaling (0)"),
        ("zamba2", "num_mem_blocks", None, "num_mem_blocks"),
        ("falcon_h1", "ssm_multipliers", [1.0], "ssm_multipliers"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_names_its_key(tmp_path, name, key, value, said):
    values = json.loads((FOLDER / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, key: value}))
    with pytest.raises(ConfigError) as error:
        checkpoint.open_checkpoint(tmp_path)
    assert said in one_line(error) and str(error.value).startswith(f"{tmp_path}/config.json: ")


def test_tensors_that_lie_in_each_other_and_headers_without_end(copy):
    places = {"a": [0, 8], "b": [4, 12]}
    header = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in places.items()})
    raw = len(header).to_bytes(8, "little") + header.encode() + bytes(12)
    (copy / SINGLE).write_bytes(raw)
    with pytest.raises(ConfigError, match="damaged at the tensor b: it lies in another one"):
        hybridlm.from_hf(copy)
    (copy / SINGLE).write_bytes((2**63).to_bytes(8, "little") + raw[8:])
    with pytest.raises(ConfigError, match="is cut short or no safetensors file"):
        hybridlm.from_hf(copy)


# Without a tokenizer ------------------------------------------------------------------------------------------------


def test_without_a_tokenizer_one_is_asked_for(sound, copy, tmp_path, capsys):
    """A model of more than bytes is never read as one of bytes without a word."""
    values = json.loads((copy / "config.json").read_text())
    from safetensors.numpy import load_file, save_file

    rows = np.zeros((600, 32), np.float32)
    tensors = load_file(copy / SINGLE) | dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), rows)
    save_file(tensors, copy / SINGLE)
    (copy / "config.json").write_text(json.dumps({**values, "vocab_size": 600}))
    run, tokenizer = tmp_path / "run", sound.folder / "tokenizer"
    assert main(["convert", "from-hf", str(copy), str(run)]) == 0
    assert "has no tokenizer.json: give --data.tokenizer=PATH" in capsys.readouterr().out
    write = ["generate", "--run", str(run), "--prompt", "a", "--max-new-tokens", "2"]
    assert main(write) == 2
    assert "give --data.tokenizer=PATH" in capsys.readouterr().err
    assert main([*write, f"--data.tokenizer={tokenizer}"]) == 0
    train = ["train", "--config", str(sound.config), f"--init.hf={copy}", f"--run.dir={tmp_path}/trained"]
    train += ["--data.batch_size=16"]
    assert main(train) == 2
    assert "give --data.tokenizer=PATH" in capsys.readouterr().err
    given = tmp_path / "given"
    assert main(["convert", "from-hf", str(copy), str(given), f"--data.tokenizer={tokenizer}"]) == 0
    assert main(["generate", "--run", str(given), "--prompt", "a", "--max-new-tokens", "2"]) == 0


# Exports ------------------------------------------------------------------------------------------------------------


def content(folder) -> dict:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_an_export_takes_the_place_of_the_old_one_and_leaves_the_rest(tmp_path):
    model, out = golden("llama")[0], tmp_path / "out"
    hybridlm.to_hf(model, out, max_shard_bytes=30_000)
    (out / "README.md").write_text("mine")
    (out / "more").mkdir()
    (out / "more" / "notes").write_text("mine, too")
    (out / "link").symlink_to("README.md")
    hybridlm.to_hf(model, out, overwrite=True)
    assert sorted(f.name for f in out.iterdir()) == ["README.md", "config.json", "link", SINGLE, "more"]
    assert (out / "more" / "notes").read_text() == "mine, too" and (out / "link").is_symlink()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]


def test_files_of_others_are_not_replaced_unless_told(copy, tmp_path):
    model, out = golden("llama")[0], tmp_path / "out"
    for name in ("config.json", "tokenizer_config.json"):
        out.mkdir()
        (out / name).write_text("{}")
        with pytest.raises(ConfigError, match=f"{name} already: overwrite it"):
            hybridlm.to_hf(model, out, like=copy)
        assert content(out) == {name: b"{}"}
        hybridlm.to_hf(model, out, like=copy, overwrite=True)
        shutil.rmtree(out)


@pytest.mark.parametrize("way", ["exchange", "two renames", "in place"])
def test_a_failure_leaves_the_old_export(tmp_path, monkeypatch, way):
    model, out = golden("llama")[0], tmp_path / "out"
    hybridlm.to_hf(model, out)
    before = content(out)
    if way == "two renames":
        monkeypatch.setattr(swap, "_exchanged", lambda a, b: False)
    if way == "in place":
        monkeypatch.setattr("pathlib.Path.is_mount", lambda path: True)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("hybridlm.hf.save.save_json", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(OSError, match=f"No space left on device; what was in {out} is untouched") as error:
            hybridlm.to_hf(model, out, overwrite=True, max_shard_bytes=30_000)
    assert error.value.filename.startswith(str(out))
    one_line(error)
    assert {k: v for k, v in content(out).items() if k in before} == before
    assert hybridlm.from_hf(out).config == model.config
    hybridlm.to_hf(model, out, overwrite=True, max_shard_bytes=30_000)
    assert hybridlm.from_hf(out).config == model.config
    assert SINGLE not in content(out) and len(list(tmp_path.iterdir())) == 1


KILLED = """
import os, signal, sys
sys.path.insert(0, "{root}")
from hybridlm.hf import swap
real = swap._exchange
def killed(new, folder):
    if "{moment}" == "after":
        real(new, folder)
    os.kill(os.getpid(), signal.SIGKILL)
swap._exchange = killed
from pathlib import Path
with swap.replaced(Path("{folder}"), lambda name: name == "old") as new:
    (new / "new").write_text("new")
"""


@pytest.mark.parametrize(("moment", "left"), [("before", ["kept", "old"]), ("after", ["kept", "new"])])
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path, moment, left):
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("old", "kept"):
        (folder / name).write_text(name)
    code = KILLED.format(root=FOLDER.parent.parent, moment=moment, folder=folder)
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert sorted(f.name for f in folder.iterdir()) == left
    with swap.replaced(folder, lambda name: name in ("old", "new")) as new:
        (new / "newer").write_text("")
    assert sorted(f.name for f in folder.iterdir()) == ["kept", "newer"]
    assert [f.name for f in tmp_path.iterdir()] == ["export"]  # what the killed one had left is gone
