# SPDX-License-Identifier: Apache-2.0
"""Cross entropy in vocabulary chunks: no array of [batch, tokens, vocabulary] exists, forward or backward.

The logits of one chunk of the vocabulary at a time meet an online logsumexp (Milakov & Gimelshein 2018, "Online
normalizer calculation for softmax"); the backward computes them again from the saved logsumexp. All results are sums
over tokens, so that microbatches and devices add up to exactly the mean over the tokens of the whole batch.

`training_loss` takes chunks of tokens instead where it can, each with all of the vocabulary, and forms the gradient in
the forward: the logits are computed once, not twice.

On a mesh every device takes the products with its own rows of the vocabulary, for the tokens of all devices that share
its rows of the batch: a chunk of whole rows at a time (see `layers.vocabulary`), or all of its rows at once where the
gradient is formed in the forward.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybridlm import exchange, sharding
from hybridlm.layers.vocabulary import CHUNK, TABLE, WHOLE, Places, Summed, layout, places
from pallas_kernels import exponentials
from pallas_kernels.platform import platform

TILE = 128
"""Tokens of which chunks are multiples, where there are several."""
LOGITS = {"gpu": 2**29}
"""By platform: logits of a chunk of tokens, where the gradient is formed in the forward. Elsewhere it is not: a TPU has
less memory beside a step, and nothing was measured there."""


class LossSums(NamedTuple):
    """Sums over the tokens that have a target; each a float32 scalar."""

    nats: jax.Array
    """Cross entropy."""
    z: jax.Array
    """Squared log-partition (z-loss)."""
    tokens: jax.Array
    """How many."""


def cross_entropy(x_BTD, w_VD, targets_BT, *, multiplier=1.0, softcap=None, chunk=CHUNK, shards=1) -> LossSums:
    """Sums of the cross entropy of softmax(softcap(multiplier * x @ w.T)) at the targets, and of logsumexp squared.

    x_BTD: hidden states in the compute type, in which the products are taken (accumulated in float32; all statistics
    are float32). w_VD: unembedding, any float type. targets_BT: int32; -1 is left out. chunk: vocabulary rows taken at
    a time, V need not be divisible. shards: ways in which a device splits its part of V; a chunk takes a slice of each.
    """
    valid_BT = targets_BT >= 0
    nats_BT, lse_BT = token_nats(x_BTD, w_VD, targets_BT, _Spec(multiplier, softcap, chunk, shards))
    return LossSums(
        nats=jnp.sum(jnp.where(valid_BT, nats_BT, 0.0)),
        z=jnp.sum(jnp.where(valid_BT, jnp.square(lse_BT), 0.0)),
        tokens=jnp.sum(valid_BT, dtype=jnp.float32),
    )


def token_losses(x_BTD, w_VD, targets_BT, *, multiplier=1.0, softcap=None, chunk=CHUNK) -> jax.Array:
    """The cross entropy of each token, float32 [B, T], 0 where the target is -1; arguments as of `cross_entropy`."""
    nats_BT, _ = token_nats(x_BTD, w_VD, targets_BT, _Spec(multiplier, softcap, chunk, 1))
    return jnp.where(targets_BT >= 0, nats_BT, 0.0)


def training_loss(
    x_BTD, w_VD: Any, targets_BT, *, z_loss=0.0, multiplier=1.0, softcap=None, n_logits=None, weight=1.0
) -> tuple[jax.Array, LossSums]:
    """(weight * (cross entropy + z_loss * squared log-partition), `cross_entropy`), summed; only the first has a
    gradient.

    Other arguments as of `cross_entropy`. n_logits: about as many of a chunk's tokens times V are in memory, in float32
    and in the compute type; None: see LOGITS. weight: float or float32 scalar. Columns of the table that are split are
    put together once, and the gradient of whole rows, float32, is in memory before it is scattered.

    w: or a `Summed` of which this is the last reader, where the gradient is formed in the forward: it is added to the
    sums chunk by chunk. They are right only where the first result is the objective but for what is added to it: its
    weight has to be `weight`, and sums are NaN where it is multiplied by more.
    """
    n_logits = LOGITS.get(platform()) if n_logits is None else n_logits
    if n_logits is None:
        sums = cross_entropy(x_BTD, w_VD, targets_BT, multiplier=multiplier, softcap=softcap)
        return weight * (sums.nats + z_loss * sums.z), jax.tree.map(lax.stop_gradient, sums)
    spec = _Formed(multiplier, softcap, z_loss, n_logits)
    w_VD, dw_NVD = (w_VD.value, w_VD.sums) if isinstance(w_VD, Summed) else (w_VD, None)
    total, nats, z = _formed(x_BTD, w_VD, targets_BT, dw_NVD, lax.stop_gradient(jnp.float32(weight)), spec)
    nats, z = lax.stop_gradient((nats, z))
    return total, LossSums(nats, z, jnp.sum(targets_BT >= 0, dtype=jnp.float32))


class _Formed(NamedTuple):
    multiplier: float
    softcap: float | None
    z_loss: float
    n_logits: int


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _formed(x_BTD, w_VD, targets_BT, sums_NVD, weight, spec: _Formed):
    """(weight * (cross entropy + z-loss), the one, the other without its weight), summed over tokens. sums: to which
    the gradient of the table is added in its place; None: it has its own."""
    sums = cross_entropy(x_BTD, w_VD, targets_BT, multiplier=spec.multiplier, softcap=spec.softcap)
    return weight * (sums.nats + spec.z_loss * sums.z), sums.nats, sums.z


def _formed_forward(x_BTD, w_VD, targets_BT, sums_NVD, weight, spec: _Formed):
    where, summed = places(targets_BT.shape, w_VD.shape), sums_NVD is not None

    def run(x_BTD, w_VD, targets_BT, weight, *sums_1VD):
        w_VD = w_VD.astype(x_BTD.dtype)
        w_VD = w_VD if summed else where.whole_rows(w_VD)
        start_VD = sums_1VD[0][0] if summed else jnp.zeros(w_VD.shape, jnp.float32)
        nats, z, dx_BTD, dw_VD = _local_formed(where.enter(x_BTD), w_VD, targets_BT, weight, start_VD, spec, where)
        nats, z = (exchange.add(a, where.tokens) for a in (nats, z))
        return nats, z, where.leave(dx_BTD), dw_VD[None]

    outs = [((), ()), ((), ()), (sharding.STREAM, x_BTD.shape), (where.partial, (1, *w_VD.shape))]
    arrays = [x_BTD, w_VD, targets_BT, weight, *([sums_NVD] if summed else [])]
    axes = [sharding.STREAM, WHOLE if summed else TABLE, where.at, (), *([where.partial] if summed else [])]
    nats, z, dx_BTD, dw_NVD = exchange.manual(run, arrays, axes, outs)
    like = jnp.zeros((0,), x_BTD.dtype), None if summed else jnp.zeros((0,), w_VD.dtype)
    return (weight * (nats + spec.z_loss * z), nats, z), (dx_BTD, dw_NVD, like)


def _formed_backward(spec: _Formed, saved, cotangents):
    """The gradient of the table is summed over devices here, behind its factor: so it is one sum with that of a look-up
    in the same table, and of all microbatches, which the compiler makes of sums that are added."""
    del spec
    dx_BTD, dw_NVD, (x, w) = saved
    dx_BTD = (cotangents[0] * dx_BTD).astype(x.dtype)
    if w is None:
        return dx_BTD, None, None, jnp.where(cotangents[0] == 1.0, dw_NVD, jnp.nan), None
    where = places(dx_BTD.shape[:2], dw_NVD.shape[1:])
    run = lambda dw_1VD, factor: where.sum_rows(factor * dw_1VD[0])
    axes, out = (where.partial, ()), (TABLE, dw_NVD.shape[1:])
    dw_VD = exchange.manual(run, (dw_NVD, cotangents[0]), axes, out)
    return dx_BTD, dw_VD.astype(w.dtype), None, None, None


_formed.defvjp(_formed_forward, _formed_backward)


def _local_formed(x_BTD, w_VD, targets_BT, weight, start_VD, spec: _Formed, where: Places):
    """(cross entropy, squared log-partition) of a device's tokens, and the gradients of their weighted sum, float32:
    that of the tokens is what the device's rows of the table give to it, that of the rows is added to `start`. w: those
    rows, in the type of x."""
    (n_vocab, d_model), n_tokens = w_VD.shape, targets_BT.size
    of_products = _chunks_of_products(n_tokens, w_VD, spec, where)
    n_chunks, rows = of_products or _token_chunks(n_tokens, spec.n_logits // n_vocab)
    missing = n_chunks * rows - n_tokens
    x_CRD = jnp.pad(x_BTD.reshape(n_tokens, d_model), ((0, missing), (0, 0))).reshape(n_chunks, rows, d_model)
    target_CR = jnp.pad(targets_BT.reshape(n_tokens), (0, missing), constant_values=-1).reshape(n_chunks, rows)
    in_one_pass = spec.softcap is None and exponentials.why_not(rows, n_vocab, x_BTD.dtype) is None
    of_chunk = _in_products if of_products else _in_one_pass if in_one_pass else _in_two_passes

    def step(carry, chunk):
        nats, z, dw_VD = carry
        x_RD, target_R = chunk
        is_real_R = target_R >= 0
        nats_R, lse_R, d_RV, factor_R = of_chunk(x_RD, w_VD, target_R, weight, spec, where)
        nats += jnp.sum(jnp.where(is_real_R, nats_R, 0.0))
        z += jnp.sum(jnp.where(is_real_R, jnp.square(lse_R), 0.0))
        dx_RD = jnp.einsum("rv,vd->rd", d_RV, w_VD, preferred_element_type=jnp.float32)
        if factor_R is not None:
            dx_RD, x_RD = dx_RD * factor_R[:, None], (x_RD * factor_R[:, None]).astype(x_RD.dtype)
        dw_VD += jnp.einsum("rv,rd->vd", d_RV, x_RD, preferred_element_type=jnp.float32)
        return (nats, z, dw_VD), dx_RD

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, start_VD)
    (nats, z, dw_VD), dx_CRD = lax.scan(step, start, (x_CRD, target_CR))
    return nats, z, dx_CRD.reshape(-1, d_model)[:n_tokens].reshape(x_BTD.shape), dw_VD


def _token_chunks(n_tokens: int, most: int) -> tuple[int, int]:
    """(chunks, tokens of each) of about `most`; up to twice as many chunks, if they are equal then without padding."""
    fewest = -(-n_tokens // max(most, 1))
    for n_chunks in range(fewest, 2 * fewest):
        if n_tokens % n_chunks == 0 and (n_chunks == 1 or n_tokens // n_chunks % TILE == 0):
            return n_chunks, n_tokens // n_chunks
    rows = -(-n_tokens // fewest)
    rows = rows if fewest == 1 else -(-rows // TILE) * TILE
    return -(-n_tokens // rows), rows


def _at_target(logits, target_R, where: Places):
    """The logit at each token's target, of this device's rows (which `target_R` counts) or another's; 0 of none."""
    n_vocab = logits.shape[1]
    at_target_R = jnp.take_along_axis(logits, jnp.clip(target_R, 0, n_vocab - 1)[:, None], axis=1)[:, 0]
    if not where.rows:
        return at_target_R
    here_R = (target_R >= 0) & (target_R < n_vocab)
    return exchange.add(jnp.where(here_R, at_target_R, 0.0), where.rows)


