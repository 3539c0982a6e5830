# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints (tests/golden: tiny, random, with the outputs of the published implementations) as models.

`layer_weights` says for each published tensor of a layer where its pieces live: (offset of the sublayer in the layer,
parameter, index in it, rows of the tensor). A published matrix is [out, in]; ours are its transpose, reshaped.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from hybridlm.config import MLP, Attention, GatedNorm, Mamba2, ModelConfig, Rope
from hybridlm.model import HybridLM
from hybridlm.pattern import places

FOLDER = Path(__file__).parent.parent / "golden"
FAMILIES = ("llama", "qwen2", "qwen3", "mamba2")
ALL = slice(None)


def read(family: str) -> tuple[dict, dict, dict, dict]:
    """config.json, tensors, golden arrays, meta.json."""
    folder = FOLDER / family
    texts = [json.loads((folder / name).read_text()) for name in ("config.json", "meta.json")]
    return texts[0], load_file(folder / "model.safetensors"), dict(np.load(folder / "golden.npz")), texts[1]


def model_config(hf: dict) -> ModelConfig:
    """The published config as ours, float32."""
    common = {"vocab_size": hf["vocab_size"], "d_model": hf["hidden_size"], "compute_dtype": "float32"}
    common["tie_embeddings"] = hf["tie_word_embeddings"]
    n_layers = hf["num_hidden_layers"]
    if hf["model_type"] == "mamba2":
        low, high = (value if isinstance(value, float) else float("inf") for value in hf["time_step_limit"])
        block = Mamba2(
            d_state=hf["state_size"], d_head=hf["head_dim"], n_heads=hf["num_heads"], n_groups=hf["n_groups"],
            d_conv=hf["conv_kernel"], conv_bias=hf["use_conv_bias"], proj_bias=hf["use_bias"], dt_limit=(low, high),
            gated_norm=GatedNorm(eps=hf["layer_norm_epsilon"]), chunk=hf["chunk_size"],
        )  # fmt: skip
        return ModelConfig(pattern="M" * n_layers, blocks={"M": block}, norm_eps=hf["layer_norm_epsilon"], **common)
    family, eps = hf["model_type"], hf["rms_norm_eps"]
    attention = Attention(
        n_heads=hf["num_attention_heads"], n_kv_heads=hf["num_key_value_heads"],
        d_head=hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"]),
        rope=Rope(hf["rope_parameters"]["rope_theta"]), qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
        qk_norm_eps=eps,
    )  # fmt: skip
    blocks = {"*": attention, "-": MLP(hf["intermediate_size"], "swiglu")}
    return ModelConfig(pattern="*-" * n_layers, blocks=blocks, norm_eps=eps, **common)


def layer_weights(config: ModelConfig) -> dict[str, list[tuple[int, str, object, slice]]]:
    """The table that the module docstring describes."""
    block = config.blocks[config.pattern[0]]
    if isinstance(block, Mamba2):
        d_inner = block.heads(config.d_model) * block.d_head
        BC = 2 * block.n_groups * block.d_state
        zx, dt = slice(2 * d_inner), slice(2 * d_inner + BC, None)
        conv = {"x": slice(d_inner), "BC": slice(d_inner, None)}
        table = {
            "norm.weight": [(0, "norm.weight", ALL, ALL)],
            "mixer.in_proj.weight": [
                (0, "mixer.in_zx", ALL, zx),
                (0, "mixer.in_BC", ALL, slice(2 * d_inner, 2 * d_inner + BC)),
                (0, "mixer.in_dt", ALL, dt),
            ],
            "mixer.conv1d.weight": [(0, f"mixer.conv_{n}", ALL, rows) for n, rows in conv.items()],
            "mixer.conv1d.bias": [(0, f"mixer.conv_{n}_bias", ALL, rows) for n, rows in conv.items()],
            "mixer.norm.weight": [(0, "mixer.norm", ALL, ALL)],
            "mixer.out_proj.weight": [(0, "mixer.out", ALL, ALL)],
        }
        return table | {f"mixer.{n}": [(0, f"mixer.{n}", ALL, ALL)] for n in ("dt_bias", "A_log", "D")}
    table = {
        "input_layernorm.weight": [(0, "norm.weight", ALL, ALL)],
        "post_attention_layernorm.weight": [(1, "norm.weight", ALL, ALL)],
        "mlp.gate_proj.weight": [(1, "mixer.w_in", (ALL, 0), ALL)],
        "mlp.up_proj.weight": [(1, "mixer.w_in", (ALL, 1), ALL)],
        "mlp.down_proj.weight": [(1, "mixer.w_out", ALL, ALL)],
    }
    for letter in "qkvo":
        table[f"self_attn.{letter}_proj.weight"] = [(0, f"mixer.w_{letter}", ALL, ALL)]
        if block.qkv_bias and letter != "o":
            table[f"self_attn.{letter}_proj.bias"] = [(0, f"mixer.b_{letter}", ALL, ALL)]
        if block.qk_norm and letter in "qk":
            table[f"self_attn.{letter}_norm.weight"] = [(0, f"mixer.{letter}_norm.weight", ALL, ALL)]
    return table


TOP = {
    "model.embed_tokens.weight": "embedding",
    "backbone.embeddings.weight": "embedding",
    "model.norm.weight": "norm.weight",
    "backbone.norm_f.weight": "norm.weight",
    "lm_head.weight": "output",
}


def pieces(config: ModelConfig, name: str) -> list[tuple[str, object, slice]]:
    """Where a published tensor's rows go: (path of the parameter, index in it, rows)."""
    if name in TOP:
        return [(TOP[name], ALL, ALL)]
    layer, tail = name.split("layers.")[1].split(".", 1)
    per_layer = len(set(config.pattern))
    found = []
    for offset, path, index, rows in layer_weights(config)[tail]:
        place = places(config.pattern)[int(layer) * per_layer + offset]
        index = index if isinstance(index, tuple) else (index,)
        found.append((f"groups.{place.group}.{place.position}.{path}", (place.repeat, *index), rows))
    return found


def load(family: str) -> tuple[HybridLM, dict, dict]:
    """The model with the published weights, the golden arrays, meta.json."""
    hf, tensors, golden, meta = read(family)
    config = model_config(hf)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))
    params = {
        ".".join(map(str, path)): np.full(leaf.shape, np.nan, np.float32) for path, leaf in nnx.to_flat_state(shapes)
    }
    for name, tensor in tensors.items():
        for path, index, rows in pieces(config, name):
            target, part = params[path][index], tensor[rows]
            if part.ndim == 2 and name not in TOP:
                part = part.T
            params[path][index] = part.reshape(target.shape)
    assert all(np.isfinite(value).all() for value in params.values())
    flat = [
        (path, leaf.replace(jnp.asarray(params[".".join(map(str, path))]))) for path, leaf in nnx.to_flat_state(shapes)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(flat)), golden, meta


def gradient_norm(config: ModelConfig, grads: dict[str, np.ndarray], name: str) -> float:
    """L2 norm of the gradient of a published tensor."""
    parts = [np.linalg.norm(grads[path][index]) for path, index, _ in pieces(config, name)]
    return float(np.linalg.norm(parts))
