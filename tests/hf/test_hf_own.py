# SPDX-License-Identifier: Apache-2.0
"""Our own format: models of no published family there and back, refusals of one line, the model card."""

import ast
import json
import re

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import hybridlm
from hybridlm.errors import ConfigError
from hybridlm.hf.card import CARD, OURS, About
from hybridlm.hf.config_json import find_family, nearest, read_values, write_values
from hybridlm.hf.families import own
from hybridlm.hf.plan import make_plan
from hybridlm.layers import MLP, Attention
from hybridlm.model.config import ModelConfig
from tests.hf.own_support import ALL, UNKNOWN, config_of, random_config
from tests.model.model_support import VARIANTS, build, named, small

CODE = ast.parse((own.CODE / "modeling_hybridlm.py").read_text())
NAMES = next(
    ast.literal_eval(node.value)
    for node in CODE.body
    if isinstance(node, ast.Assign) and node.targets[0].id == "FLOAT32"
)
FLOAT32 = re.compile("|".join(rf"\b{name}\b" for name in NAMES))
"""Of names of parameters that the PyTorch code has in float32."""
LINE = 200
"""Most characters of a refusal."""


@pytest.fixture(scope="module")
def model():
    """One with weights that depths share, branches, and an MLP."""
    return build(config_of("composed"))


@pytest.mark.parametrize("config", [*map(config_of, ALL), *map(random_config, range(30))], ids=lambda _: "")
def test_configs_and_names_there_and_back(config):
    """config.json through JSON is read as the same model, and the tables hold every number exactly once."""
    values, published = write_values(own.FAMILY, config)
    again = read_values(own.FAMILY, json.loads(json.dumps(values, allow_nan=False, sort_keys=True)))
    assert again == published
    for symbol in set(config.pattern):
        assert again.blocks[symbol] == config.blocks[symbol].resolved(16)
    plan = make_plan(own.FAMILY, config, config.pattern)
    for name, tensor in plan.tensors.items():
        kinds = {plan.infos[part.path].kind for part in tensor.pieces}
        if kinds & {"norm", "recurrence", "conv", "sink"}:
            assert FLOAT32.search(name), f"{name} ({kinds}) is read in the type of the matrices"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_there_and_back(model, tmp_path, dtype):
    hybridlm.to_hf(model, tmp_path / "out", dtype=dtype)
    again = hybridlm.from_hf(tmp_path / "out")
    expected, found = named(nnx.state(model, nnx.Param)), named(nnx.state(again, nnx.Param))
    assert expected.keys() == found.keys()
    plan = make_plan(own.FAMILY, model.config, model.config.pattern)
    for path, value in expected.items():
        if dtype == "bfloat16" and not plan.is_float32(path):
            value = value.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    hybridlm.to_hf(again, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", CARD, *(f.name for f in own.CODE.glob("*_hybridlm.py"))}
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["auto_map"] == own.AUTO_MAP and said["dtype"] == dtype


def test_what_belongs_to_a_family_is_written_as_that():
    config = ModelConfig(32, 16, "*-", {"*": Attention(2, d_head=8), "-": MLP(8)})
    assert find_family(config).model_type == "llama"
    tiny = hybridlm.load_config("hybrid_tiny").model
    assert find_family(tiny) is own.FAMILY
    family, field = nearest(tiny)
    assert (family, field) == ("bamba", "blocks.*.qk_norm is True where False would be read")


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_block_that_the_format_has_not(name):
    config = small("X-", {"X": VARIANTS[name], "-": VARIANTS["mlp"]})
    with pytest.raises(ConfigError, match=type(VARIANTS[name]).__name__) as error:
        find_family(config)
    assert "\n" not in str(error.value) and len(str(error.value)) <= LINE


def test_refusals_name_the_nearest_family_and_a_field():
    config = small("M*", {"M": VARIANTS["mamba2"], "*": VARIANTS["gated"]}, prefix_tokens=2)
    with pytest.raises(ConfigError, match=r"\(nearest: \w+, but .+ would be read\); .*model\.prefix_tokens") as error:
        find_family(config)
    assert len(str(error.value)) <= LINE
    with pytest.raises(ConfigError, match=r"blocks\.\*\.direction|is bidirectional"):
        write_values(own.FAMILY, small("*", {"*": VARIANTS["both_ways"]}))


def test_a_family_that_is_asked_for(tmp_path):
    config = small("*-", {"*": Attention(2, d_head=8, gate="head"), "-": MLP(8)})
    model = build(config)
    with pytest.raises(ConfigError, match=r"llama cannot .*gate is head where None .*; family hybridlm can") as error:
        hybridlm.to_hf(model, tmp_path / "out", family="llama")
    assert len(str(error.value)) <= LINE and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pattern": 3}, "pattern"),
        ({"pattern": "x?"}, r"blocks has no '\?'"),
        ({"blocks": []}, "blocks"),
        ({"blocks": {"x": {"type": "Nothing"}}}, "Nothing"),
        ({"blocks": {"x": {"type": "MLP", "d_ff": 4, "wings": 2}}}, "wings"),
        ({"blocks": {"x": {"type": "MLP", "d_ff": -4}}}, r"d_ff \(-4\)"),
        ({"blocks": {"x": {"type": "Attention", "rope": "yes"}}}, "rope"),
        ({"blocks": {"x": {"type": "Parallel", "branches": {"a": 1}}}}, "branches"),
        ({"blocks": {"x": {"type": "Bidirectional"}}}, "Bidirectional"),
        ({"normed_residual": {"x": 3}}, "normed_residual"),
        ({"invented": 3}, "invented"),
        ({"hidden_size": None}, "hidden_size|d_model"),
    ],
)
def test_config_json_from_elsewhere(change, says):
    good = {
        "model_type": "hybridlm",
        "vocab_size": 8,
        "hidden_size": 4,
        "pattern": "x",
        "blocks": {"x": {"type": "MLP"}},
    }
    assert read_values(own.FAMILY, good).blocks == {"x": MLP()}
    with pytest.raises(ConfigError, match=says) as error:
        read_values(own.FAMILY, {**good, **change})
    assert "\n" not in str(error.value)


