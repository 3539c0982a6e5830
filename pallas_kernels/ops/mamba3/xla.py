# SPDX-License-Identifier: Apache-2.0
"""`mamba3` in chunks of matrix products: any backend, memory linear in T (see `pallas_kernels.chunks`).

A token's product of value and key enters the state twice: with `now` at the token, and with `lag` of the next one, then
decayed as all before it. Behind the next token the two are one weight, `now_j + lag_(j+1)`; at the token itself it is
`now_j`. So a chunk is that of `ssd`, but for its diagonal. A state handed from chunk to chunk has the next token's
share in it already; one that leaves a slab has not, and is the recurrence's own.

With rank R a token has R queries and keys, which stand side by side in the products.
"""

import functools
import typing

import jax
import jax.numpy as jnp

from pallas_kernels import chunks, platform
from pallas_kernels.by_token import rows_where, tokens_where
from pallas_kernels.ops.mamba3 import parts
from pallas_kernels.ops.mamba3.reference import STATES, accumulation_dtype, empty_states

BLOCK = 128  # tokens whose turns one product adds up
PARTS = 256  # of a circle: any number of them up to all is one that bfloat16 has
PART = parts.TURN / PARTS


def mamba3_xla(q_BTRGN, k_BTRGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS, *, z, segment_ids=None,
               return_final_state=False, chunk=None, **more):  # fmt: skip
    """See `pallas_kernels.mamba3`. Without MIMO the rank R is 1, and its weights None."""
    tokens = (q_BTRGN, k_BTRGN, v_BTHP, adt_BTH, dt_BTH, trap_BTH, angles_BTHS, z)
    states = [more.pop(name) for name in STATES]
    dtype = accumulation_dtype(tokens)
    if states[0] is None:
        states = empty_states(q_BTRGN, k_BTRGN, v_BTHP, angles_BTHS)
    if segment_ids is None:
        segment_ids = jnp.ones_like(adt_BTH[:, :, 0], jnp.int32)
    chunk = chunks.chunk_size(chunk, v_BTHP.shape[1])
    slab = functools.partial(_slab, dtype=dtype, chunk=chunk, **more)
    states = tuple(state.astype(dtype) for state in states)
    y_BTHP, states = chunks.scan_slabs(slab, tokens, segment_ids, states, chunk)
    return (y_BTHP, *states) if return_final_state else y_BTHP


def _slab(tokens, marks: chunks.Marks, states, *, q_bias, k_bias, D, mimo_v, rotary_pairs, dtype, chunk, **more):
    """(y, leaving states) of one slab."""
    y_dtype = tokens[2].dtype
    tokens = tuple(None if array is None else array.astype(dtype) for array in tokens)
    weights = {"q_bias": q_bias, "k_bias": k_bias, "mimo_v": mimo_v}
    written = prepare(tokens, states, marks, **weights, rotary_pairs=rotary_pairs)
    y_BTHRP, left_BHNP = _read(written, tokens[3], marks, chunk)
    if D is not None:
        y_BTHRP += D.astype(dtype)[None, None, :, None, None] * written.v_BTHRP
    y_BTHP = parts.output(y_BTHRP, tokens[7], **more).astype(y_dtype)
    angle_BHS, k_BHRN, v_BHRP = written.last
    return y_BTHP, (angle_BHS, left_BHNP.swapaxes(-1, -2), k_BHRN, v_BHRP)


class Written(typing.NamedTuple):
    """What tokens write to the state and read it by."""

    q_BTHRN: jax.Array  # turned, as are the keys
    k_BTHRN: jax.Array
    v_BTHRP: jax.Array
    now_BTH: jax.Array  # weight of a token's product at the token
    later_BTH: jax.Array  # what the next one adds to it
    state_BHNP: jax.Array  # that enters, with the first token's share of the last product before
    last: tuple  # angle, k and v of the last real token
    angle_BTHS: jax.Array


