# SPDX-License-Identifier: Apache-2.0
"""Published recurrences in terms of the ops here: what their papers and code call their arguments, gates and states.

One function an op, `function(arrays, options, implementation) -> outputs by name`, for `pallas_kernels.vectors`. Arrays
are those of a file of vectors (see there), segment_ids counted from 1. Each function also shows how to call the op for
that model.
"""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp

import pallas_kernels as ops
from pallas_kernels.ops.mamba3.api import decay_rates
from pallas_kernels.ops.titans.api import memory_of


def gated_delta_rule(a: Mapping, options: Mapping, implementation: str) -> dict:
    """Gated DeltaNet, and Kimi Delta Attention with a decay by channel; gates ready-made or raw."""
    g, beta = a.get("g"), a.get("beta")
    if "a" in a:
        g = raw_decays(a["a"], a["A_log"], a["dt_bias"], options.get("lower_bound"))
        beta = options.get("bmax", 1.0) * jax.nn.sigmoid(a["b_raw"])
    o, state = ops.gated_delta_rule(
        a["q"], a["k"], a["v"], cast(jax.Array, beta), g, normalize=options.get("use_qk_l2norm", False),
        scale=options.get("scale"), **_common(a), return_final_state=True, implementation=implementation,
    )  # fmt: skip
    return {"o": o, "final_state": state}


def raw_decays(a, A_log_H, dt_bias, lower_bound: float | None):
    """Log decays [B, T, H] or [B, T, H, N] of Gated DeltaNet and KDA; with a lower bound those of KDA's safe gate."""
    by_head = jnp.expand_dims(jnp.exp(A_log_H), (0, 1, *range(3, a.ndim)))
    if lower_bound is None:
        return -by_head * jax.nn.softplus(a + dt_bias[None, None])
    return lower_bound * jax.nn.sigmoid(by_head * (a + dt_bias[None, None]))


def gated_delta_product(a: Mapping, options: Mapping, implementation: str) -> dict:
    o, state = ops.gated_delta_product(
        a["q"], a["k"], a["v"], a["beta"], a.get("g"), normalize=options.get("use_qk_l2norm", False),
        scale=options.get("scale"), **_common(a), return_final_state=True, implementation=implementation,
    )  # fmt: skip
    return {"o": o, "final_state": state}


def rwkv7(a: Mapping, options: Mapping, implementation: str) -> dict:
    o, state = ops.rwkv7(
        options.get("scale", 1.0) * a["r"], a["log_w"], a["k"], a["v"], a["a"], a["b"], **_common(a),
        return_final_state=True, implementation=implementation,
    )  # fmt: skip
    return {"o": o, "final_state": state}


def linear_attention(a: Mapping, options: Mapping, implementation: str) -> dict:
    """GLA and simple GLA, by the shape of g."""
    return _linear_attention(a["q"], a["k"], a["v"], a.get("g"), a, options, implementation)


def retention(a: Mapping, options: Mapping, implementation: str) -> dict:
    """RetNet: gamma is the factor itself. Rotations are the caller's."""
    return _linear_attention(a["q"], a["k"], a["v"], jnp.log(a["gamma"]), a, options, implementation)


def hgrn2(a: Mapping, options: Mapping, implementation: str) -> dict:
    """HGRN2: decay and key add up to 1."""
    bound = a["lower_bound"][None, None]
    decay = bound + (1 - bound) * jax.nn.sigmoid(a["f"])
    return _linear_attention(a["q"], 1 - decay, a["v"], jnp.log(decay), a, options, implementation)


def rwkv6(a: Mapping, options: Mapping, implementation: str) -> dict:
    """RWKV-6: the bonus u stands for the decay of a token's own value."""
    return _linear_attention(a["r"], a["k"], a["v"], a["w"], a, options, implementation, bonus=a["u"])


def based(a: Mapping, options: Mapping, implementation: str) -> dict:
    """Based: the second order of exp(scale q . k)."""
    more = {"feature_map": "taylor", "normalizer": options["use_norm"], "eps": options["eps"]}
    found = _linear_attention(a["q"], a["k"], a["v"], None, a, options, implementation, **more)
    return {"o": found["o"]}


def _linear_attention(q, k, v, g, a, options, implementation, **more) -> dict:
    o, state = ops.linear_attention(q, k, v, g, scale=options.get("scale"), **_common(a), **more,
                                    return_final_state=True, implementation=implementation)  # fmt: skip
    return {"o": o, "final_state": state}


