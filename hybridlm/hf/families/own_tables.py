# SPDX-License-Identifier: Apache-2.0
"""The tables of our own format: the weights of each block's mixer, under the names of the class of the block's name in
`hybridlm/hf/torch_code`."""

from collections.abc import Callable
from typing import Any

from hybridlm.hf.families import own_rwkv, tables
from hybridlm.hf.family import Table
from hybridlm.layers import (
    MLP,
    MLSTM,
    RGLRU,
    SLSTM,
    Attention,
    Block,
    ChannelDecay,
    ChannelMix,
    ConvolvedAttention,
    DepthMoE,
    GatedConv,
    GatedDeltaNet,
    GatedScan,
    HeadDecay,
    Hyena,
    KimiDelta,
    LatentAttention,
    LinearAttention,
    Mamba1,
    Mamba2,
    Mamba3,
    MemoryAsContext,
    MoE,
    OutputConv,
    Parallel,
    RelativeAttention,
    Rwkv4,
    Rwkv4Channel,
    Rwkv6,
    Rwkv7,
    Shared,
    Titans,
)


def _attention(block: Attention) -> Table:
    table = {**tables.ATTENTION, "sinks": "mixer.sinks: H"}
    of_head = block.gate == "head"
    table["gate_proj.weight"] = "mixer.w_gate: H D -> D H" if of_head else "mixer.w_gate: (H P) D -> D H P"
    table["gate_proj.bias"] = "mixer.b_gate: H" if of_head else "mixer.b_gate: (H P) -> H P"
    if block.qk_norm_over == "all":
        table["q_norm.weight"] = "mixer.q_norm.weight: (H P) -> H P"
        table["k_norm.weight"] = "mixer.k_norm.weight: (K P) -> K P"
    return table


def _mamba2(block: Mamba2) -> Table:
    return {**tables.MAMBA2, "D": "mixer.D: (H P) -> H P"} if block.per_channel_D else tables.MAMBA2


def _mamba1(block: Mamba1) -> Table:
    kept = ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias", "out_proj.weight", "out_proj.bias")
    return {
        **{name: tables.MAMBA1[name] for name in kept},
        "x_proj": "mixer.x_proj: H R P -> P H R",
        "dt_proj": "mixer.dt_proj: H P R -> R H P",
        "dt_bias": "mixer.dt_bias: H P",
        "A_log": "mixer.A_log: H P N",
        "D": "mixer.D: H P",
        "norms.0.weight": "mixer.dt_norm.weight: R",
        "norms.1.weight": "mixer.B_norm.weight: N",
        "norms.2.weight": "mixer.C_norm.weight: N",
    }


def _delta(block: GatedDeltaNet) -> Table:
    return {
        "q_proj.weight": "mixer.in_q: (G N) D -> D G N",
        "k_proj.weight": "mixer.in_k: (G N) D -> D G N",
        "v_proj.weight": "mixer.in_v: (H P) D -> D H P",
        "z_proj.weight": "mixer.in_z: (H P) D -> D H P",
        "b_proj.weight": "mixer.in_ba: H D -> D 0 H",
        "a_proj.weight": "mixer.in_ba: H D -> D 1 H",
        **tables.CONV_QKV,
        "A_log": "mixer.A_log: H",
        "dt_bias": "mixer.dt_bias: H",
        "o_norm.weight": "mixer.norm: P",
        "o_proj.weight": "mixer.out: D (H P) -> H P D",
    }


def _kimi(block: KimiDelta) -> Table:
    table = {**tables.KIMI_DELTA, "A_log": "mixer.A_log: H"}
    for name, ours, rank in (("f_proj", "decay", block.decay_rank), ("g_proj", "gate", block.gate_rank)):
        if rank is None:
            table[f"{name}.weight"] = f"mixer.{ours}: (H P) D -> D H P"
        else:
            table[f"{name}.0.weight"] = f"mixer.in_{ours}: R D -> D R"
            table[f"{name}.1.weight"] = f"mixer.{ours}: (H P) R -> R H P"
    return table


def _gated_conv(block: GatedConv) -> Table:
    return tables.named(tables.GATED_CONV, conv="conv1d")