def prepare(tokens, states, marks: chunks.Marks, *, q_bias, k_bias, mimo_v, rotary_pairs: str, narrow=None) -> Written:
    """Of tokens without anything in padding, all in the dtype that is computed in.

    With `narrow`, a dtype, queries and keys are rounded to it, with gradients that are not, and with none to the angles
    that they are turned by.
    """
    q, k, v, _, dt_BTH, trap_BTH, angles, _ = tokens
    angle_BHS, ssm_BHPN, k_state_BHRN, v_state_BHRP = states
    n_heads = v.shape[2]
    angle_BTHS = _angles(dt_BTH[..., None] * jnp.pi * jnp.tanh(angles), angle_BHS, marks)

    pair = [biased(*array, n_heads) for array in ((q, q_bias), (k, k_bias))]
    turned = lambda angle: (parts.rotate(array, angle[:, :, :, None], rotary_pairs) for array in pair)
    q_BTHRN, k_BTHRN = turned(angle_BTHS)
    last_k = _last(k_BTHRN, k_state_BHRN, marks)
    if narrow is not None:
        bits = jnp.finfo(narrow)
        q_BTHRN, k_BTHRN = (_rounded(array, bits) for array in turned(jax.lax.stop_gradient(angle_BTHS)))
    v_BTHRP = valued(v, mimo_v)
    now_BTH, lag_BTH = (share * dt_BTH for share in (jax.nn.sigmoid(trap_BTH), jax.nn.sigmoid(-trap_BTH)))
    later_BTH, first_lag_BH = _lags(lag_BTH, marks)
    state_BHNP = jnp.einsum("bhrp,bhrn->bhnp", v_state_BHRP, k_state_BHRN) * first_lag_BH[..., None, None]
    state_BHNP += ssm_BHPN.swapaxes(-1, -2)
    last = _last(angle_BTHS, angle_BHS, marks), last_k, _last(v_BTHRP, v_state_BHRP, marks)
    return Written(q_BTHRN, k_BTHRN, v_BTHRP, now_BTH, later_BTH, state_BHNP, last, angle_BTHS)


def biased(array_BTRGN, bias_HRN, n_heads: int):
    """[B, T, H, R, N]: queries or keys of each head."""
    array_BTRHN = jnp.repeat(array_BTRGN, n_heads // array_BTRGN.shape[3], axis=3)
    array_BTHRN = array_BTRHN.swapaxes(2, 3)
    return array_BTHRN if bias_HRN is None else array_BTHRN + bias_HRN.astype(array_BTHRN.dtype)[None, None]


def valued(v_BTHP, mimo_v_HRP):
    """[B, T, H, R, P]: values of each rank."""
    v_BTH1P = v_BTHP[:, :, :, None]
    return v_BTH1P if mimo_v_HRP is None else v_BTH1P * mimo_v_HRP.astype(v_BTHP.dtype)[None, None]


def _rounded(array, bits):
    """Rounded to a floating-point format, with a gradient that is not."""
    rounded = jax.lax.reduce_precision(array, bits.nexp, bits.nmant)  # a conversion there and back XLA may leave out
    return array + jax.lax.stop_gradient(rounded - array)


def _read(written: Written, adt_BTH, marks: chunks.Marks, chunk: int):
    """(y of each rank, leaving state) of what is written."""
    n_rank = written.k_BTHRN.shape[3]
    cut = lambda array: chunks.cut(array, chunk)  # [B, C, H, Q, ...]
    flat = lambda array: array.reshape(*array.shape[:3], chunk * n_rank, array.shape[-1])
    by_rank = lambda array_BCHQ1: jnp.repeat(array_BCHQ1, n_rank, axis=-2)
    q, k, v = (flat(cut(array)) for array in (written.q_BTHRN, written.k_BTHRN, written.v_BTHRP))
    weights = (adt_BTH, written.now_BTH, written.now_BTH + written.later_BTH)
    adt, now, weight = (cut(array) for array in weights)
    decays = chunks.decays_of(adt[..., None], chunks.seen_of(marks, chunk))
    is_own = jnp.expand_dims(jnp.eye(chunk, dtype=bool), (0, 1, 2))
    pairs = jnp.where(is_own, now[..., None, :], chunks.weights(decays) * weight[..., None, :])
    pairs = jnp.repeat(jnp.repeat(pairs, n_rank, axis=-2), n_rank, axis=-1)
    added = chunks.dot_tokens(k * by_rank(decays.after_BCHQZ * weight[..., None]), v)

    def step(state_BHNP, chunk):
        added, through_BH1 = chunk
        return through_BH1[..., None] * state_BHNP + added, state_BHNP

    entering, state_BHNP = chunks.carry(step, written.state_BHNP, (added, decays.through_BCHZ))
    y = chunks.dot(chunks.dot(q, jnp.swapaxes(k, -1, -2)) * pairs, v)
    y += chunks.dot(q * by_rank(decays.upto_BCHQZ), entering)
    return chunks.uncut(y.reshape(*y.shape[:3], chunk, n_rank, y.shape[-1])), state_BHNP


def _angles(turns_BTHS, entering_BHS, marks: chunks.Marks):
    """Turns added up from each document's start, wrapped at each sum so that long rows lose nothing."""
    add = added if platform.platform() == "gpu" else added_in_blocks
    sums_BTHS = add(turns_BTHS, marks.document_BT != marks.entering_BT)
    is_entering_BT = marks.document_BT == marks.entering_BT[:, :1]
    return parts.wrapped(sums_BTHS + tokens_where(is_entering_BT, entering_BHS[:, None]))


def added(turns_BTHS, starts_BT):
    """Sums over tokens, from where one starts, in an associative scan; wrapped."""

    def join(earlier, later):
        return earlier[0] | later[0], parts.wrapped(jnp.where(later[0], later[1], earlier[1] + later[1]))

    return jax.lax.associative_scan(join, (starts_BT[..., None, None], turns_BTHS), axis=1)[1]


def added_in_blocks(turns_BTHS, starts_BT):
    """The same, not wrapped: by products with ones within blocks of tokens, and in a scan from block to block. What an
    associative scan reads are strides over tokens, for which a TPU moves the whole array at every step; it takes longer
    to compile, too. On a GPU this form was not timed.

    A turn is a whole number of parts of a circle, whose sums are exact in bfloat16 products, and a rest below one part.
    """
    block = min(BLOCK, turns_BTHS.shape[1])
    starts_BCQ, turns_BCQHS = (_blocks(array, block) for array in (starts_BT, turns_BTHS))
    whole_BCQHS = jnp.round(jax.lax.stop_gradient(turns_BCQHS) / PART)
    rest_BCQHS = turns_BCQHS - whole_BCQHS * PART
    run_BCQ = jnp.cumsum(starts_BCQ, axis=2, dtype=jnp.int32)
    adds_BCQQ = (run_BCQ[..., :, None] == run_BCQ[..., None, :]) & jnp.tri(block, dtype=bool)[None, None]
    add = functools.partial(jnp.einsum, "bcij,bcjhs->bcihs", precision=jax.lax.Precision.HIGHEST)
    adds, whole = (array.astype(jnp.bfloat16) for array in (adds_BCQQ, whole_BCQHS % PARTS))
    sums_BCQHS = add(adds, whole, preferred_element_type=rest_BCQHS.dtype) % PARTS * PART
    sums_BCQHS += add(adds_BCQQ.astype(rest_BCQHS.dtype), rest_BCQHS)
    ends_BCHS = added(sums_BCQHS[:, :, -1], run_BCQ[:, :, -1] > 0)
    before_BCHS = jnp.pad(ends_BCHS[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)])
    sums_BCQHS += jnp.where((run_BCQ == 0)[..., None, None], before_BCHS[:, :, None], 0)
    return sums_BCQHS.reshape(len(turns_BTHS), -1, *turns_BTHS.shape[2:])[:, : turns_BTHS.shape[1]]