def hgrn(a: Mapping, options: Mapping, implementation: str) -> dict:
    """HGRN: x comes multiplied by one minus the decay."""
    o, state = _linear_scan(a["x"], a["g"], a, implementation)
    return {"o": o, "final_state": state}


def rg_lru(a: Mapping, options: Mapping, implementation: str) -> dict:
    """RG-LRU of Griffin: gates by blocks; where a document starts (position 0) the input is not damped."""
    x = a["x"]
    n_blocks = a["a_gate_w"].shape[0]
    blocks = x.reshape(*x.shape[:2], n_blocks, -1)

    def gate(name: str):
        raw = jnp.einsum("bthi,hij->bthj", blocks, a[f"{name}_w"]) + a[f"{name}_b"][None, None]
        return jax.nn.sigmoid(raw).reshape(x.shape)

    starts = a["segment_pos"] == 0
    g = -options["c"] * gate("a_gate") * jax.nn.softplus(a["a_param"])[None, None]
    damping = jnp.where(starts[..., None], 1, jnp.sqrt(-jnp.expm1(2 * jnp.where(starts[..., None], -1, g))))
    initial = a.get("initial_state")
    if initial is not None:  # of a row that goes on with a document
        initial = jnp.where(starts[:, :1], 0, initial)
    ids = 1 + jnp.cumsum(starts.astype(jnp.int32), axis=1)
    given = {"segment_ids": ids} | ({} if initial is None else {"initial_state": initial})
    y, state = _linear_scan(damping * gate("input_gate") * x, g, given, implementation)
    return {"y": y, "final_state": state}


def mingru(a: Mapping, options: Mapping, implementation: str) -> dict:
    """minGRU: z weighs the new value. The logarithms are of the gates, not of what they sum."""
    new = jax.nn.sigmoid(a["kz"]) * _candidate(a["hx"], options)
    y, state = _linear_scan(new, jax.nn.log_sigmoid(-a["kz"]), a, implementation)
    return {"y": y, "final_state": state}


def minlstm(a: Mapping, options: Mapping, implementation: str) -> dict:
    """minLSTM: forget and input gate, divided by their sum."""
    log_f, log_i = jax.nn.log_sigmoid(a["kf"]), jax.nn.log_sigmoid(a["ki"])
    total = jnp.logaddexp(log_f, log_i)
    new = jnp.exp(log_i - total) * _candidate(a["hx"], options)
    y, state = _linear_scan(new, log_f - total, a, implementation)
    return {"y": y, "final_state": state}


def _candidate(x, options: Mapping):
    """Of minGRU and minLSTM; for their logarithmic form the positive one."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x)) if options["log_space_activation"] else x


def _linear_scan(x, g, a: Mapping, implementation: str) -> tuple:
    return ops.linear_scan(x, g, **_common(a), return_final_state=True, implementation=implementation)


def mamba3(a: Mapping, options: Mapping, implementation: str) -> dict:
    """Mamba-3's scan, with one or several inputs and outputs."""
    weights = ("q_bias", "k_bias", "D", "z", "norm_weight", "mimo_v", "mimo_z", "mimo_o")
    states = {"angle": "angle_state", "ssm": "ssm_state", "k": "k_state", "v": "v_state"}
    scan: Callable[..., tuple] = ops.mamba3
    y, *final = scan(
        *(a[name] for name in ("q", "k", "v", "adt", "dt", "trap", "angles")),
        **{name: a[name] for name in weights if name in a},
        **{f"initial_{name}": a[theirs] for name, theirs in states.items() if theirs in a},
        norm_eps=options.get("norm_eps", 1e-5), rotary_pairs=options["rotary_pairs"].partition(":")[0],
        segment_ids=a.get("segment_ids"), return_final_state=True, implementation=implementation,
    )  # fmt: skip
    return {"y": y} | {f"final_{theirs}": state for theirs, state in zip(states.values(), final, strict=True)}


