# SPDX-License-Identifier: Apache-2.0
"""RWKV-4: time mixing and channel mixing in turns, each behind a layer norm, as are the embedded tokens.

`rescale_every` halves hidden states now and then, and the weights that add to them: what half precision once needed,
and nothing that the norms would not undo. It is carried along.
"""

from hybridlm.hf.families import common, tables
from hybridlm.hf.family import Family
from hybridlm.hf.keys import Keys
from hybridlm.layers import Rwkv4, Rwkv4Channel
from hybridlm.model.config import ModelConfig

FINAL_EPS = 1e-5
"""Epsilon of the last norm, whatever that of the others is."""


def read(keys: Keys) -> ModelConfig:
    keys.carry("context_length", "rescale_every")
    D = keys("hidden_size", 4096)
    eps = keys("layer_norm_epsilon", 1e-5)
    return ModelConfig(
        **common.widths(keys, "layer_norm_epsilon", 1e-5, 50_277, False),
        norm="layer", norm_bias="all", final_norm_eps=None if eps == FINAL_EPS else FINAL_EPS, embedding_norm=True,
        pattern="Rr" * keys("num_hidden_layers", 32),
        blocks={
            "R": Rwkv4(keys("attention_hidden_size", None) or D),
            "r": Rwkv4Channel(keys("intermediate_size", None) or 4 * D),
        },
    )  # fmt: skip


def write(config: ModelConfig) -> dict:
    return {
        **common.write_widths(config, "layer_norm_epsilon"),
        "attention_hidden_size": common.block(config, Rwkv4).d_inner or config.d_model,
        "intermediate_size": common.block(config, Rwkv4Channel).d_ff,
        "num_hidden_layers": len(config.pattern) // 2,
    }


TIME = {
    "time_mix_key": "mixer.share: 1 1 D -> 0 D",
    "time_mix_value": "mixer.share: 1 1 D -> 1 D",
    "time_mix_receptance": "mixer.share: 1 1 D -> 2 D",
    "key.weight": "mixer.w_in: F D -> D 0 F",
    "value.weight": "mixer.w_in: F D -> D 1 F",
    "receptance.weight": "mixer.w_in: F D -> D 2 F",
    "time_decay": "mixer.decay: F",
    "time_first": "mixer.bonus: F",
    "output.weight": "mixer.w_out: D F -> F D",
}
CHANNEL = {
    "time_mix_key": "mixer.share: 1 1 D -> 0 D",
    "time_mix_receptance": "mixer.share: 1 1 D -> 1 D",
    "key.weight": "mixer.w_in: F D -> D F",
    "receptance.weight": "mixer.w_receptance: E D -> D E",
    "value.weight": "mixer.w_out: D F -> F D",
}
FAMILY = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    top={
        **tables.top("rwkv.embeddings", "rwkv.ln_out", "head"),
        **tables.norm("rwkv.blocks.0.pre_ln", "embedding_norm"),
    },
    layer="rwkv.blocks.{layer}.",
    layers={
        "R": {**tables.norm("ln1"), **tables.at("attention.", TIME)},
        "r": {**tables.norm("ln2"), **tables.at("feed_forward.", CHANNEL)},
    },
)
