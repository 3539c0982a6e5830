# SPDX-License-Identifier: Apache-2.0
"""The sequence ops as layers call them: each device runs them on its rows, heads and, without a cache, its tokens.

Ops that start from a state (`initial_state`, None: from nothing) also give the state behind the last token, else None.

Axis letters: B batch, T tokens, S keys, L layers, H heads, K key/value heads, P head width, G state groups, N state
size, W convolution window.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

import pallas_kernels
from hybridlm import sharding
from hybridlm.layers import cache as caches

ROWS = ("batch", "tokens")


def ssd(
    x_BTHP, dt_BTH, A_log_H, BC_BTcGN, D, *, segment_ids, initial_state, chunk: int | None,
    BC_rows: sharding.Axis = "batch",
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """`pallas_kernels.ssd`: (y [B, T, H, P], state [B, H, P, N]). BC: B and C, [B, T, 2, G, N]. A_log: log(-A), of
    which each device makes A: its gradient is then a sum over devices, which compilers take once for all microbatches.
    BC_rows: what splits B of it; `exchange.copied_rows` of one group.
    """
    keep, shared = initial_state is not None, BC_rows == "batch"
    BC_BTcGN = sharding.repeat_for_heads(BC_BTcGN, 3, x_BTHP.shape[2]) if shared else BC_BTcGN

    def run(x, dt, A_log, BC, D, segment_ids, initial_state, context_axis=None):
        return pallas_kernels.ssd(
            x, dt, -jnp.exp(A_log), BC[:, :, 0], BC[:, :, 1], D=D, segment_ids=segment_ids, initial_state=initial_state,
            return_final_state=keep, chunk=chunk, context_axis=context_axis,
        )  # fmt: skip

    heads, state = (*ROWS, "heads", None), ("batch", "heads", None, None)
    arrays = (x_BTHP, dt_BTH, A_log_H, BC_BTcGN, D, segment_ids, initial_state)
    of_BC = (BC_rows, "tokens", None, "groups" if shared else None, None)
    names = (heads, heads[:3], ("heads",), of_BC, ("heads", None), ROWS, state)
    return _with_state(run, arrays, names, heads, state, keep)


def selective_scan(
    x_BTHP, dt_BTHP, A_HPN, B_BTHN, C_BTHN, D_HP, *, channels: tuple, segment_ids, initial_state, chunk: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """`pallas_kernels.selective_scan`: (y [B, T, H, P], state [B, H, P, N]). channels: logical axes of H and P."""
    keep = initial_state is not None

    def run(x, dt, A, B, C, D, segment_ids, state, context_axis=None):
        shape = (*x.shape[:2], -1)
        out = pallas_kernels.selective_scan(
            x.reshape(shape), dt.reshape(shape), A.reshape(-1, A.shape[-1]), B, C, D=D.reshape(-1),
            segment_ids=segment_ids, return_final_state=keep, chunk=chunk, context_axis=context_axis,
            initial_state=None if state is None else state.reshape(state.shape[0], -1, state.shape[-1]),
        )  # fmt: skip
        return (out[0].reshape(x.shape), out[1].reshape(state.shape)) if keep else out.reshape(x.shape)

    tokens, maps, state = (*ROWS, *channels), (*ROWS, channels[0], None), ("batch", *channels, None)
    arrays = (x_BTHP, dt_BTHP, A_HPN, B_BTHN, C_BTHN, D_HP, segment_ids, initial_state)
    names = (tokens, tokens, (*channels, None), maps, maps, channels, ROWS, state)
    return _with_state(run, arrays, names, tokens, state, keep)


def gated_delta_rule(
    q_BTGN, k_BTGN, v_BTHP, beta_BTH, g, *, segment_ids, initial_state, chunk: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """`pallas_kernels.gated_delta_rule` of keys of unit length: (y [B, T, H, P], state [B, H, N, P])."""
    keep = initial_state is not None
    q_BTGN, k_BTGN = (sharding.repeat_for_heads(a, 2, v_BTHP.shape[2]) for a in (q_BTGN, k_BTGN))

    def run(q, k, v, beta, g, segment_ids, initial_state, context_axis=None):
        return pallas_kernels.gated_delta_rule(
            q, k, v, beta, g, normalize=True, segment_ids=segment_ids, initial_state=initial_state,
            return_final_state=keep, chunk=chunk, context_axis=context_axis,
        )  # fmt: skip

    groups, heads, state = (*ROWS, "groups", None), (*ROWS, "heads", None), ("batch", "heads", None, None)
    arrays = (q_BTGN, k_BTGN, v_BTHP, beta_BTH, g, segment_ids, initial_state)
    names = (groups, groups, heads, heads[:3], heads, ROWS, state)
    return _with_state(run, arrays, names, heads, state, keep)


def linear_scan(x_BT, g_BT, *, channels: tuple, segment_ids, initial_state) -> tuple[jax.Array, jax.Array | None]:
    """`pallas_kernels.linear_scan`: (h like x [B, T, *channels], state [B, *channels]).

    channels: their logical axes."""
    keep, by_token = initial_state is not None, implementation(x_BT, initial_state)

    def run(x, g, segment_ids, state, context_axis=None):
        shape = (*x.shape[:2], -1)
        out = pallas_kernels.linear_scan(
            x.reshape(shape), g.reshape(shape), segment_ids=segment_ids, return_final_state=keep,
            initial_state=None if state is None else state.reshape(state.shape[0], -1), context_axis=context_axis,
            implementation=by_token,
        )  # fmt: skip
        return (out[0].reshape(x.shape), out[1].reshape(state.shape)) if keep else out.reshape(x.shape)

    tokens, state = (*ROWS, *channels), ("batch", *channels)
    return _with_state(
        run, (x_BT, g_BT, segment_ids, initial_state), (tokens, tokens, ROWS, state), tokens, state, keep
    )


def mlstm(
    q_BTHN, k_BTHN, v_BTHP, i_BTH, f_BTH, *, eps: float, segment_ids, initial: tuple | None, chunk: int | None
) -> tuple[jax.Array, tuple | None]:
    """`pallas_kernels.mlstm`: (h [B, T, H, P], (c [B, H, N, P], n [B, H, N], m [B, H]))."""
    keep, by_token = initial is not None, implementation(v_BTHP, initial)

    def run(q, k, v, i, f, segment_ids, c, n, m, context_axis=None):
        return pallas_kernels.mlstm(
            q, k, v, i, f, eps=eps, segment_ids=segment_ids, initial_c=c, initial_n=n, initial_m=m,
            return_final_state=keep, chunk=chunk, context_axis=context_axis, implementation=by_token,
        )  # fmt: skip

    heads, states = (*ROWS, "heads", None), [("batch", "heads", None, None)[:n] for n in (4, 3, 2)]
    arrays = (q_BTHN, k_BTHN, v_BTHP, i_BTH, f_BTH, segment_ids, *(initial or (None,) * 3))
    names = (heads, heads, heads, heads[:3], heads[:3], ROWS, *states)
    return _with_states(run, arrays, names, heads, states, keep)


def slstm(x_BTGHP, R_HGPP, b_GHP, *, segment_ids, initial: tuple | None) -> tuple[jax.Array, tuple | None]:
    """`pallas_kernels.slstm`: (y [B, T, H, P], (y, c, n, m) [B, H, P]). G: the gates i, f, z, o."""
    keep, by_token = initial is not None, implementation(x_BTGHP, initial)

    def run(x, R, b, segment_ids, y, c, n, m, context_axis=None):
        return pallas_kernels.slstm(
            x, R, b, segment_ids=segment_ids, initial_y=y, initial_c=c, initial_n=n, initial_m=m,
            return_final_state=keep, context_axis=context_axis, implementation=by_token,
        )  # fmt: skip

    gates, state = (*ROWS, None, "heads", None), ("batch", "heads", None)
    arrays = (x_BTGHP, R_HGPP, b_GHP, segment_ids, *(initial or (None,) * 4))
    names = (gates, ("heads", None, None, None), (None, "heads", None), ROWS, *[state] * 4)
    return _with_states(run, arrays, names, (*ROWS, "heads", None), [state] * 4, keep)


def rwkv4(k_BTF, v_BTF, g_F, bonus_F, *, segment_ids, initial: tuple | None) -> tuple[jax.Array, tuple | None]:
    """`pallas_kernels.rwkv4`: (y [B, T, F], (a, b, m) [B, F])."""
    keep, by_token = initial is not None, implementation(v_BTF, initial)

    def run(k, v, g, bonus, segment_ids, a, b, m, context_axis=None):
        return pallas_kernels.rwkv4(
            k, v, g, bonus, segment_ids=segment_ids, initial_a=a, initial_b=b, initial_m=m, return_final_state=keep,
            context_axis=context_axis, implementation=by_token,
        )  # fmt: skip

    tokens, state = (*ROWS, "d_inner"), ("batch", "d_inner")
    arrays = (k_BTF, v_BTF, g_F, bonus_F, segment_ids, *(initial or (None,) * 3))
    return _with_states(
        run, arrays, (tokens, tokens, *[("d_inner",)] * 2, ROWS, *[state] * 3), tokens, [state] * 3, keep
    )


def linear_attention(
    q_BTHN, k_BTHN, v_BTHP, g, bonus_HN=None, *, segment_ids, initial_state, **options
) -> tuple[jax.Array, jax.Array | None]:
    """`pallas_kernels.linear_attention`: (y [B, T, H, P], state). options: those of the op that are no arrays."""
    keep, by_token = initial_state is not None, implementation(v_BTHP, initial_state)

    def run(q, k, v, g, bonus, segment_ids, initial_state, context_axis=None):
        return pallas_kernels.linear_attention(
            q, k, v, g, bonus=bonus, segment_ids=segment_ids, initial_state=initial_state, return_final_state=keep,
            context_axis=context_axis, implementation=by_token, **options,
        )  # fmt: skip

    heads, state, of_head = (*ROWS, "heads", None), ("batch", "heads", None, None), ("heads", None)
    decays = of_head if g is None or g.ndim == 1 else heads
    arrays = (q_BTHN, k_BTHN, v_BTHP, g, bonus_HN, segment_ids, initial_state)
    return _with_state(run, arrays, (heads, heads, heads, decays, of_head, ROWS, state), heads, state, keep)


def rwkv7(
    r_BTHN, g_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN, *, segment_ids, initial_state, chunk: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """`pallas_kernels.rwkv7`: (y [B, T, H, N], state [B, H, N, N])."""
    keep, by_token = initial_state is not None, implementation(v_BTHN, initial_state)

    def run(r, g, k, v, a, b, segment_ids, initial_state, context_axis=None):
        return pallas_kernels.rwkv7(
            r, g, k, v, a, b, segment_ids=segment_ids, initial_state=initial_state, return_final_state=keep,
            chunk=chunk, context_axis=context_axis, implementation=by_token,
        )  # fmt: skip

    heads, state = (*ROWS, "heads", None), ("batch", "heads", None, None)
    arrays = (r_BTHN, g_BTHN, k_BTHN, v_BTHN, a_BTHN, b_BTHN, segment_ids, initial_state)
    return _with_state(run, arrays, (*(heads,) * 6, ROWS, state), heads, state, keep)


def mamba3(
    tokens: tuple, weights: dict, *, segment_ids, initial: dict | None, chunk: int | None, rotary_pairs: str
) -> tuple[jax.Array, dict | None]:
    """`pallas_kernels.mamba3`: (y [B, T, H, P], states by name). tokens: its arrays in order, and z; weights: by name;
    initial: the states angle, ssm, k and v, or None. With ranks, C and B are [B, T, R, G, N]."""
    keep, x_BTHP, mimo = initial is not None, tokens[2], tokens[0].ndim == 5
    C, B = (sharding.repeat_for_heads(a, a.ndim - 2, x_BTHP.shape[2]) for a in tokens[:2])
    states = ("angle", "ssm", "k", "v")
    by_token = implementation(x_BTHP, initial)

    def run(C, B, x, adt, dt, trap, angles, z, segment_ids, *arrays, context_axis=None):
        given = dict(zip(weights, arrays, strict=False))
        given |= {f"initial_{name}": a for name, a in zip(states, arrays[len(weights) :], strict=True)}
        return pallas_kernels.mamba3(
            C, B, x, adt, dt, trap, angles, z=z, **given, rotary_pairs=rotary_pairs, segment_ids=segment_ids,
            return_final_state=keep, chunk=chunk, context_axis=context_axis, implementation=by_token,
        )  # fmt: skip

    heads, of_head = (*ROWS, "heads", None), ("heads", None, None)
    maps = (*ROWS, *(None,) * mimo, "groups", None)
    of_state, of_last = ("batch", "heads", None, None), ("batch", "heads", *(None,) * (1 + mimo))
    state = (of_state[:3], of_state, of_last, of_last)
    arrays = (C, B, *tokens[2:], segment_ids, *weights.values(), *((initial or {}).get(name) for name in states))
    names = (maps, maps, heads, *(heads[:3],) * 3, heads, heads, ROWS, *(of_head,) * len(weights), *state)
    out = sharding.per_device(run, arrays, names, [heads, *state] if keep else heads, split_tokens=not keep)
    return (out[0], dict(zip(states, out[1:], strict=True))) if keep else (out, None)


def causal_conv1d(
    x, weight, bias, *, channels: tuple, activation: str | None, segment_ids, initial_state, gaps: bool,
    rows: sharding.Axis = "batch",
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """`pallas_kernels.causal_conv1d`: (y like x [B, T, *channels], its last inputs [B, W - 1, *channels]).

    weight: [*channels, W]. channels: their logical axes. gaps: whether padding may stand between a document's tokens.
    rows: what splits B of x; where it is not "batch", `exchange.copied_rows`, channels are whole.
    """
    keep = initial_state is not None
    channels = channels if rows == "batch" else (None,) * len(channels)

    def run(x, weight, bias, state, segment_ids, context_axis=None):
        out = pallas_kernels.causal_conv1d(
            x.reshape(*x.shape[:2], -1),
            weight.reshape(-1, weight.shape[-1]),
            None if bias is None else bias.reshape(-1),
            activation=activation,
            segment_ids=segment_ids,
            initial_state=None if state is None else state.reshape(*state.shape[:2], -1),
            return_final_state=keep,
            gaps=gaps,
            context_axis=context_axis,
        )
        return (out[0].reshape(x.shape), out[1].reshape(state.shape)) if keep else out.reshape(x.shape)

    tokens, state = (rows, "tokens", *channels), (rows, None, *channels)
    arrays = (x, weight, bias, initial_state, segment_ids)
    names = (tokens, (*channels, None), channels, state, ROWS)
    return _with_state(run, arrays, names, tokens, state, keep)


def long_conv(x_BTC, h_SC, skip_C, *, channel: str, segment_ids) -> jax.Array:
    """`pallas_kernels.long_conv`: [B, T, C]. skip: or None. channel: logical axis of C."""

    def run(x, h, skip, segment_ids, context_axis=None):
        return pallas_kernels.long_conv(x, h, skip=skip, segment_ids=segment_ids, context_axis=context_axis)

    tokens = (*ROWS, channel)
    arrays, names = (x_BTC, h_SC, skip_C, segment_ids), (tokens, (None, channel), (channel,), ROWS)
    return sharding.per_device(run, arrays, names, tokens, split_tokens=True)


def titans(
    q_BTHP, k_BTHP, v_BTHP, rate_BTH, eta_BTH, alpha_BTH, learned: tuple, *, segment_ids, initial_state, **every
) -> tuple[jax.Array, jax.Array | None]:
    """`pallas_kernels.titans`: (y [B, T, H, P], state [B, H, S]). learned: g [H, P], W1 [H, P, F], W2 [H, F, P]. every:
    store_every and refresh_every."""
    keep = initial_state is not None

    def run(q, k, v, rate, eta, alpha, g, W1, W2, segment_ids, state, context_axis=None):
        return pallas_kernels.titans(
            q, k, v, rate, eta, alpha, g, W1, W2, segment_ids=segment_ids, initial_state=state,
            return_final_state=keep, context_axis=context_axis, **every,
        )  # fmt: skip

    heads, memory, state = (*ROWS, "heads", None), ("heads", None, None), ("batch", "heads", None)
    arrays = (q_BTHP, k_BTHP, v_BTHP, rate_BTH, eta_BTH, alpha_BTH, *learned, segment_ids, initial_state)
    names = (heads, heads, heads, *[heads[:3]] * 3, memory[:2], memory, memory, ROWS, state)
    return _with_state(run, arrays, names, heads, state, keep)


def attention(
    q, k, v, gate, sinks, *, segment_ids: tuple, positions: tuple = (None, None), q_offset=None, layer=None,
    split_tokens: bool = False, causal: bool = True, **options,
) -> jax.Array:  # fmt: skip
    """`pallas_kernels.attention`: [B, T, H, P].

    segment_ids, positions: of queries and of keys. layer: of stacked caches k and v [L, B, S, K, P]; None: k and v are
    [B, S, K, P]. Those of a cache may be `caches.Int8`, or of a smaller type than q: a single query reads them as they
    are, several are worth the layer's keys in the type of q. options: window, scale and softcap. q: or a pair, of it
    and the same in float32, see `q_wide` there; v: or a pair, of it and what has it in its last heads, see `kv`.
    """
    q, q_wide = q if isinstance(q, tuple) else (q, None)
    v, kv = v if isinstance(v, tuple) else (v, None)
    n_heads, n_kv_heads = q.shape[2], k.shape[-2]
    k_scale = v_scale = None
    if not split_tokens and (q.shape[1] > 1 if isinstance(k, caches.Int8) else k.dtype != q.dtype):
        k, v, layer = caches.read(k, layer, q.dtype), caches.read(v, layer, q.dtype), None
    elif isinstance(k, caches.Int8):
        (k, k_scale), (v, v_scale) = (k.values, k.scales), (v.values, v.scales)
    if layer is not None and n_kv_heads % sharding.axis_size("tensor"):
        k, v, k_scale, v_scale = (caches.entry(a, layer) for a in (k, v, k_scale, v_scale))
        layer = None
    if layer is None:
        k, v = (sharding.repeat_for_heads(a, 2, n_heads) for a in (k, v))
        k_scale, v_scale = (a if a is None else sharding.repeat_for_heads(a, 1, n_heads) for a in (k_scale, v_scale))

    def run(q, q_wide, k, v, kv, k_scale, v_scale, gate, sinks, q_ids, k_ids, q_at, k_at, at, layer, context_axis=None):
        return pallas_kernels.attention(
            q, k, v, q_wide=q_wide, kv=kv, k_scale=k_scale, v_scale=v_scale, gate=gate, causal=causal, sinks=sinks,
            segment_ids=None if q_ids is None else (q_ids, k_ids),
            positions=None if q_at is None else (q_at, k_at),
            q_offset=0 if at is None else at,
            layer=layer,
            context_axis=context_axis,
            **options,
        )  # fmt: skip

    heads, kv_heads = (*ROWS, "heads", None), (*ROWS, "kv_heads", None)
    stack = () if layer is None else (None,)
    keys, scales = (*stack, *kv_heads), (*stack, "batch", "kv_heads", "tokens")
    arrays = (q, q_wide, k, v, kv, k_scale, v_scale, gate, sinks, *segment_ids, *positions, q_offset, layer)
    names = (heads, heads, keys, keys, keys, scales, scales, heads, ("heads",), ROWS, ROWS, ROWS, ROWS, ("batch",), ())
    return sharding.per_device(run, arrays, names, heads, split_tokens=split_tokens)


def relative_attention(
    q, k, v, r, profiles_RE, *, segment_ids: tuple, positions: tuple = (None, None), q_offset=None, layer=None,
    split_tokens: bool = False, **options,
) -> jax.Array:  # fmt: skip
    """`pallas_kernels.relative_attention`: [B, T, H, P]. As `attention`; options: window and scale."""
    if q_offset is not None:
        at = q_offset[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        positions = (at, jnp.broadcast_to(jnp.arange(k.shape[-3], dtype=jnp.int32), (q.shape[0], k.shape[-3])))
    if not split_tokens:
        k, v = (caches.read(a, layer, q.dtype) for a in (k, v))
    k, v = (sharding.repeat_for_heads(a, 2, q.shape[2]) for a in (k, v))

    def run(q, k, v, r, profiles, q_ids, k_ids, q_at, k_at, context_axis=None):
        return pallas_kernels.relative_attention(
            q, k, v, r, profiles, context_axis=context_axis,
            segment_ids=None if q_ids is None else (q_ids, k_ids),
            positions=None if q_at is None else (q_at, k_at),
            **options,
        )  # fmt: skip

    heads, kv_heads = (*ROWS, "heads", None), (*ROWS, "kv_heads", None)
    names = (heads, kv_heads, kv_heads, heads, (None, None), ROWS, ROWS, ROWS, ROWS)
    return sharding.per_device(
        run, (q, k, v, r, profiles_RE, *segment_ids, *positions), names, heads, split_tokens=split_tokens
    )


def selected_attention(
    q, k, v, chosen_BTC, blocks_BS, *, places, split_tokens: bool = False, scale: float | None = None
) -> jax.Array:
    """`pallas_kernels.selected_attention`: [B, T, H, P]."""
    k, v = (sharding.repeat_for_heads(a, 2, q.shape[2]) for a in (k, v))

    def run(q, k, v, chosen, blocks, places, context_axis=None):
        return pallas_kernels.selected_attention(
            q, k, v, chosen, blocks, places=places, scale=scale, context_axis=context_axis
        )

    heads, kv_heads = (*ROWS, "heads", None), (*ROWS, "kv_heads", None)
    names = (heads, kv_heads, kv_heads, (*ROWS, None), ROWS, ROWS)
    return sharding.per_device(run, (q, k, v, chosen_BTC, blocks_BS, places), names, heads, split_tokens=split_tokens)


def implementation(tokens_BT: jax.Array, initial_state) -> str:
    """What an op is asked for by mixers without a form of their own for one token: to go through it by its recurrence,
    where a chunk would be computed for it; through more as the op chooses."""
    return "reference" if initial_state is not None and tokens_BT.shape[1] == 1 else "auto"


def _with_state(run: Callable, arrays: tuple, names: tuple, out: tuple, state: tuple, keep: bool) -> tuple:
    """(result, new state or None) of an op; out, state: their logical axes. A row with a state is not split."""
    result = sharding.per_device(run, arrays, names, [out, state] if keep else out, split_tokens=not keep)
    return result if keep else (result, None)


def _with_states(run: Callable, arrays: tuple, names: tuple, out: tuple, states: list[tuple], keep: bool) -> tuple:
    """The same of an op with several states: (result, new states or None)."""
    result = sharding.per_device(run, arrays, names, [out, *states] if keep else out, split_tokens=not keep)
    return (result[0], tuple(result[1:])) if keep else (result, None)