def _scan(block: GatedScan) -> Table:
    return {
        "conv1d.weight": "mixer.conv: D 1 W -> D W",
        "conv1d.bias": "mixer.conv_bias: D",
        "in_proj.weight": "mixer.w_in: (c F) D -> D c F",
        "lower_bound": "mixer.lower_bound: F",
        "norm.weight": "mixer.norm: F",
        "out_proj.weight": "mixer.w_out: D F -> F D",
    }


def _rglru(block: RGLRU) -> Table:
    return {
        "linear_y.weight": "mixer.w_in: (H P) D -> D 0 H P",
        "linear_x.weight": "mixer.w_in: (H P) D -> D 1 H P",
        "linear_y.bias": "mixer.b_in: (H P) -> 0 H P",
        "linear_x.bias": "mixer.b_in: (H P) -> 1 H P",
        "conv1d.weight": "mixer.conv: (H P) 1 W -> H P W",
        "conv1d.bias": "mixer.conv_bias: (H P) -> H P",
        "gate_weights": "mixer.w_gates: c H Q P -> Q c H P",
        "gate_biases": "mixer.b_gates: c H P",
        "decay": "mixer.decay: H P",
        "linear_out.weight": "mixer.w_out: D (H P) -> H P D",
        "linear_out.bias": "mixer.b_out: D",
    }


def _mlp(block: MLP) -> Table:
    return tables.GATED_MLP if block.gated else tables.PLAIN_MLP


def _moe(block: MoE) -> Table:
    firsts = {"gate_proj": " 0", "up_proj": " 1"} if block.gated else {"up_proj": ""}
    return {
        "router.weight": "mixer.router: E D -> D E",
        "selection_bias": "mixer.selection_bias: E",
        **{f"experts.{{e}}.{name}.weight": f"mixer.w_in: F D -> e D{side} F" for name, side in firsts.items()},
        "experts.{e}.down_proj.weight": "mixer.w_out: D F -> e F D",
        "latent_in.weight": "mixer.latent_in: R D -> D R",
        "latent_in.bias": "mixer.latent_in_bias: R",
        "latent_out.weight": "mixer.latent_out: D R -> R D",
        "latent_out.bias": "mixer.latent_out_bias: D",
        **({} if block.shared is None else tables.at("shared_expert.", _mlp(block.shared), "mixer.shared")),
        "shared_expert_gate.weight": "mixer.shared_gate: 1 D -> D 0",
        **{
            f"weighed_experts.{{j}}.{name}.weight": f"mixer.sink_in: F D -> D{side} j F"
            for name, side in firsts.items()
        },
        "weighed_experts.{j}.down_proj.weight": "mixer.sink_out: D F -> j F D",
    }


def _parallel(block: Parallel) -> Table:
    table = {}
    for name, branch in block.branches.items():
        table |= tables.at(f"branch_{name}.", table_of(branch.mixer), f"mixer.branches.{name}")
        table[f"norm_{name}.weight"] = f"mixer.norms.{name}.weight: D"
    return table


def _shared(block: Shared) -> Table:
    """Of each depth's own mixer; what depths share, and what links to it, stands in `own`."""
    return table_of(block.mixer)


def _latent(block: LatentAttention) -> Table:
    return tables.LATENT_ATTENTION


def _convolved(block: ConvolvedAttention) -> Table:
    table = {
        name: spec for name, spec in tables.ATTENTION.items() if not name.startswith(("v_proj", "q_norm", "k_norm"))
    }
    for name, of in (("q", "H"), ("k", "K")):
        table |= {
            f"{name}_conv1d.first.weight": f"mixer.conv_{name}: ({of} P) 1 W -> {of} P W",
            f"{name}_conv1d.first.bias": f"mixer.conv_{name}_bias: ({of} P) -> {of} P",
            f"{name}_conv1d.weight": f"mixer.heads_{name}: ({of} P) Q U -> Q U {of} P",
            f"{name}_conv1d.bias": f"mixer.heads_{name}_bias: ({of} P) -> {of} P",
        }
    return table | {
        "v_proj.weight": "mixer.w_v: (c X) D -> D c X",
        "v_proj.bias": "mixer.b_v: (c X) -> c X",
        "key_scale": "mixer.key_scale: K",
    }