def test_the_code_stands_alone():
    """It imports torch, transformers, Python's own and itself; its classes are those that the tables know."""
    files = own.code(config_of("mambas"))
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2
                names = [] if node.level else [node.module]
                assert not node.level or f"{node.module}.py" in files, name
            for module in names:
                assert module.split(".")[0] in ("torch", "transformers", "math", "typing"), f"{name}: {module}"
    index = ast.parse(files["mixers_hybridlm.py"])
    table = next(node.value for node in ast.walk(index) if isinstance(node, ast.Assign))
    assert {key.value for key in table.keys} == {kind.__name__ for kind in own.KINDS}


def test_the_model_card(model, tmp_path):
    out = tmp_path / "a|b`c"
    about = About(
        training={"data": "x|y <script> *z*", "steps": "1,000"}, versions={"jax": "1.2"}, command="train `x` ```\n# hi",
        license="mit",
    )  # fmt: skip
    hybridlm.to_hf(model, out, about=about)
    card = (out / CARD).read_text()
    top = card.split("---")[1]
    assert 'license: "mit"' in top and 'library_name: "transformers"' in top and "custom_code" in top
    assert r"| data | x\|y \<script\> \*z\* |" in card and "trust_remote_code=True" in card
    assert "\n````sh\ntrain `x` ```\n# hi\n````\n" in card
    assert r"# a\|b\`c" in card and "With jax 1.2." in card and OURS in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
    (out / CARD).write_text("mine\n")
    hybridlm.to_hf(model, out, overwrite=True)
    assert (out / CARD).read_text() == "mine\n"


def test_a_license_is_taken_from_the_folder_that_a_model_came_from(model, tmp_path):
    hybridlm.to_hf(model, tmp_path / "first")
    assert "license" not in (tmp_path / "first" / CARD).read_text()
    (tmp_path / "first" / CARD).write_text("---\nlicense: Apache-2.0\ntags:\n- x\n---\n\nlicense: gpl\n")
    hybridlm.to_hf(hybridlm.from_hf(tmp_path / "first"), tmp_path / "second")
    assert 'license: "apache-2.0"' in (tmp_path / "second" / CARD).read_text()