def _d_lse(lse_R, is_real_R, spec: _Formed):
    """The derivative of the objective by the log-partition."""
    return jnp.where(is_real_R, 1.0 + 2.0 * spec.z_loss * lse_R, 0.0)


def _in_two_passes(x_RD, w_VD, target_R, weight, spec: _Formed, where: Places):
    """(cross entropy, log-partition, weighted gradient of the products, its factor: None) of a chunk's tokens."""
    products = jnp.einsum("rd,vd->rv", x_RD, w_VD, preferred_element_type=jnp.float32)
    logits, d_softcap = _capped(products, spec)
    lse_R, is_real_R = _over_rows(_log_sum_exp(logits), where.rows), target_R >= 0
    target_R -= where.first_row(logits.shape[1])
    at_target_R = _at_target(logits, target_R, where)
    hit = jnp.arange(logits.shape[1])[None] == target_R[:, None]
    d_logits = jnp.exp(logits - lse_R[:, None]) * _d_lse(lse_R, is_real_R, spec)[:, None] - hit
    d_logits = d_logits if d_softcap is None else d_logits * d_softcap
    return lse_R - at_target_R, lse_R, (d_logits * (weight * spec.multiplier)).astype(x_RD.dtype), None


def _in_one_pass(x_RD, w_VD, target_R, weight, spec: _Formed, where: Places):
    """The same by a kernel that reads the products once."""
    products = jnp.einsum("rd,vd->rv", x_RD, w_VD, preferred_element_type=jnp.float32)
    target_R -= where.first_row(len(w_VD))
    at_target_R = spec.multiplier * _at_target(products, target_R, where)
    found = exponentials.exponentials(products, at_target_R, spec.multiplier)
    return _from_exponentials(*found, at_target_R, target_R, weight, spec, where)