def _relative(block: RelativeAttention) -> Table:
    return {
        **{name: spec for name, spec in tables.ATTENTION.items() if name.endswith("weight")},
        "r_proj.weight": "mixer.w_r: (H R) D -> D H R",
        "k_conv1d.weight": "mixer.conv_k: (K P) 1 W -> K P W",
        "v_conv1d.weight": "mixer.conv_v: (K P) 1 W -> K P W",
        "profiles": "mixer.profiles: R E",
    }


def _output_conv(block: OutputConv) -> Table:
    return {
        **tables.at("mixer.", table_of(block.mixer), "mixer.mixer"),
        "scale": "mixer.scale: c",
        "conv1d.weight": "mixer.conv: D 1 W -> D W",
    }


def _linear(block: LinearAttention) -> Table:
    table = {
        "q_proj.weight": "mixer.w_q: (H N) D -> D H N",
        "k_proj.weight": "mixer.w_k: (H N) D -> D H N",
        "v_proj.weight": "mixer.w_v: (H P) D -> D H P",
        "gate_proj.weight": "mixer.w_gate: (H P) D -> D H P",
        "slopes": "mixer.slopes: H",
        "lower_bound": "mixer.lower_bound: H N",
        "o_proj.weight": "mixer.w_o: D (H P) -> H P D",
    }
    match block.decay:
        case HeadDecay():
            table |= {"decay_proj.weight": "mixer.w_decay: H D -> D H", "decay_bias": "mixer.decay_bias: H"}
        case ChannelDecay():
            table |= {
                "decay_proj.0.weight": "mixer.w_decay: R D -> D R",
                "decay_proj.1.weight": "mixer.w_decay_up: (H N) R -> R H N",
                "decay_bias": "mixer.decay_bias: H N",
            }
    of_channel = block.norm is not None and block.norm.weight == "channel"
    return table | {"norm_weight": "mixer.norm: (H P) -> H P" if of_channel else "mixer.norm: P"}


def _mamba3(block: Mamba3) -> Table:
    R = "" if block.rank is None else " R"
    return {
        "in_proj.weight": [
            "mixer.in_zx: (c H P) D -> D c H P", f"mixer.in_BC: (c{R} G N) D -> D c{R} G N",
            "mixer.in_dt: (c H) D -> D c H", "mixer.in_angles: S D -> D S",
        ],
        "dt_bias": "mixer.dt_bias: H",
        "B_norm.weight": "mixer.B_norm.weight: N",
        "C_norm.weight": "mixer.C_norm.weight: N",
        "B_bias": f"mixer.B_bias: H{R} N",
        "C_bias": f"mixer.C_bias: H{R} N",
        "D": "mixer.D: H",
        "mimo_v": "mixer.mimo_v: H R P",
        "mimo_z": "mixer.mimo_z: H R P",
        "mimo_o": "mixer.mimo_o: H R P",
        "norm_weight": "mixer.norm: H P",
        "out_proj.weight": "mixer.out: D (H P) -> H P D",
    }  # fmt: skip


def _mlstm(block: MLSTM) -> Table:
    table = {}
    for name, ours, of in (("q_proj", "qk 0", "N"), ("k_proj", "qk 1", "N"), ("v_proj", "vo 0", "P"),
                           ("out_gate_proj", "vo 1", "P")):  # fmt: skip
        weight, i = ours.split()
        table[f"{name}.weight"] = f"mixer.w_{weight}: (H {of}) D -> D {i} H {of}"
        table[f"{name}.bias"] = f"mixer.b_{weight}: (H {of}) -> {i} H {of}"
    return table | {
        "gates_proj.weight": "mixer.w_gates: (c H) D -> D c H",
        "gate_biases": "mixer.b_gates: c H",
        "norm.weight": "mixer.norm: (H P) -> H P",
        "norm.bias": "mixer.norm_bias: (H P) -> H P",
        "o_proj.weight": "mixer.w_out: D (H P) -> H P D",
        "o_proj.bias": "mixer.b_out: D",
    }


def _slstm(block: SLSTM) -> Table:
    return {
        "conv1d.weight": "mixer.conv: (H P) 1 W -> H P W",
        "conv1d.bias": "mixer.conv_bias: (H P) -> H P",
        "gate_weights": "mixer.w_in: c H P Q -> Q c H P",
        "recurrent_weights": "mixer.R: c H P Q -> Q c H P",
        "gate_biases": "mixer.bias: c H P",
        "norm.weight": "mixer.norm: (H P) -> H P",
    }


