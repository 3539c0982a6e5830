# SPDX-License-Identifier: Apache-2.0
"""A published family: two functions and tables. docs/contributing/family.md quotes it."""

import json

import numpy as np
import pytest

import hybridlm
from hybridlm.hf import families
from hybridlm.hf.families import common, rope, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import MLP, Attention
from hybridlm.model.config import ModelConfig

pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save_file


def read(keys: Keys) -> ModelConfig:
    """config.json as our config."""
    keys.only("residual_dropout", 0.0)  # any other value is refused by name
    keys.carry("trained_on")  # says nothing about the model; kept for the way back
    attention = Attention(**common.heads(keys, n_heads=8), rope=rope.read(keys, 2048))
    mlp = MLP(keys("ffn_size", 512), keys.choose("activation", common.PLAIN, "relu2"))
    return ModelConfig(
        **common.widths(keys, "norm_eps", 1e-5, 1000, True, d_model=128),
        pattern="*-" * keys("num_layers", 4),
        blocks={"*": attention, "-": mlp},
    )


def write(config: ModelConfig) -> dict:
    """The inverse of `read`."""
    attention, mlp = common.block(config, Attention), common.block(config, MLP)
    return {
        **common.write_widths(config, "norm_eps"),
        **common.write_heads(attention),
        "rope_parameters": rope.write(rope.required(attention)),
        "activation": common.name_of(common.PLAIN, mlp.activation),
        "ffn_size": mlp.d_ff,
        "num_layers": len(config.pattern) // 2,
    }


FAMILY = Family(
    model_type="pebble",
    architecture="PebbleForCausalLM",
    read=read,
    write=write,
    top=tables.top("tokens", "last_norm"),
    layer="blocks.{layer}.",
    per_layer=2,
    layers={
        "*": {"norm1.weight": "norm.weight: D", **tables.at("attention.", tables.ATTENTION)},
        "-": {
            "norm2.weight": "norm.weight: D",
            "ffn.up.weight": "mixer.w_in: F D -> D F",
            "ffn.down.weight": "mixer.w_out: D F -> F D",
        },
    },
)

CONFIG_JSON = {
    "model_type": "pebble", "architectures": ["PebbleForCausalLM"], "hidden_size": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "ffn_size": 24, "num_layers": 2, "vocab_size": 32, "trained_on": "pebbles",
}  # fmt: skip


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(families.KNOWN, "pebble", FAMILY)


@pytest.fixture
def folder(tmp_path):
    """A published checkpoint of the family, of random numbers."""
    rng = np.random.default_rng(0)
    sizes = {"attention.q_proj": (16, 16), "attention.k_proj": (8, 16), "attention.v_proj": (8, 16)}
    sizes |= {"attention.o_proj": (16, 16), "ffn.up": (24, 16), "ffn.down": (16, 24), "norm1": (16,), "norm2": (16,)}
    sizes = {f"blocks.{layer}.{name}": size for layer in range(2) for name, size in sizes.items()}
    sizes |= {"tokens": (32, 16), "last_norm": (16,)}
    published = tmp_path / "published"
    published.mkdir()
    tensors = {f"{name}.weight": rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    save_file(tensors, published / "model.safetensors")
    (published / "config.json").write_text(json.dumps(CONFIG_JSON))
    return published


def test_read_and_written_it_is_the_same_to_the_bit(folder, tmp_path):
    model = hybridlm.from_hf(folder)
    hybridlm.to_hf(model, tmp_path / "out")
    expected, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all((written[name] == expected[name]).all() for name in expected)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["model_type"] == "pebble" and said["trained_on"] == "pebbles" and said["ffn_size"] == 24


def published_logits(tensors: dict, tokens: np.ndarray) -> np.ndarray:
    """[T, V]: what the published implementation computes, in NumPy."""
    weights = {name.removesuffix(".weight"): array.astype(np.float64) for name, array in tensors.items()}

    def normed(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[name]

    def heads(x, name):
        return (x @ weights[name].T).reshape(len(tokens), -1, 4).swapaxes(0, 1)

    def rotated(x):
        angle = np.arange(len(tokens))[:, None] * 10_000.0 ** (-np.arange(2) / 2)
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
        )

    x = weights["tokens"][tokens]
    for at in ("blocks.0.", "blocks.1."):
        q, k, v = (heads(normed(x, f"{at}norm1"), f"{at}attention.{name}_proj") for name in "qkv")
        q, k, v = rotated(q), rotated(k.repeat(2, axis=0)), v.repeat(2, axis=0)
        scores = np.where(np.tri(len(tokens), dtype=bool), q @ k.swapaxes(1, 2) / 2, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        seen = share / share.sum(-1, keepdims=True) @ v
        x = x + seen.swapaxes(0, 1).reshape(len(tokens), -1) @ weights[f"{at}attention.o_proj"].T
        up = np.maximum(normed(x, f"{at}norm2") @ weights[f"{at}ffn.up"].T, 0)
        x = x + up**2 @ weights[f"{at}ffn.down"].T
    return normed(x, "last_norm") @ weights["tokens"].T


def test_logits_are_those_of_the_published_implementation(folder):
    tokens = np.array([3, 1, 4, 1, 5, 9])
    logits_BTV = hybridlm.from_hf(folder, compute_dtype="float32")(tokens[None])
    expected = published_logits(load_file(folder / "model.safetensors"), tokens)
    np.testing.assert_allclose(logits_BTV[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("key, value", [("residual_dropout", 0.1), ("activation", "tanh"), ("sparsity", 4)])
def test_what_it_does_not_know_is_refused_by_name(folder, key, value):
    (folder / "config.json").write_text(json.dumps({**CONFIG_JSON, key: value}))
    with pytest.raises(hybridlm.ConfigError, match=rf"{key} \({value!r}\)"):
        hybridlm.from_hf(folder)