def _chunks_of_products(n_tokens: int, w_VD, spec: _Formed, where: Places) -> tuple[int, int] | None:
    """(chunks, tokens of each) where `_in_products` serves: a third of the bytes of a chunk's logits is left."""
    n_chunks, rows = _token_chunks(n_tokens, 2 * spec.n_logits // len(w_VD))
    rows = -(-rows // exponentials.OF_PRODUCTS[0]) * exponentials.OF_PRODUCTS[0]
    reason = exponentials.why_not_products(rows, w_VD.shape[1], len(w_VD), w_VD.dtype)
    return None if where.rows or spec.softcap is not None or reason else (n_chunks, rows)


def _in_products(x_RD, w_VD, target_R, weight, spec: _Formed, where: Places):
    """The same by a kernel that makes the products: they are not stored."""
    w_RD = w_VD[jnp.clip(target_R, 0, len(w_VD) - 1)]
    at_target_R = spec.multiplier * jnp.einsum("rd,rd->r", x_RD, w_RD, preferred_element_type=jnp.float32)
    found = exponentials.product_exponentials(x_RD, w_VD, at_target_R, spec.multiplier)
    return _from_exponentials(*found, at_target_R, target_R, weight, spec, where)


def _from_exponentials(e_RV, sum_R, base_R, at_target_R, target_R, weight, spec: _Formed, where: Places):
    """Exponentials beside the target's logit are the gradient up to a factor of each token, all but that at the target,
    which is put in its place."""
    n_vocab = e_RV.shape[1]
    is_real_R = target_R >= -where.first_row(n_vocab)
    lse_R = _over_rows(base_R + jnp.log(sum_R), where.rows)
    d_lse_R = _d_lse(lse_R, is_real_R, spec)
    hit_R = jnp.exp(at_target_R - base_R) - jnp.where(is_real_R, jnp.exp(lse_R - base_R) / d_lse_R, 0.0)
    of_row_R = jnp.where((target_R >= 0) & (target_R < n_vocab) & is_real_R, target_R, n_vocab)
    e_RV = e_RV.at[jnp.arange(len(of_row_R)), of_row_R].set(
        hit_R.astype(e_RV.dtype), mode="drop", unique_indices=True, indices_are_sorted=True
    )
    return lse_R - at_target_R, lse_R, e_RV, weight * spec.multiplier * d_lse_R * jnp.exp(base_R - lse_R)


def _log_sum_exp(logits):
    """Over the last axis, in one pass: the maximum and the sum of exponentials are reduced together."""

    def combine(a, b):
        (max_a, sum_a), (max_b, sum_b) = a, b
        both = jnp.maximum(max_a, max_b)
        safe = jnp.where(both == -jnp.inf, 0.0, both)
        return both, sum_a * jnp.exp(max_a - safe) + sum_b * jnp.exp(max_b - safe)

    start = jnp.float32(-jnp.inf), jnp.float32(0.0)
    largest, total = lax.reduce((logits, jnp.ones_like(logits)), start, combine, (logits.ndim - 1,))
    return largest + jnp.log(total)


def _over_rows(lse_R, rows: tuple[str, ...]):
    """Of the logits of all devices, from each one's own."""
    if not rows:
        return lse_R
    largest_R = lax.pmax(lse_R, rows)
    return largest_R + jnp.log(exchange.add(jnp.exp(lse_R - largest_R), rows))


class _Spec(NamedTuple):
    multiplier: float
    softcap: float | None
    chunk: int
    shards: int


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_nats(x_BTD, w_VD, targets_BT, spec: _Spec):
    """(cross entropy, logsumexp) of each token, float32 [B, T]; where the target is -1 only the second counts."""
    return _forward(x_BTD, w_VD, targets_BT, spec)[0]


def _chunks(w_VD, dtype, spec: _Spec):
    """w as [chunks, shards, rows, D] (the rows beyond V are zero), and each row's vocabulary id, -1 beyond V."""
    n_vocab, d_model = w_VD.shape
    shard, n_chunks, rows = layout(n_vocab, spec.chunk, spec.shards)
    w_VD = jnp.pad(w_VD.astype(dtype), ((0, spec.shards * shard - n_vocab), (0, 0)))
    w_SVD = jnp.pad(w_VD.reshape(spec.shards, shard, d_model), ((0, 0), (0, n_chunks * rows - shard), (0, 0)))
    w_CSVD = w_SVD.reshape(spec.shards, n_chunks, rows, d_model).swapaxes(0, 1)
    row_CV = jnp.arange(n_chunks * rows).reshape(n_chunks, 1, rows)
    id_CSV = jnp.arange(spec.shards)[None, :, None] * shard + row_CV
    return w_CSVD, jnp.where((row_CV < shard) & (id_CSV < n_vocab), id_CSV, -1)


def _logits(x_BTD, w_SVD, spec: _Spec):
    """Logits of a chunk, float32 [B, T, shards, rows], and the derivative of the softcap there."""
    return _capped(jnp.einsum("btd,svd->btsv", x_BTD, w_SVD, preferred_element_type=jnp.float32), spec)


def _capped(products, spec: _Spec | _Formed):
    """Logits of products with the table, and the derivative of the softcap there."""
    logits = products * spec.multiplier
    if spec.softcap is None:
        return logits, None
    tanh = jnp.tanh(logits / spec.softcap)
    return spec.softcap * tanh, 1.0 - jnp.square(tanh)


def _forward(x_BTD, w_VD, targets_BT, spec: _Spec):
    where = places(x_BTD.shape[:2], w_VD.shape)

    def run(x_BTD, w_VD, targets_BT):
        targets_BT = targets_BT - where.first_row(w_VD.shape[0]) if where.rows else targets_BT
        return _local_forward(where.enter(x_BTD), w_VD, targets_BT, spec, where)

    axes, of_token = (sharding.STREAM, TABLE, where.at), (where.at, targets_BT.shape)
    nats_BT, lse_BT = exchange.manual(run, (x_BTD, w_VD, targets_BT), axes, [of_token, of_token])
    return (nats_BT, lse_BT), (x_BTD, w_VD, targets_BT, lse_BT)


def _local_forward(x_BTD, w_VD, targets_BT, spec: _Spec, where: Places):
    """(cross entropy, logsumexp) of a device's tokens. w: its part of the table; targets: from its first row on."""
    zeros_BTS = jnp.zeros((*x_BTD.shape[:2], spec.shards), jnp.float32)

    def step(carry, chunk):
        """Online logsumexp and target logit, kept per shard: what shares V meets once, at the end."""
        max_BTS, sum_BTS, target_BTS = carry
        w_SVD, id_SV = chunk
        logits, _ = _logits(x_BTD, where.whole_rows(w_SVD), spec)
        logits = jnp.where(id_SV >= 0, logits, -jnp.inf)
        new_max_BTS = jnp.maximum(max_BTS, logits.max(-1))
        safe_max_BTS = jnp.where(new_max_BTS == -jnp.inf, 0.0, new_max_BTS)  # a shard or chunk of padding alone
        terms = jnp.exp(logits - safe_max_BTS[..., None]).sum(-1)
        sum_BTS = sum_BTS * jnp.exp(max_BTS - safe_max_BTS) + terms
        hit = (id_SV[None, None] == targets_BT[..., None, None]) & (id_SV >= 0)[None, None]
        target_BTS = target_BTS + jnp.where(hit, logits, 0.0).sum(-1)
        return (new_max_BTS, sum_BTS, target_BTS), None

    start = (zeros_BTS - jnp.inf, zeros_BTS, zeros_BTS)
    (max_BTS, sum_BTS, target_BTS), _ = lax.scan(step, start, _chunks(w_VD, x_BTD.dtype, spec))
    max_BT = max_BTS.max(-1)
    max_BT = lax.pmax(max_BT, where.rows) if where.rows else max_BT
    sum_BT = exchange.add((sum_BTS * jnp.exp(max_BTS - max_BT[..., None])).sum(-1), where.rows)
    lse_BT = max_BT + jnp.log(sum_BT)
    return lse_BT - exchange.add(target_BTS.sum(-1), where.rows), lse_BT


def _backward(spec: _Spec, saved, cotangents):
    x_BTD, w_VD, targets_BT, lse_BT = saved
    where = places(x_BTD.shape[:2], w_VD.shape)

    def run(x_BTD, w_VD, targets_BT, lse_BT, *cotangents):
        targets_BT = targets_BT - where.first_row(w_VD.shape[0]) if where.rows else targets_BT
        return _local_backward(where.enter(x_BTD), w_VD, targets_BT, lse_BT, cotangents, spec, where)

    arrays = (x_BTD, w_VD, targets_BT, lse_BT, *cotangents)
    axes = (sharding.STREAM, TABLE, *[where.at] * 4)
    outs = [(sharding.STREAM, x_BTD.shape), (TABLE, w_VD.shape)]
    return *exchange.manual(run, arrays, axes, outs), None


def _local_backward(x_BTD, w_VD, targets_BT, lse_BT, cotangents, spec: _Spec, where: Places):
    """Gradients of the stream's tokens and of a device's part of the table; arguments as of `_local_forward`."""
    d_nats_BT, d_lse_BT = cotangents
    batch, tokens, d_model = x_BTD.shape

    def step(dx_BTSD, chunk):
        w_SVD, id_SV = chunk
        w_SVD = where.whole_rows(w_SVD)
        logits, d_softcap = _logits(x_BTD, w_SVD, spec)
        prob = jnp.where(id_SV >= 0, jnp.exp(logits - lse_BT[..., None, None]), 0.0)
        hit = (id_SV[None, None] == targets_BT[..., None, None]) & (id_SV >= 0)[None, None]
        d_logits = prob * (d_nats_BT + d_lse_BT)[..., None, None] - jnp.where(hit, d_nats_BT[..., None, None], 0.0)
        if d_softcap is not None:
            d_logits = d_logits * d_softcap
        d_logits = (d_logits * spec.multiplier).astype(x_BTD.dtype)
        dx_BTSD += jnp.einsum("btsv,svd->btsd", d_logits, w_SVD, preferred_element_type=jnp.float32)
        dw_SVD = jnp.einsum("btsv,btd->svd", d_logits, x_BTD, preferred_element_type=jnp.float32)
        return dx_BTSD, where.sum_rows(dw_SVD)

    dx_BTSD = jnp.zeros((batch, tokens, spec.shards, d_model), jnp.float32)
    dx_BTSD, dw_CSVD = lax.scan(step, dx_BTSD, _chunks(w_VD, x_BTD.dtype, spec))
    shard = layout(w_VD.shape[0], spec.chunk, spec.shards)[0]
    dw_SVD = dw_CSVD.swapaxes(0, 1).reshape(spec.shards, -1, w_VD.shape[1])[:, :shard]
    dw_VD = dw_SVD.reshape(-1, w_VD.shape[1])[: w_VD.shape[0]]
    return where.leave(dx_BTSD.sum(2)).astype(x_BTD.dtype), dw_VD.astype(w_VD.dtype)


token_nats.defvjp(_forward, _backward)