def _hyena(block: Hyena) -> Table:
    filters = {
        "first": "F X", "first_bias": "X", "inner": "i X Y", "inner_bias": "i X", "last": "X D", "frequency": "X",
        "dt_log": "D", "A_log": "N D", "A_imaginary": "N D", "weights": "c N D",
    }  # fmt: skip
    return {
        "in_proj.weight": "mixer.w_in: (c C) D -> D c C",
        "in_proj.bias": "mixer.w_in_bias: (c C) -> c C",
        "conv1d.weight": "mixer.conv: (c C) 1 W -> c C W",
        "conv1d.bias": "mixer.conv_bias: (c C) -> c C",
        "D": "mixer.D: C",
        "out_proj.weight": "mixer.out: D C -> C D",
        "out_proj.bias": "mixer.out_bias: D",
        **{f"filter.{name}": f"mixer.filter.{name}: {axes}" for name, axes in filters.items()},
    }


def _titans(block: Titans) -> Table:
    return {
        "qkv_proj.weight": "mixer.w_qkv: (c H P) D -> D c H P",
        "gate_proj.weight": "mixer.w_gate: (H P) D -> D H P",
        "rates_proj.weight": "mixer.w_rates: (c H) D -> D c H",
        "rates": "mixer.rates: c H",
        "conv1d.weight": "mixer.conv: (c H P) 1 W -> c H P W",
        "memory_norm": "mixer.memory_norm: H P",
        "memory_in": "mixer.memory_in: H P F",
        "memory_out": "mixer.memory_out: H F P",
        "out_proj.weight": "mixer.out: D (H P) -> H P D",
    }


def _memory_as_context(block: MemoryAsContext) -> Table:
    return {
        **tables.at("memory.", table_of(block.memory), "mixer.memory"),
        **tables.at("attention.", table_of(block.attention), "mixer.attention"),
    }


def _depth_moe(block: DepthMoE) -> Table:
    return {
        "router_in.weight": "mixer.router_in: R D -> D R",
        "router_in.bias": "mixer.router_in_bias: R",
        "state_scale": "mixer.state_scale: R",
        "router_norm.weight": "mixer.router_norm.weight: R",
        **{f"{name}.weight": f"mixer.{name}: X R -> R X" for name in ("fc1", "fc2")},
        **{f"{name}.bias": f"mixer.{name}_bias: R" for name in ("fc1", "fc2")},
        "router_out.weight": "mixer.router_out: E R -> R E",
        "selection_bias": "mixer.selection_bias: E",
        "experts.{e}.gate_proj.weight": "mixer.w_in: F D -> e D 0 F",
        "experts.{e}.up_proj.weight": "mixer.w_in: F D -> e D 1 F",
        "experts.{e}.down_proj.weight": "mixer.w_out: D F -> e F D",
    }


KINDS: dict[type, Callable[[Any], Table]] = {
    Attention: _attention, Mamba2: _mamba2, Mamba1: _mamba1, MLP: _mlp, MoE: _moe, GatedDeltaNet: _delta,
    KimiDelta: _kimi, GatedConv: _gated_conv, GatedScan: _scan, RGLRU: _rglru, Parallel: _parallel, Shared: _shared,
    LatentAttention: _latent, ConvolvedAttention: _convolved, LinearAttention: _linear, Mamba3: _mamba3,
    Rwkv7: own_rwkv.rwkv7, Rwkv6: own_rwkv.rwkv6, ChannelMix: own_rwkv.channel_mix, Rwkv4: own_rwkv.rwkv4,
    Rwkv4Channel: own_rwkv.rwkv4_channel,
    MLSTM: _mlstm, SLSTM: _slstm, Hyena: _hyena, Titans: _titans, MemoryAsContext: _memory_as_context,
    DepthMoE: _depth_moe, RelativeAttention: _relative, OutputConv: _output_conv,
}  # fmt: skip
"""Blocks of the format -> the table of their weights; torch_code has a class of the same name."""


def table_of(block: Block) -> Table:
    """The weights of a block's mixer, behind `mixer.`."""
    return KINDS[type(block)](block)