def mamba3_block(a: Mapping, options: Mapping, implementation: str) -> dict:
    """The whole of Mamba-3's mixer, without cache: no short convolution in it."""
    H, P, N, G, S, R = (options[name] for name in "HPNGSR")
    sizes = (H * P, H * P, G * N * R, G * N * R, H, H, H, S)
    projected = a["u"] @ a["in_proj"].T
    z, x, B, C, raw_dt, raw_A, trap, angles = jnp.split(projected, [sum(sizes[:i]) for i in range(1, 8)], axis=-1)
    n_batch, n_tokens = x.shape[:2]

    def normed(array, weight):
        array = array.reshape(n_batch, n_tokens, R, G, N)
        array = array * jax.lax.rsqrt(jnp.mean(array**2, axis=-1, keepdims=True) + 1e-5)
        return (array * weight.reshape(1, 1, 1, 1, N))[:, :, slice(None) if options["mimo"] else 0]

    dt = jax.nn.softplus(raw_dt + a["dt_bias"][None, None])
    adt = dt * decay_rates(raw_A, options["A_activation"], options["A_floor"])
    heads = lambda array: array.reshape(n_batch, n_tokens, H, P)
    angles = jnp.broadcast_to(angles[:, :, None], (n_batch, n_tokens, H, S))
    biases = (a[name] if options["mimo"] else a[name][:, 0] for name in ("C_bias", "B_bias"))
    y = ops.mamba3(
        normed(C, a["C_norm"]), normed(B, a["B_norm"]), heads(x), adt, dt, trap, angles,
        **dict(zip(("q_bias", "k_bias"), biases, strict=True)), D=a["D"], z=heads(z),
        norm_weight=a["norm_weight"].reshape(H, P) if options["outproj_norm"] else None,
        mimo_v=a.get("mimo_x"), mimo_z=a.get("mimo_z"), mimo_o=a.get("mimo_o"),
        rotary_pairs="half" if options["mimo"] else "adjacent", implementation=implementation,
    )  # fmt: skip
    return {"out": y.reshape(n_batch, n_tokens, H * P) @ a["out_proj"].T}


def hyena(a: Mapping, options: Mapping, implementation: str) -> dict:
    """Hyena of order 2 between its projections: the last two parts meet first, the first gates the result."""
    if options.get("order", 2) != 2:
        raise NotImplementedError(f"order ({options['order']}) of hyena not 2")
    ids = a.get("segment_ids")
    parts = ops.causal_conv1d(a["u"], a["short_w"], a["short_b"], segment_ids=ids, implementation=implementation)
    x0, x1, v = jnp.split(parts, 3, axis=-1)
    y = ops.long_conv(v * x1, a["h"], skip=a["h_bias"], segment_ids=ids, implementation=implementation)
    return {"y": y * x0}


def mlstm(a: Mapping, options: Mapping, implementation: str) -> dict:
    given = {f"initial_{name}": a[f"{name}0"] for name in ("c", "n", "m") if f"{name}0" in a}
    h, c, n, m = ops.mlstm(a["q"], a["k"], a["v"], a["i"], a["f"], eps=options.get("eps", 1e-6),
                           segment_ids=a.get("segment_ids"), **given, return_final_state=True,
                           implementation=implementation)  # fmt: skip
    return {"h": h, "final_c": c, "final_n": n, "final_m": m}


def slstm(a: Mapping, options: Mapping, implementation: str) -> dict:
    order = options.get("gate_order", "i,f,z,o")
    if order != "i,f,z,o":
        raise NotImplementedError(f"gate_order ({order!r}) not 'i,f,z,o'")
    given = {f"initial_{name}": a[f"{name}0"] for name in ("y", "c", "n", "m") if f"{name}0" in a}
    y, _, c, n, m = ops.slstm(a["x"], a["R"], a.get("b"), segment_ids=a.get("segment_ids"), **given,
                              return_final_state=True, implementation=implementation)  # fmt: skip
    return {"y": y, "final_c": c, "final_n": n, "final_m": m}


def titans(a: Mapping, options: Mapping, implementation: str) -> dict:
    """The memory of Titans between its projections, as titans-pytorch has it."""
    x, n_heads = a["x"], a["init_g"].shape[0]
    eps = jnp.finfo(x.dtype).eps
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)
    stored, asked = (normed * a[name][None, None] for name in ("store_norm", "retrieve_norm"))
    heads = lambda array: array.reshape(*x.shape[:2], n_heads, -1)
    gate = lambda name: jnp.einsum("btd,hd->bth", stored, a[f"w_{name}"]) + a[f"b_{name}"][None, None]
    learned = tuple(a[f"init_{name}"] for name in ("g", "W1", "W2"))
    y, state = ops.titans(
        heads(asked @ a["w_q"].T), heads(stored @ a["w_k"].T), heads(stored @ a["w_v"].T),
        options["max_lr"] * jax.nn.sigmoid(gate("lr")), gate("mom") if options["momentum"] else None, gate("dec"),
        *learned, store_every=options["chunk_size"], refresh_every=options["batch_size"],
        segment_ids=a.get("segment_ids"), return_final_state=True, implementation=implementation,
    )  # fmt: skip
    if "w_gate" in a:
        y = y * jax.nn.sigmoid(jnp.einsum("btd,hd->bth", asked, a["w_gate"]))[..., None]
    y = y.reshape(x.shape)
    weights, momentum = memory_of(state, *learned)
    names = ("g", "W1", "W2")
    return {
        "y": y @ a["w_comb"].T if "w_comb" in a else y,
        **{f"final_{name}": array for name, array in zip(names, weights, strict=True)},
        **{f"final_momentum_{name}": array for name, array in zip(names, momentum, strict=True)},
    }


