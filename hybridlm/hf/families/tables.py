# SPDX-License-Identifier: Apache-2.0
"""Tables of weights that families have in common: the published names in a mixer, and our parameters."""

from typing import Any

ATTENTION = {
    "q_proj.weight": "mixer.w_q: (H P) D -> D H P",
    "k_proj.weight": "mixer.w_k: (K P) D -> D K P",
    "v_proj.weight": "mixer.w_v: (K P) D -> D K P",
    "q_proj.bias": "mixer.b_q: (H P) -> H P",
    "k_proj.bias": "mixer.b_k: (K P) -> K P",
    "v_proj.bias": "mixer.b_v: (K P) -> K P",
    "q_norm.weight": "mixer.q_norm.weight: P",
    "k_norm.weight": "mixer.k_norm.weight: P",
    "o_proj.weight": "mixer.w_o: D (H P) -> H P D",
    "o_proj.bias": "mixer.b_o: D",
}
"""Attention as separate projections."""
GATED_ATTENTION = {
    **ATTENTION,
    "q_proj.weight": ["mixer.w_q: P D -> D h P", "mixer.w_gate: P D -> D h P"],
    "q_proj.bias": ["mixer.b_q: P -> h P", "mixer.b_gate: P -> h P"],
}
"""The same where a query and its gate follow each other, head by head."""
ATTENTION_NORMED_AS_ONE = {
    **ATTENTION,
    "q_norm.weight": "mixer.q_norm.weight: (H P) -> H P",
    "k_norm.weight": "mixer.k_norm.weight: (K P) -> K P",
}
"""The same where one norm is of all queries, and one of all keys."""
LATENT_ATTENTION = {
    "q_proj.weight": "mixer.w_q: (H P) D -> D H P",
    "q_a_proj.weight": "mixer.in_q: R D -> D R",
    "q_a_proj.bias": "mixer.in_q_bias: R",
    "q_a_layernorm.weight": "mixer.q_norm.weight: R",
    "q_b_proj.weight": "mixer.up_q: (H P) R -> R H P",
    "kv_a_proj_with_mqa.weight": "mixer.in_kv: R D -> D R",
    "kv_a_proj_with_mqa.bias": "mixer.in_kv_bias: R",
    "kv_a_layernorm.weight": "mixer.kv_norm.weight: R",
    "kv_b_proj.weight": "mixer.up_kv: (H P) R -> R H P",
    "g_proj.weight": "mixer.w_gate: H D -> D H",
    "o_proj.weight": "mixer.w_o: D (H P) -> H P D",
    "o_proj.bias": "mixer.b_o: D",
}
"""Multi-head latent attention."""
CONV_QKV = {
    "q_conv1d.weight": "mixer.conv_q: (G N) 1 W -> G N W",
    "k_conv1d.weight": "mixer.conv_k: (G N) 1 W -> G N W",
    "v_conv1d.weight": "mixer.conv_v: (H P) 1 W -> H P W",
}
"""Short convolutions of queries, keys and values."""
KIMI_DELTA = {
    "q_proj.weight": "mixer.in_q: (H N) D -> D H N",
    "k_proj.weight": "mixer.in_k: (H N) D -> D H N",
    "v_proj.weight": "mixer.in_v: (H P) D -> D H P",
    "b_proj.weight": "mixer.in_b: H D -> D H",
    "dt_bias": "mixer.dt_bias: (H N) -> H N",
    "o_norm.weight": "mixer.norm: P",
    "o_proj.weight": "mixer.out: D (H P) -> H P D",
    **CONV_QKV,
}
"""Kimi Delta Attention, but for A_log and the projections of decays and gate."""

GATED_MLP = {
    "gate_proj.weight": "mixer.w_in: F D -> D 0 F",
    "up_proj.weight": "mixer.w_in: F D -> D 1 F",
    "gate_proj.bias": "mixer.b_in: F -> 0 F",
    "up_proj.bias": "mixer.b_in: F -> 1 F",
    "down_proj.weight": "mixer.w_out: D F -> F D",
    "down_proj.bias": "mixer.b_out: D",
}
"""A gated MLP as three matrices."""
FUSED_MLP = {
    "input_linear.weight": "mixer.w_in: (c F) D -> D c F",
    "output_linear.weight": "mixer.w_out: D F -> F D",
}
"""A gated MLP whose first two matrices stand one above the other."""
PLAIN_MLP = {
    "up_proj.weight": "mixer.w_in: F D -> D F",
    "up_proj.bias": "mixer.b_in: F",
    "down_proj.weight": "mixer.w_out: D F -> F D",
    "down_proj.bias": "mixer.b_out: D",
}
"""An MLP without a gate."""

