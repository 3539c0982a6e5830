# SPDX-License-Identifier: Apache-2.0
"""Cross entropy in vocabulary chunks: no array of [batch, tokens, vocabulary] exists, forward or backward.

The logits of one chunk of the vocabulary at a time meet an online logsumexp (Milakov & Gimelshein 2018, "Online
normalizer calculation for softmax"); the backward computes them again from the saved logsumexp. All results are sums
over tokens, so that microbatches and devices add up to exactly the mean over the tokens of the whole batch.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybridlm.sharding import axis_size, constrain

CHUNK = 4096
"""Vocabulary rows of a chunk, per shard of the vocabulary."""


class LossSums(NamedTuple):
    """Sums over the tokens that have a target; each a float32 scalar."""

    nats: jax.Array
    """Cross entropy."""
    z: jax.Array
    """Squared log-partition (z-loss)."""
    tokens: jax.Array
    """How many."""


def cross_entropy(x_BTD, w_VD, targets_BT, *, multiplier=1.0, softcap=None, chunk=CHUNK, shards=None) -> LossSums:
    """Sums of the cross entropy of softmax(softcap(multiplier * x @ w.T)) at the targets, and of logsumexp squared.

    x_BTD: hidden states in the compute type, in which the products are taken (accumulated in float32; all statistics
    are float32). w_VD: unembedding, any float type. targets_BT: int32; -1 is left out. chunk: vocabulary rows taken at
    a time, V need not be divisible. shards: ways in which V is split (None: the mesh axis `tensor`); a chunk
    takes a slice of every shard, so no device needs another's rows.
    """
    shards = axis_size("tensor") if shards is None else shards
    valid_BT = targets_BT >= 0
    nats_BT, lse_BT = token_nats(x_BTD, w_VD, targets_BT, _Spec(multiplier, softcap, chunk, shards))
    return LossSums(
        nats=jnp.sum(jnp.where(valid_BT, nats_BT, 0.0)),
        z=jnp.sum(jnp.where(valid_BT, jnp.square(lse_BT), 0.0)),
        tokens=jnp.sum(valid_BT, dtype=jnp.float32),
    )


class _Spec(NamedTuple):
    multiplier: float
    softcap: float | None
    chunk: int
    shards: int


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_nats(x_BTD, w_VD, targets_BT, spec: _Spec):
    """(cross entropy, logsumexp) of each token, float32 [B, T]; where the target is -1 only the second counts."""
    return _forward(x_BTD, w_VD, targets_BT, spec)[0]


def _layout(n_vocab: int, spec: _Spec) -> tuple[int, int, int]:
    """(rows of a shard, chunks of a shard, rows of a chunk); chunks of even size, on TPU and GPU tiles if large."""
    shard = -(-n_vocab // spec.shards)
    n_chunks = -(-shard // min(spec.chunk, shard))
    rows = -(-shard // n_chunks)
    if rows > 128 and n_chunks > 1:
        rows = -(-rows // 128) * 128
        n_chunks = -(-shard // rows)
    return shard, n_chunks, rows


def _chunks(w_VD, dtype, spec: _Spec):
    """w as [chunks, shards, rows, D] (the rows beyond V are zero), and each row's vocabulary id, -1 beyond V."""
    n_vocab, d_model = w_VD.shape
    shard, n_chunks, rows = _layout(n_vocab, spec)
    w_VD = jnp.pad(w_VD.astype(dtype), ((0, spec.shards * shard - n_vocab), (0, 0)))
    w_SVD = jnp.pad(w_VD.reshape(spec.shards, shard, d_model), ((0, 0), (0, n_chunks * rows - shard), (0, 0)))
    w_CSVD = w_SVD.reshape(spec.shards, n_chunks, rows, d_model).swapaxes(0, 1)
    w_CSVD = constrain(w_CSVD, None, "vocab", None, None)
    row_CV = jnp.arange(n_chunks * rows).reshape(n_chunks, 1, rows)
    id_CSV = jnp.arange(spec.shards)[None, :, None] * shard + row_CV
    return w_CSVD, jnp.where((row_CV < shard) & (id_CSV < n_vocab), id_CSV, -1)


def _logits(x_BTD, w_SVD, spec: _Spec):
    """Logits of a chunk, float32 [B, T, shards, rows], and the derivative of the softcap there."""
    logits = jnp.einsum("btd,svd->btsv", x_BTD, w_SVD, preferred_element_type=jnp.float32) * spec.multiplier
    if spec.softcap is None:
        return logits, None
    tanh = jnp.tanh(logits / spec.softcap)
    return spec.softcap * tanh, 1.0 - jnp.square(tanh)


def _forward(x_BTD, w_VD, targets_BT, spec: _Spec):
    batch, tokens, _ = x_BTD.shape
    zeros_BTS = constrain(jnp.zeros((batch, tokens, spec.shards), jnp.float32), "batch", "tokens", "vocab")

    def step(carry, chunk):
        """Online logsumexp and target logit, kept per shard: devices that share V meet once, at the end."""
        max_BTS, sum_BTS, target_BTS = carry
        w_SVD, id_SV = chunk
        logits, _ = _logits(x_BTD, w_SVD, spec)
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
    lse_BT = max_BT + jnp.log((sum_BTS * jnp.exp(max_BTS - max_BT[..., None])).sum(-1))
    return (lse_BT - target_BTS.sum(-1), lse_BT), (x_BTD, w_VD, targets_BT, lse_BT)


def _backward(spec: _Spec, saved, cotangents):
    x_BTD, w_VD, targets_BT, lse_BT = saved
    d_nats_BT, d_lse_BT = cotangents
    batch, tokens, d_model = x_BTD.shape

    def step(dx_BTSD, chunk):
        w_SVD, id_SV = chunk
        logits, d_softcap = _logits(x_BTD, w_SVD, spec)
        prob = jnp.where(id_SV >= 0, jnp.exp(logits - lse_BT[..., None, None]), 0.0)
        hit = (id_SV[None, None] == targets_BT[..., None, None]) & (id_SV >= 0)[None, None]
        d_logits = prob * (d_nats_BT + d_lse_BT)[..., None, None] - jnp.where(hit, d_nats_BT[..., None, None], 0.0)
        if d_softcap is not None:
            d_logits = d_logits * d_softcap
        d_logits = (d_logits * spec.multiplier).astype(x_BTD.dtype)
        dx_BTSD += jnp.einsum("btsv,svd->btsd", d_logits, w_SVD, preferred_element_type=jnp.float32)
        dw_SVD = jnp.einsum("btsv,btd->svd", d_logits, x_BTD, preferred_element_type=jnp.float32)
        return dx_BTSD, constrain(dw_SVD, "vocab", None, "d_model")

    dx_BTSD = jnp.zeros((batch, tokens, spec.shards, d_model), jnp.float32)
    dx_BTSD = constrain(dx_BTSD, "batch", "tokens", "vocab", None)
    dx_BTSD, dw_CSVD = lax.scan(step, dx_BTSD, _chunks(w_VD, x_BTD.dtype, spec))
    shard = _layout(w_VD.shape[0], spec)[0]
    dw_SVD = dw_CSVD.swapaxes(0, 1).reshape(spec.shards, -1, d_model)[:, :shard]
    dw_VD = dw_SVD.reshape(-1, d_model)[: w_VD.shape[0]]
    return dx_BTSD.sum(2).astype(x_BTD.dtype), dw_VD.astype(w_VD.dtype), None


token_nats.defvjp(_forward, _backward)