def ssd(a: Mapping, options: Mapping, implementation: str) -> dict:
    """Mamba-2's scan. The gate by z without a norm is that of its reference."""
    dt = a["dt"] + (a["dt_bias"][None, None] if "dt_bias" in a else 0)
    dt = jax.nn.softplus(dt) if options.get("dt_softplus") else dt
    if limits := options.get("dt_limit"):
        dt = jnp.clip(dt, *limits)
    y, state = ops.ssd(a["x"], dt, a["A"], a["B"], a["C"], D=a.get("D"), **_common(a), return_final_state=True,
                       implementation=implementation)  # fmt: skip
    return {"y": _gated(y, a), "final_state": state}


def selective_scan(a: Mapping, options: Mapping, implementation: str) -> dict:
    """Mamba-1's scan."""
    dt = a["delta"] + (a["delta_bias"][None, None] if "delta_bias" in a else 0)
    dt = jax.nn.softplus(dt) if options.get("delta_softplus") else dt
    y, state = ops.selective_scan(a["u"], dt, a["A"], a["B"], a["C"], D=a.get("D"), **_common(a),
                                  return_final_state=True, implementation=implementation)  # fmt: skip
    return {"y": _gated(y, a), "final_state": state}


def _gated(y, a: Mapping):
    return y * jax.nn.silu(a["z"]) if "z" in a else y


def causal_conv1d(a: Mapping, options: Mapping, implementation: str) -> dict:
    """The files' state is the row's last inputs of whatever document, and what a row of several documents is given as
    state belongs to none of them: it is in front of the row's inputs in the new state, and in no output. The op's state
    is that of one document."""
    x, given = a["x"], _common(a)
    if "segment_ids" in a:
        given.pop("initial_state", None)
    y, state = ops.causal_conv1d(x, a["weight"], a.get("bias"), activation=options["activation"], **given,
                                 return_final_state=True, implementation=implementation)  # fmt: skip
    if "segment_ids" in a:
        before = a.get("initial_state", jnp.zeros_like(state))
        state = jnp.concatenate([before, x], axis=1)[:, x.shape[1] :]
    return {"y": y, "final_state": state}


def _common(a: Mapping) -> dict:
    """What all recurrences take by the same name."""
    return {name: a[name] for name in ("segment_ids", "initial_state") if name in a}


FUNCTIONS: dict[str, Callable[[Mapping, Mapping, str], dict]] = {
    "based": based,
    "causal_conv1d": causal_conv1d,
    "delta_rule": gated_delta_rule,
    "gated_delta_product": gated_delta_product,
    "gated_delta_rule": gated_delta_rule,
    "gla": linear_attention,
    "hgrn": hgrn,
    "hgrn2": hgrn2,
    "hyena": hyena,
    "kda": gated_delta_rule,
    "mamba3_block": mamba3_block,
    "mamba3_mimo": mamba3,
    "mamba3_siso": mamba3,
    "mingru": mingru,
    "minlstm": minlstm,
    "mlstm": mlstm,
    "retention": retention,
    "rg_lru": rg_lru,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
    "selective_scan": selective_scan,
    "simple_gla": linear_attention,
    "slstm": slstm,
    "ssd": ssd,
    "titans": titans,
}
"""By the name that vectors call the op."""

LOOSE = ("mamba3_siso", "mamba3_mimo", "mamba3_block", "mlstm", "titans")
"""Ops whose outputs react to rounding, by a quotient or by many angles added up: see `pallas_kernels.vectors`."""

ANGLES = ("final_angle_state",)
"""Outputs that are known up to multiples of 2 pi."""