def _blocks(array_BT, block: int):
    """[B, C, Q, ...], with nothing behind the last token."""
    rest = array_BT.shape[2:]
    array_BT = jnp.pad(array_BT, [(0, 0), (0, -array_BT.shape[1] % block), *((0, 0) for _ in rest)])
    return array_BT.reshape(len(array_BT), -1, block, *rest)


def _lags(lag_BTH, marks: chunks.Marks):
    """(lag of the next real token of the same document, that of the first one if its document enters); else 0."""
    n_tokens = lag_BTH.shape[1]
    place_BT = jnp.where(marks.real_BT, jnp.arange(n_tokens)[None], n_tokens)
    at_or_after_BT = jax.lax.cummin(place_BT, axis=1, reverse=True)
    next_BT = jnp.pad(at_or_after_BT[:, 1:], ((0, 0), (0, 1)), constant_values=n_tokens)

    def at(places_BT, document_BT):
        inside_BT = jnp.minimum(places_BT, n_tokens - 1)
        found_BT = jnp.take_along_axis(marks.document_BT, inside_BT, axis=1) == document_BT
        lag = jnp.take_along_axis(lag_BTH, inside_BT[..., None], axis=1)
        return tokens_where(found_BT & (places_BT < n_tokens), lag)

    return at(next_BT, marks.document_BT), at(at_or_after_BT[:, :1], marks.entering_BT[:, :1])[:, 0]


def _last(array_BT, state_B, marks: chunks.Marks):
    """Of the last real token, of the state where there is none. A sum over tokens, of which it is one: the gradient of
    a gather is a scatter, which would write an array as large again where nobody asks for the state."""
    after_BT = jnp.cumsum(marks.real_BT[:, ::-1], axis=1)[:, ::-1]
    is_last_BT = marks.real_BT & (after_BT == 1)
    return rows_where(jnp.any(marks.real_BT, axis=1), jnp.sum(tokens_where(is_last_BT, array_BT), axis=1), state_B)
