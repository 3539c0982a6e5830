# SPDX-License-Identifier: Apache-2.0
"""The tables of our own format for RWKV's blocks, see `own_tables`."""

from hybridlm.hf.family import Table
from hybridlm.layers import ChannelMix, Rwkv4, Rwkv4Channel, Rwkv6, Rwkv7

RWKV = {
    "r_proj.weight": "mixer.w_r: (H N) D -> D H N",
    "k_proj.weight": "mixer.w_k: (H N) D -> D H N",
    "v_proj.weight": "mixer.w_v: (H N) D -> D H N",
    "shares": "mixer.shares: c D",
    "decay_proj.0.weight": "mixer.decay_down: R D -> D R",
    "decay_proj.2.weight": "mixer.decay_up: (H N) R -> R H N",
    "decay_bias": "mixer.decay_bias: (H N) -> H N",
    "norm.weight": "mixer.norm_weight: (H N) -> H N",
    "norm.bias": "mixer.norm_bias: (H N) -> H N",
    "o_proj.weight": "mixer.w_o: D (H N) -> H N D",
}
"""What RWKV-6 and RWKV-7 have in common."""


def rwkv7(block: Rwkv7) -> Table:
    table = dict(RWKV)
    for name, ours, last in (("rate_proj", "rate", 1), ("gate_proj", "gate", 2), ("share_proj", "value", 1)):
        table[f"{name}.0.weight"] = f"mixer.{ours}_down: R D -> D R"
        table[f"{name}.{last}.weight"] = f"mixer.{ours}_up: (H N) R -> R H N"
    vectors = {"rate_bias": "rate_bias", "share_bias": "value_bias", "k_k": "k_k", "k_a": "k_a", "r_k": "r_k"}
    return table | {theirs: f"mixer.{ours}: (H N) -> H N" for theirs, ours in vectors.items()}


def rwkv6(block: Rwkv6) -> Table:
    return {
        **RWKV,
        "gate_proj.weight": "mixer.w_gate: (H N) D -> D H N",
        "first_share": "mixer.share: D",
        "share_down.weight": "mixer.share_down: (c R) D -> D c R",
        "share_up": "mixer.share_up: c R D",
        "bonus": "mixer.bonus: (H N) -> H N",
    }


def channel_mix(block: ChannelMix) -> Table:
    return {
        "share_in": "mixer.share_in: D",
        "share_gate": "mixer.share_gate: D",
        "up_proj.weight": "mixer.w_in: F D -> D F",
        "receptance.weight": "mixer.w_gate: E D -> D E",
        "down_proj.weight": "mixer.w_out: D F -> F D",
    }


def rwkv4(block: Rwkv4) -> Table:
    return {
        "shares": "mixer.share: c D",
        "k_proj.weight": "mixer.w_in: F D -> D 0 F",
        "v_proj.weight": "mixer.w_in: F D -> D 1 F",
        "r_proj.weight": "mixer.w_in: F D -> D 2 F",
        "decay": "mixer.decay: F",
        "bonus": "mixer.bonus: F",
        "o_proj.weight": "mixer.w_out: D F -> F D",
    }


def rwkv4_channel(block: Rwkv4Channel) -> Table:
    return {
        "shares": "mixer.share: c D",
        "up_proj.weight": "mixer.w_in: F D -> D F",
        "receptance.weight": "mixer.w_receptance: E D -> D E",
        "down_proj.weight": "mixer.w_out: D F -> F D",
    }
