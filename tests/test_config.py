# SPDX-License-Identifier: Apache-2.0
"""Configs: every named one loads, overrides reach every leaf, and mistakes end in one line that says what to change."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm import ConfigError, load_config
from hybridlm.config import Attention, Config, Llama3, Rope, YaRN
from hybridlm.config.find import config_names
from hybridlm.config.help import help_text
from hybridlm.config.keys import leaf_paths
from hybridlm.config.overrides import override
from hybridlm.config.stored import differences, from_dict
from hybridlm.config.tree import to_dict
from hybridlm.sharding import MESH_AXES, MeshConfig

NAMES = ["hybrid_125m", "hybrid_1b", "hybrid_8b", "hybrid_tiny", "mamba2_1b", "transformer_1b"]
pytestmark = pytest.mark.quick


def test_names_are_those_of_the_folder():
    assert [n for n in config_names() if n in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name):
    config = load_config(name)
    assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False))) == config
    assert config.name == name


def test_round_trip_of_nested_variants():
    config = Config()
    rope = Rope(scaling=Llama3(factor=4.0))
    new = {"*": Attention(rope=rope), "Y": Attention(rope=Rope(scaling=YaRN())), "N": Attention(rope=None)}
    blocks = config.model.blocks | new
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, blocks=blocks))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.d_model=512"], {"model.d_model": 512}),
        (["--model.d-model", "512"], {"model.d_model": 512}),
        (["model.d_model=512", "optim.lr=3e-4"], {"model.d_model": 512, "optim.lr": 3e-4}),
        (["--model.blocks.M.d_state=256"], {"model.blocks.M.d_state": 256}),
        (
            ["--model.blocks.-.d_ff=96", "--model.blocks.*.window", "64"],
            {"model.blocks.-.d_ff": 96, "model.blocks.*.window": 64},
        ),
        (["--model.blocks.M.dt_limit", "0", "inf"], {}),
        (["--model.blocks.M.dt_limit", "0.01", "1"], {"model.blocks.M.dt_limit": (0.01, 1.0)}),
        (["--mesh.data=-1", "--mesh.fsdp=8"], {"mesh.fsdp": 8}),
        (["--data.path=texts/*.jsonl"], {"data.path": ("texts/*.jsonl",)}),
        (["--data.path", "a.txt", "b.txt"], {"data.path": ("a.txt", "b.txt")}),
        (["--optim.clip_norm=None"], {"optim.clip_norm": None}),
        (["--run.tensorboard=false"], {"run.tensorboard": False}),
        (["--data.seq_len=65_536"], {"data.seq_len": 65_536}),
        ({"model.d_model": 512, "data.path": ["a", "b"]}, {"model.d_model": 512, "data.path": ("a", "b")}),
        (["--model.blocks.*.rope=None"], {"model.blocks.*.rope": None}),
        (
            ["--model.blocks.*.rope.scaling.factor=2", "--model.blocks.*.rope.scaling=YaRN"],
            {"model.blocks.*.rope.scaling": YaRN(factor=2)},
        ),
        (["--model.blocks.W.window=7", "--model.blocks.W=Attention"], {"model.blocks.W": Attention(window=7)}),
    ],
)  # fmt: skip
def test_overrides(words, expected):
    base = load_config("hybrid_125m")
    changed = {k: new for k, (_, new) in differences(base, override(base, words)).items()}
    assert changed == {k: v for k, v in expected.items()}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model.d_modl=3"], ["--model.d_modl", "did you mean --model.d_model?"]),
        (["--lr=1"], ["--lr", "--optim.lr"]),
        (["--optim.lr=abc"], ["--optim.lr", "'abc'", "number"]),
        (["--optim.lr=nan"], ["--optim.lr", "nan"]),
        (["--data.batch_size=3.5"], ["--data.batch_size", "'3.5'", "whole number"]),
        (["--data.batch_size=0"], ["data.batch_size (0)"]),
        (["--model.d_model"], ["--model.d_model", "needs a value"]),
        (["--model.blocks.*.n_kv_heads=5"], ["model.blocks.*", "n_heads (12)", "n_kv_heads (5)"]),
        (["--model.pattern=MQ-"], ["'Q'", "model.blocks", "M * -"]),
        (["--model.pattern="], ["model.pattern"]),
        (["--model.d_model=100"], ["model.blocks.M", "200", "d_head (64)"]),
        (["--model.blocks.*.gate=both"], ["--model.blocks.*.gate", "elementwise", "head", "None"]),
        (["--model.blocks.M=Mamba"], ["--model.blocks.M", "'Mamba'", "Mamba2, Attention, MLP"]),
        (["--optim.accumulate=3"], ["data.batch_size (32)", "optim.accumulate (3)"]),
        (["--mesh.fsdp=-1"], ["mesh", "only one axis"]),
        (["--model.blocks.M.dt_limit=3"], ["--model.blocks.M.dt_limit", "2 values"]),
        (["--model=3"], ["--model", "--model.FIELD"]),
        (["stray"], ["'stray'"]),
    ],
)
def test_mistakes_are_one_line(words, parts):
    with pytest.raises(ConfigError) as error:
        load_config("hybrid_125m", words)
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_unknown_name_lists_the_known():
    said = r"no config named 'hybrid_tinny': did you mean hybrid_tiny.*--help lists all"
    with pytest.raises(ConfigError, match=said):
        load_config("hybrid_tinny")


def test_config_file_by_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from hybridlm.config import Config\ndef config(): return Config(name='mine')\n")
    assert load_config(str(path), ["--run.steps=7"]).run.steps == 7
    path.write_text("def config(): return 3\n")
    with pytest.raises(ConfigError, match=r"mine\.py: config\(\) returned int"):
        load_config(str(path))
    path.write_text("def config(): return undefined\n")
    with pytest.raises(ConfigError, match=r"mine\.py: NameError"):
        load_config(str(path))
    with pytest.raises(ConfigError, match="no config file"):
        load_config(str(tmp_path / "absent.py"))


def test_help_names_every_leaf():
    config = load_config("hybrid_1b")
    text = help_text(config, "train.py")
    assert [p for p in leaf_paths(config) if f"--{p} " not in text] == []


@given(st.text(alphabet="MX*-d_model.=1 \n", max_size=20))
def test_no_word_ends_in_anything_but_a_config_or_one_line(word):
    try:
        load_config("hybrid_tiny", ["--" + word])
    except ConfigError as error:
        assert "\n" not in str(error)


def test_sizes_of_a_config_file(tmp_path, monkeypatch):
    file = tmp_path / "configs" / "ladder.py"
    file.parent.mkdir()
    file.write_text(
        "from hybridlm.config import Config, ModelConfig\n"
        "SIZES = {'s': 64, '1.5b-deep': 128}\n"
        "def config(size):\n    return Config(name=f'ladder_{size}', model=ModelConfig(d_model=SIZES[size]))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert {"ladder:s", "ladder:1.5b-deep"} < set(config_names())
    assert load_config("ladder:1.5b-deep").model.d_model == 128
    assert load_config(f"{file}:s").name == "ladder_s"
    for name, message in {
        "ladder": r"size \(none\) must be one of s, 1.5b-deep: ladder:s",
        "ladder:m": r"size \(m\) must be one of s, 1.5b-deep: ladder:s",
        "hybrid_tiny:s": r"size \(s\) is given, but this config has no sizes",
        "lader:s": "no config named 'lader:s': did you mean ladder:s",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_config(name)


def test_mesh_axes_are_the_fields_of_the_mesh():
    """A field without a rule would split nothing, in silence; the order is that in which devices are laid out."""
    assert MESH_AXES == ("slice", "data", "fsdp", "expert", "context", "tensor")
    assert set(MESH_AXES) == {field.name for field in dataclasses.fields(MeshConfig)}
