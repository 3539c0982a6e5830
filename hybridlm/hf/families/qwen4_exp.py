# SPDX-License-Identifier: Apache-2.0
"""Qwen4-Exp, its text (Qwen Team 2026): Qwen3.5-MoE with several residual streams in the place of one and its norms,
attention to blocks that an index chooses, and hashed n-grams that some layers add to the streams.

Of a checkpoint that sees (`qwen4_exp`) the language model is read, and written as one of text alone. Layers that
predict further tokens are left out.
"""

import string
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hybridlm.hf.families import common, qwen3_5, qwen3_5_moe, qwen3_next, tables
from hybridlm.hf.family import Constant, Family, Table
from hybridlm.hf.keys import Keys
from hybridlm.layers import IndexedAttention, MoE, NgramMemory, Streams
from hybridlm.layers.gated_delta_net import GatedDeltaNet
from hybridlm.model.config import ModelConfig

SYMBOLS = {"linear_attention": "D", "indexed_attention": "*", "full_attention": "*"}
"""Files call attention that has an index full, too."""
MEMORIES = "N" + "".join(symbol for symbol in string.ascii_letters + string.digits if symbol not in "DEN")
"""Symbols of n-gram memories, one for each layer that has one."""
INDEX = ("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim", "indexer_budget", "indexer_compress_ratio")
GATES = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}