EXPERTS = {
    "gate.weight": "mixer.router: E D -> D E",
    "experts.{e}.gate_proj.weight": "mixer.w_in: F D -> e D 0 F",
    "experts.{e}.up_proj.weight": "mixer.w_in: F D -> e D 1 F",
    "experts.{e}.down_proj.weight": "mixer.w_out: D F -> e F D",
}
"""A mixture of gated experts, a tensor for each matrix of each."""
FUSED_EXPERTS = {
    "gate_up_proj": "mixer.w_in: E (c F) D -> E D c F",
    "down_proj": "mixer.w_out: E D F -> E F D",
}
"""The experts of one in one tensor."""
GATED_CONV = {
    "in_proj.weight": "mixer.w_in: (c F) D -> D c F",
    "in_proj.bias": "mixer.b_in: (c F) -> c F",
    "conv.weight": "mixer.conv: F 1 W -> F W",
    "conv.bias": "mixer.conv_bias: F",
    "out_proj.weight": "mixer.w_out: D F -> F D",
    "out_proj.bias": "mixer.b_out: D",
}
"""The gated short convolution of LFM."""

MAMBA2 = {
    "in_proj.weight": [
        "mixer.in_zx: (c H P) D -> D c H P", "mixer.in_BC: (c G N) D -> D c G N", "mixer.in_dt: H D -> D H",
    ],
    "in_proj.bias": ["mixer.in_zx_bias: (c H P) -> c H P", "mixer.in_BC_bias: (c G N) -> c G N", "mixer.in_dt_bias: H"],
    "conv1d.weight": ["mixer.conv_x: (H P) 1 W -> H P W", "mixer.conv_BC: (c G N) 1 W -> c G N W"],
    "conv1d.bias": ["mixer.conv_x_bias: (H P) -> H P", "mixer.conv_BC_bias: (c G N) -> c G N"],
    "dt_bias": "mixer.dt_bias: H",
    "A_log": "mixer.A_log: H",
    "D": "mixer.D: H",
    "norm.weight": "mixer.norm: (H P) -> H P",
    "out_proj.weight": "mixer.out: D (H P) -> H P D",
    "out_proj.bias": "mixer.out_bias: D",
}  # fmt: skip
"""Mamba-2, all families."""

MAMBA1 = {
    "in_proj.weight": "mixer.in_xz: (c H P) D -> D c H P",
    "in_proj.bias": "mixer.in_xz_bias: (c H P) -> c H P",
    "conv1d.weight": "mixer.conv: (H P) 1 W -> H P W",
    "conv1d.bias": "mixer.conv_bias: (H P) -> H P",
    "x_proj.weight": "mixer.x_proj: R (H P) -> P H R",
    "dt_proj.weight": "mixer.dt_proj: (H P) R -> R H P",
    "dt_proj.bias": "mixer.dt_bias: (H P) -> H P",
    "A_log": "mixer.A_log: (H P) N -> H P N",
    "D": "mixer.D: (H P) -> H P",
    "dt_layernorm.weight": "mixer.dt_norm.weight: R",
    "b_layernorm.weight": "mixer.B_norm.weight: N",
    "c_layernorm.weight": "mixer.C_norm.weight: N",
    "out_proj.weight": "mixer.out: D (H P) -> H P D",
    "out_proj.bias": "mixer.out_bias: D",
}
"""Mamba-1 of one head."""


def top(embedding: str, norm: str, output: str = "lm_head") -> dict[str, str]:
    """The table of what is outside of layers, with the names of the embedding, the last norm and the output."""
    return {
        f"{embedding}.weight": "embedding: V D",
        f"{norm}.weight": "norm.weight: D",
        f"{norm}.bias": "norm.bias: D",
        f"{output}.weight": "output: V D",
    }


def renamed(table: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """A table with another start of names."""
    return {new + name.removeprefix(old) if name.startswith(old) else name: spec for name, spec in table.items()}


def norm(name: str, path: str = "norm") -> dict[str, str]:
    """The table of a norm of the residual stream."""
    return {f"{name}.weight": f"{path}.weight: D", f"{name}.bias": f"{path}.bias: D"}


def at(prefix: str, table: dict[str, Any], own: str = "") -> dict[str, Any]:
    """A table with `prefix` before its names and, where given, `own` in place of `mixer` in its paths."""

    def moved(spec):
        if isinstance(spec, list):
            return [moved(s) for s in spec]
        return own + spec.removeprefix("mixer") if own else spec

    return {prefix + name: moved(spec) for name, spec in table.items()}


def named(table: dict[str, Any], **names: str) -> dict[str, Any]:
    """A table with other names in place of the first parts of its own: named(ATTENTION, o_proj="out_proj")."""
    parts = [(*name.partition("."), spec) for name, spec in table.items()]
    return {names.get(first, first) + dot + rest: spec for first, dot, rest, spec in parts}