def read(keys: Keys) -> ModelConfig:
    keys.carry("number_of_conv_states", "mamba_ssm_dtype", "language_model_only")
    keys.carry("intermediate_size")  # of layers without experts, which there are none of
    keys.derived("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    n_layers, n_experts = keys("num_hidden_layers", 40), keys("num_experts", 512)
    for name in ("rope_parameters", "rope_scaling"):
        if values := keys.values.get(name):
            keys.values[name] = {k: v for k, v in values.items() if k not in ("mrope_section", "mrope_interleaved")}
    activation, renormalise = keys.choose("hidden_act", common.GATED, "silu"), keys("norm_topk_prob", True)
    keys.require(n_experts > 0, f"num_experts ({n_experts}) must be positive")
    blocks = {
        "D": replace(qwen3_next.read_delta(keys), gate=_read_gate(keys)),
        "*": _read_attention(keys),
        "E": qwen3_next.read_experts(keys, activation, n_experts, top_k=10, renormalise=renormalise),
    }
    mixers = common.as_pattern(keys, qwen3_next.read_types(keys, n_layers), SYMBOLS)
    streams = Streams(keys("hc_count", 4), keys("hc_lowrank", 320))
    keys.require(streams.n_streams > 1, f"hc_count ({streams.n_streams}) must be above 1")
    keys.require("*" not in mixers or blocks["*"] is not None, f"layer_types with attention need {', '.join(INDEX)}")
    memories = _read_memories(keys, mixers, streams.n_streams)
    blocks |= {MEMORIES[memory.index]: memory for memory in memories.values()}
    before = {layer: MEMORIES[memory.index] for layer, memory in memories.items()}
    pattern = "".join(before.get(i, "") + mixer + "E" for i, mixer in enumerate(mixers))
    return ModelConfig(
        **common.widths(keys, "rms_norm_eps", 1e-6, 248_320, False, d_model=2048), norm_offset=1.0, streams=streams,
        pattern=pattern, blocks={symbol: blocks[symbol] for symbol in dict.fromkeys(pattern)},
    )  # fmt: skip


def _read_gate(keys: Keys) -> str:
    """Of the linear attention's output: output_gate_type, else hidden_act, which has to be one of gates."""
    given = keys("output_gate_type", None) or keys("hidden_act", "silu")
    keys.require(given in GATES, f"output_gate_type ({given!r}) is not supported: only {', '.join(GATES)}")
    return GATES[given]


def _read_attention(keys: Keys) -> IndexedAttention | None:
    """None where nothing is said of an index."""
    attention, eps = qwen3_next.read_attention(keys, n_kv_heads=2), keys("rms_norm_eps", 1e-6)
    values = {name: keys(name, None) for name in INDEX}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(INDEX):
        return None
    keys.require(not missing, f"of the index, {', '.join(missing)} is missing")
    n_heads, n_keys, width, budget, block = values.values()
    keys.require(n_keys == 1, f"indexer_kv_heads ({n_keys}) is not supported: only 1")
    return IndexedAttention(attention, n_heads, width, budget, block, norm_eps=eps, norm_offset=1.0)


def _read_memories(keys: Keys, mixers: str, n_streams: int) -> dict[int, NgramMemory]:
    """By the layer, counted from 0. Their keys may be there without any."""
    layers = sorted(set(keys.some("ple_layer_ids", [])))
    ends, vocabulary = keys("eos_token_id", None), keys("vocab_size", 248_320)
    end = ends[0] if isinstance(ends, list) and ends else ends
    width = keys.some("ple_embed_dim", keys("hidden_size", 2048))
    sizes = {
        "n": keys("ngram_size", 3), "n_hashes": keys("heads_per_ngram", 8),
        "least_rows": keys("ngram_vocab_size_base", 20_000_000),
        "multiple": keys("make_ngram_vocab_size_divisible_by", 128), "seed": keys("seed", 1234),
        "d_conv": keys("ple_conv_kernel_size", 4), "n_files": keys("split_ngram_parts", 512),
    }  # fmt: skip
    keys.require(len(layers) <= len(MEMORIES), f"ple_layer_ids has {len(layers)} layers: at most {len(MEMORIES)}")
    for layer in layers:
        inside = isinstance(layer, int) and 1 <= layer <= len(mixers)
        keys.require(inside, f"ple_layer_ids ({layer}) must be from 1 to num_hidden_layers ({len(mixers)})")
        linear = mixers[layer - 1] == "D"
        keys.require(linear, f"ple_layer_ids ({layer}) names a layer of attention: it must be linear_attention")
    keys.require(not layers or isinstance(end, int), "ple_layer_ids needs eos_token_id")
    return {
        layer - 1: NgramMemory(
            vocabulary, d_embed=width, index=i, eos_id=end, n_streams=n_streams, norm_eps=keys("rms_norm_eps", 1e-6),
            norm_offset=1.0, **sizes,
        )
        for i, layer in enumerate(layers)
    }  # fmt: skip


def write(config: ModelConfig) -> dict:
    moe, delta = common.block(config, MoE), common.block(config, GatedDeltaNet, GatedDeltaNet())
    indexed = common.block(config, IndexedAttention, False)
    kinds = {GatedDeltaNet: "linear_attention", IndexedAttention: "indexed_attention"}
    layers: list[str] = []
    memories: dict[int, NgramMemory] = {}
    for symbol in config.pattern:
        block = config.blocks[symbol]
        if isinstance(block, NgramMemory):
            memories[len(layers) + 1] = block
        elif type(block) in kinds:
            layers.append(kinds[type(block)])
    streams = config.streams or Streams()
    return {
        **common.write_widths(config, "rms_norm_eps"),
        **qwen3_next.write_attention(indexed.attention if indexed else qwen3_next.read_attention(Keys({}), 2)),
        **qwen3_next.write_delta(delta), "output_gate_type": delta.gate,
        **qwen3_next.write_experts(moe), "norm_topk_prob": moe.router.renormalise,
        "hidden_act": common.name_of(common.GATED, moe.activation),
        "hc_count": streams.n_streams, "hc_lowrank": streams.rank,
        **(_write_index(indexed) if indexed else {}),
        **_write_memories(memories, config),
        "num_hidden_layers": len(layers), "layer_types": layers,
    }  # fmt: skip


def _write_index(block: IndexedAttention) -> dict:
    """The inverse of a part of `_read_attention`."""
    return dict(zip(INDEX, (block.n_index_heads, 1, block.d_index, block.budget, block.block), strict=True))


def _write_memories(memories: dict[int, NgramMemory], config: ModelConfig) -> dict:
    """The inverse of `_read_memories`."""
    if not memories:
        return {"ple_layer_ids": []}
    one = next(iter(memories.values()))
    return {
        "ple_layer_ids": list(memories), "ple_embed_dim": one.d_embed, "ngram_size": one.n,
        "heads_per_ngram": one.n_hashes, "ngram_vocab_size_base": one.least_rows,
        "make_ngram_vocab_size_divisible_by": one.multiple, "seed": one.seed, "ple_conv_kernel_size": one.d_conv,
        "split_ngram_parts": one.n_files, "eos_token_id": one.eos_id,
    }  # fmt: skip


def reader(name: str, path: str) -> dict[str, str]:
    """The table of what reads several streams."""
    return {
        f"{name}.hc_norm.weight": f"{path}.norm: (C D) -> C D",
        f"{name}.input_mix_weight_down.weight": f"{path}.down: R E -> E R",
        f"{name}.input_mix_weight_up.weight": f"{path}.up: E R -> R E",
        f"{name}.block_inject_weight.weight": f"{path}.inject: C E -> E C",
    }


def memory(n_files: int) -> Table:
    """The table of an n-gram memory whose table stands in so many tensors."""
    norms = {f"norm_{of}.weight": f"mixer.norm_{ours}: (C D) -> C D"
             for of, ours in (("key", "k"), ("query", "q"), ("conv", "conv"))}  # fmt: skip
    return {
        "ple.ple_embedding.ngram_embedding.shard_{s}.weight": f"mixer.table: V M -> (s V) M; s is {n_files}",
        "ple.key_proj.weight": "mixer.w_k: E M -> M E",
        "ple.value_proj.weight": "mixer.w_v: D M -> M D",
        "ple.conv1d.weight": "mixer.conv: E 1 W -> E W",
        **tables.at("ple.", norms),
    }


def without_norms(table: Table) -> Table:
    """The table of a layer that has no norms of its own."""
    norms = "input_layernorm", "post_attention_layernorm"
    return {name: spec for name, spec in table.items() if not name.startswith(norms)}


LAYERS = {
    "D": {**reader("attn_hyper_connection", "reader"), **without_norms(qwen3_5_moe.FAMILY.layers["D"])},
    "*": {
        **reader("attn_hyper_connection", "reader"),
        **tables.at("self_attn.", tables.GATED_ATTENTION, "mixer.attention"),
        "self_attn.indexer.index_qk_proj.weight": "mixer.w_index: (J I) D -> D J I",
        "self_attn.indexer.q_layernorm.weight": "mixer.q_norm.weight: I",
        "self_attn.indexer.k_layernorm.weight": "mixer.k_norm.weight: I",
    },
    "E": {**reader("mlp_hyper_connection", "reader"), **without_norms(qwen3_5_moe.FAMILY.layers["E"])},
}


def of_model(config: ModelConfig, published_pattern: str) -> Family:
    """The family with the tables of a model."""
    pairs = zip(published_pattern, config.pattern, strict=True)
    own = {theirs: block for theirs, ours in pairs if isinstance(block := config.blocks[ours], NgramMemory)}
    layers = {**LAYERS, **{symbol: memory(block.n_files) for symbol, block in own.items()}}
    return replace(FAMILY, layers=layers, of_model=None)


def constants(config: ModelConfig) -> Mapping[str, Constant]:
    """The numbers of the hashes."""
    found, layer = {}, 0
    for symbol in config.pattern:
        block = config.blocks[symbol]
        if isinstance(block, NgramMemory):
            numbers = {
                "layer_multipliers": block.multipliers,
                "ngram_heads_vocab_sizes": block.sizes,
                "ngram_heads_offsets": [0, *np.cumsum(block.sizes)[:-1].tolist()],
            }
            for name, values in numbers.items():
                make = lambda values=values: np.array(values, np.int64)
                found[f"model.layers.{layer}.ple.ple_embedding.{name}"] = Constant((len(values),), make, "int64")
        layer += symbol == "E"
    return found


FAMILY = Family(
    model_type="qwen4_exp_text",
    architecture="Qwen4ExpForCausalLM",
    read=read,
    write=write,
    per_layer=2,
    more=MEMORIES,
    top={
        "model.embed_tokens.weight": "embedding: V D",
        **reader("model.hyper_connection_mixer", "norm"),
        "lm_head.weight": "output: V D",
    },
    layers=LAYERS,
    of_model=of_model,
    constants=constants,
    skipped=(
        *qwen3_next.FAMILY.skipped,
        r"\.ple_embedding\.(layer_multipliers|ngram_heads_(offsets|vocab_sizes))$",
    ),
)
SEEING = replace(
    FAMILY,
    model_type="qwen4_exp",
    read=qwen3_5.of_text(read),
    written_as="qwen4_exp_text",
    aliases=(("model.language_model.", "model."),),
    skipped=(*FAMILY.skipped, r"^model\.visual\."),
)
