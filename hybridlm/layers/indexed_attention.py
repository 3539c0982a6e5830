# SPDX-License-Identifier: Apache-2.0
"""Attention to blocks of keys that an index chooses for each query: Qwen Sparse Attention (Qwen Team 2026, Qwen4-Exp),
with the scores of DeepSeek's lightning indexer (DeepSeek-AI 2025, DeepSeek-V3.2, equation 1) of means of keys.

Axis letters: B batch, T tokens, S keys, D model, H query heads, K key/value heads, P head width, J heads of the index,
I their width, N whole blocks, R tokens of a block, C chosen blocks of a query.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import ops, params
from hybridlm.layers.attention import Attention, mean_visible
from hybridlm.layers.block import (
    LEFT_TO_RIGHT,
    Block,
    Kept,
    Make,
    Output,
    Statistic,
    Tokens,
    check_parts,
    on_arrays,
    split_of_parts,
)
from hybridlm.layers.norm import RMSNorm
from hybridlm.layers.rope import Proportional, rotate
from hybridlm.layers.segments import positions_within
from pallas_kernels.segments import document_ids

QUERIES = 128
"""Queries for which blocks are scored at once."""
FEW = 3
"""Where a query sees no more whole blocks, the earlier of equal scores comes first, of more the later: as the published
implementation chooses on a CPU of few blocks. It matters where fewer are chosen, alone."""


@dataclass(frozen=True)
class IndexedAttention:
    """Attention of each query to budget / block whole blocks of its document, those of the highest scores, and to the
    tokens of the block that it stands in, as long as that is not whole.

    A block's score is sum_j relu(q_j . k) / sqrt(I) of the query's index heads and the normed, rotated mean of the
    index keys of the block's tokens; of equal ones, as where no head's product is positive, the later block comes
    first (see FEW). The choice has no gradient, and so the index learns nothing from the loss.
    """

    attention: Attention = Attention(gate="elementwise", qk_norm=True)  # noqa: RUF009 (frozen)
    """What is attended with."""
    n_index_heads: int = 4
    """Query heads J of the index; it has one key a token."""
    d_index: int = 128
    """Width I of these; as much of it is rotated as of the attention's heads."""
    budget: int = 2048
    """Tokens in whole blocks that a query attends to, at most."""
    block: int = 4
    """Tokens R of a block."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms of index queries and keys."""
    norm_offset: float = 0.0
    """Added to the weights of these norms (1: Qwen4-Exp)."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {"index_chosen": Kept("attention: blocks that the index chose", kernels=True)}
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    GROWS: ClassVar[Mapping[str, str]] = {"index": "keys of the index"}
    MIXES_TOKENS = True

    def __post_init__(self):
        check_fields(self)
        check_positive(self, ("n_index_heads", "d_index", "budget", "block"))
        require(self.budget % self.block == 0, f"budget ({self.budget}) not divisible by block ({self.block})")
        of = self.attention
        for name, plain in (("window", None), ("softcap", None), ("sinks", False), ("direction", LEFT_TO_RIGHT)):
            given = getattr(of, name)
            require(given == plain, f"attention.{name} ({given}) must be {plain}: blocks are chosen, and all there is")
        if of.rope is not None:
            require(
                not isinstance(of.rope.scaling, Proportional), "attention.rope.scaling (Proportional) is not supported"
            )
            turning = of.rope.d_rotated(of.d_head)
            require(turning <= self.d_index, f"d_index ({self.d_index}) is less than the rotated width ({turning})")

    def parts(self) -> dict[str, Block]:
        """The attention by its field name."""
        return {"attention": self.attention}

    def check(self, d_model: int) -> None:
        """Raises ConfigError where the attention cannot be built at the model width."""
        check_parts(self, d_model)

    def build(self, d_model: int, make: Make) -> "IndexedAttentionMixer":
        """The mixer of one sublayer."""
        return make.mixer(IndexedAttentionMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Those of the attention."""
        return split_of_parts(self, d_model)

    def flops(self, d_model: int, seq_len: int) -> float:
        """Projections, scores of whole blocks, and the scores and sums of the keys that are attended to."""
        of, seen = self.attention, mean_seen(seq_len, self.budget, self.block)
        dense = of.flops(d_model, seq_len) - 4.0 * of.n_heads * of.d_head * mean_visible(seq_len, None)
        index = 2.0 * d_model * (self.n_index_heads + 1) * self.d_index
        scores = 2.0 * self.n_index_heads * self.d_index * mean_whole(seq_len, self.block)
        return dense + index + scores + 4.0 * of.n_heads * of.d_head * seen

    def resolved(self, d_model: int) -> "IndexedAttention":
        """The attention resolved."""
        return replace(self, attention=self.attention.resolved(d_model))


def mean_whole(seq_len: int, block: int) -> float:
    """Whole blocks that a query sees, averaged over a row of seq_len tokens."""
    return float((np.arange(1, seq_len + 1) // block).mean())


def mean_seen(seq_len: int, budget: int, block: int) -> float:
    """Keys that a query attends to, averaged over a row of seq_len tokens."""
    n = np.arange(1, seq_len + 1)
    return float((np.minimum(n // block * block, budget) + n % block).mean())


class Whole(NamedTuple):
    """The whole blocks of rows, and what of the index stands for them."""

    key_BNI: jax.Array
    """Means of their keys; normed and rotated, where a query is scored with them."""
    position_BN: jax.Array
    """Positions of their first tokens, for rotations."""
    end_BN: jax.Array
    """Where in the row their last tokens stand."""
    document_BN: jax.Array
    """Whose they are; 0: there is no such block."""
    number_BN: jax.Array
    """Their numbers, as keys and choices have them."""


class Queries(NamedTuple):
    """Where queries stand."""

    place_BT: jax.Array
    """In the row."""
    document_BT: jax.Array
    """Whose they are; 0: padding."""
    own_BT: jax.Array
    """Number of the block that a query stands in, where it is not whole with it; else, and of padding, -1."""


class IndexedAttentionMixer(nnx.Module):
    """An index, which chooses, and an attention, which attends."""

    __call__ = on_arrays

    def __init__(
        self,
        config: IndexedAttention,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """The options are those of `AttentionMixer`."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        self.attention = config.attention.build(d_model, Make(rngs, init_std, out_std, dtype))
        shape = (d_model, config.n_index_heads + 1, config.d_index)
        self.w_index = params.matrix(rngs, shape, ("d_model", None, None), init_std)
        norm = lambda: RMSNorm(config.d_index, config.norm_eps, axis=None, offset=config.norm_offset)
        self.q_norm, self.k_norm = norm(), norm()

    @property
    def cache_grows(self) -> bool:
        """The cache grows with the number of tokens."""
        return True

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, D] -> [B, T, D] in `dtype`."""
        shape, row = x_BTD.shape[:2], ("batch", None)
        positions_BT = tokens.positions
        if positions_BT is None:
            positions_BT = positions_within(tokens.segment_ids, shape)
        q, k, v, gate = self.attention._project(x_BTD, positions_BT, None)
        iq_BTJI, ik_BTI = self._index(x_BTD, positions_BT)
        with jax.named_scope("cut"):  # of whole rows, on each of their devices

            def cut(*arrays):
                return _cut(*arrays, self.config.block, tokens.gaps)

            given = tokens.segment_ids, positions_BT, ik_BTI
            found = sharding.per_device(cut, given, [row, row, (*row, None)], [(*row, None), *[row] * 7])
            whole, number_BT, queries = Whole(*found[:5]), found[5], found[6:]
        place_BT = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        chosen_BTC = self._choose(iq_BTJI, Queries(place_BT, *queries), whole, split_tokens=True)
        y_BTHP = self._attend(q, k, v, gate, chosen_BTC, number_BT, places=None, split_tokens=True)
        return Output(self.attention._output(y_BTHP))

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, Any]:
        """Keys and values as of `Attention`, and the keys of the index, of tokens."""
        kept = caches.make(self.attention, batch, max_len, layout)
        return kept | {"index": layout.keys((batch, max_len, 1, self.config.d_index), self.dtype)}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the cache after them; see `block.Mixer`."""
        to, size = caches.Next.tokens(x_BTD, length_B, real_BT, gaps), self.config.block
        place_BT, real_BT = to.position_BT, to.real_BT
        q, k, v, gate = self.attention._project(x_BTD, place_BT, None)
        iq_BTJI, ik_BTI = self._index(x_BTD, place_BT)
        new = to.store(self.config.attention, cache, layer, k, v)[2]
        n_slots = cache["index"].shape[-3]
        slot_BT = jnp.where(real_BT, place_BT, n_slots)
        new["index"] = caches.write_slots(cache["index"], layer, slot_BT, ik_BTI[:, :, None])
        k, v, ik_BS1I = (caches.read(new[name], layer, self.dtype) for name in ("k", "v", "index"))
        own_BT = jnp.where(real_BT & (place_BT % size != size - 1), place_BT // size, -1)
        queries = Queries(place_BT, real_BT.astype(jnp.int32), own_BT)
        number_BS = jnp.broadcast_to(jnp.arange(n_slots, dtype=jnp.int32) // size, (x_BTD.shape[0], n_slots))
        chosen_BTC = self._choose(iq_BTJI, queries, _cut_slots(ik_BS1I[:, :, 0], size))
        return self.attention._output(self._attend(q, k, v, gate, chosen_BTC, number_BS, places=place_BT)), new

    @jax.named_scope("index")
    def _index(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries of the index [B, T, J, I], normed and rotated, and its keys [B, T, I]; without gradients."""
        both = params.project(jax.lax.stop_gradient(x_BTD.astype(self.dtype)), self.w_index)
        both_BTJI = sharding.constrain(jax.lax.stop_gradient(both), "batch", "tokens", None, None)
        return self._turned(self.q_norm, both_BTJI[:, :, :-1], positions_BT), both_BTJI[:, :, -1]

    def _turned(self, norm: RMSNorm, x_BTJI: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Normed, and rotated as the attention's heads, as many numbers of each; without gradients."""
        x_BTJI, of = jax.lax.stop_gradient(norm(x_BTJI)), self.config.attention
        if of.rope is None:
            return x_BTJI
        turning, rest = jnp.split(x_BTJI, (of.rope.d_rotated(of.d_head),), axis=-1)
        return jnp.concatenate([rotate(turning, positions_BT, replace(of.rope, fraction=1.0)), rest], axis=-1)

    @jax.named_scope("choose")
    def _choose(self, iq_BTJI: jax.Array, queries: Queries, whole: Whole, split_tokens: bool = False) -> jax.Array:
        """int32 [B, T, C]: numbers of blocks that each query attends to, its own the last; -1: none."""
        key_BNI = self._turned(self.k_norm, whole.key_BNI[:, :, None], whole.position_BN)[:, :, 0]
        n_chosen = min(self.config.budget // self.config.block, key_BNI.shape[1])
        tokens, row = ("batch", "tokens"), ("batch", None)

        def choose(iq_BTJI, place_BT, document_BT, own_BT, *whole, context_axis=None):
            return _choose(iq_BTJI, Queries(place_BT, document_BT, own_BT), Whole(*whole), n_chosen)

        names = [(*tokens, None, None), tokens, tokens, tokens, (*row, None), row, row, row, row]
        given = iq_BTJI, *queries, key_BNI, *whole[1:]
        chosen_BTC = sharding.per_device(choose, given, names, (*tokens, None), split_tokens=split_tokens)
        return checkpoint_name(chosen_BTC, "index_chosen")

    @jax.named_scope("attend")
    def _attend(self, q, k, v, gate, chosen_BTC, number_BS, **options) -> jax.Array:
        """The attention op, and the output gate; options: as `ops.selected_attention` takes them."""
        y_BTHP = ops.selected_attention(q, k, v, chosen_BTC, number_BS, scale=self.config.attention.scale, **options)
        if gate is not None:
            gate = jax.nn.sigmoid(gate.astype(jnp.float32))
            gate = gate if gate.ndim == y_BTHP.ndim else gate[..., None]
            y_BTHP = (y_BTHP.astype(jnp.float32) * gate).astype(y_BTHP.dtype)
        return checkpoint_name(y_BTHP, "attention_out")


def _cut(ids_BT, positions_BT, key_BTI, size: int, gaps: bool) -> tuple[jax.Array, ...]:
    """Documents cut into blocks of `size` tokens: (the arrays of Whole, numbers of the tokens' blocks, documents and
    own blocks of Queries). Numbers count the row's blocks, whole or not; padding has -1."""
    shape = positions_BT.shape
    within_BT = positions_within(ids_BT, shape)
    real_BT = jnp.ones(shape, bool) if ids_BT is None else ids_BT != 0
    document_BT = real_BT.astype(jnp.int32) if ids_BT is None else document_ids(ids_BT)
    starts_BT, ends_BT = (real_BT & (within_BT % size == rest) for rest in (0, size - 1))
    number_BT = jnp.where(real_BT, jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32) - 1, -1)
    own_BT = jnp.where(ends_BT, -1, number_BT)

    end_BN = jnp.argsort(~ends_BT, axis=1, stable=True)[:, : shape[1] // size].astype(jnp.int32)
    at_ends = lambda array_BT: jnp.take_along_axis(array_BT, end_BN, axis=1)
    document_BN = jnp.where(at_ends(ends_BT), at_ends(document_BT), 0)
    back_R = jnp.arange(size - 1, -1, -1, dtype=jnp.int32)
    if gaps and ids_BT is not None:  # a block's tokens are neighbours among the real ones
        order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
        rank_BN = at_ends(jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1)
        members_BNR = jnp.maximum(rank_BN[:, :, None] - back_R[None, None], 0)
        members_BM = jnp.take_along_axis(order_BT, members_BNR.reshape(shape[0], -1), axis=1)
    else:
        members_BM = jnp.maximum(end_BN[:, :, None] - back_R[None, None], 0).reshape(shape[0], -1)
    keys_BNRI = jnp.take_along_axis(key_BTI, members_BM[:, :, None], axis=1).reshape(
        shape[0], -1, size, key_BTI.shape[-1]
    )
    position_BN = jnp.take_along_axis(positions_BT, members_BM[:, ::size], axis=1)
    return (
        _means(keys_BNRI), position_BN, end_BN, document_BN, at_ends(number_BT), number_BT, document_BT, own_BT,
    )  # fmt: skip


def _cut_slots(key_BSI: jax.Array, size: int) -> Whole:
    """The blocks of the slots of a cache, which are positions of one document; a query sees those before it alone."""
    n_batch, n_slots, width = key_BSI.shape
    n = n_slots // size
    number_BN = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (n_batch, n))
    keys_BNRI = key_BSI[:, : n * size].reshape(n_batch, n, size, width)
    first_BN = number_BN * size
    return Whole(_means(keys_BNRI), first_BN, first_BN + size - 1, jnp.ones_like(number_BN), number_BN)


def _means(keys_BNRI: jax.Array) -> jax.Array:
    return keys_BNRI.astype(jnp.float32).mean(axis=2).astype(keys_BNRI.dtype)


def _choose(iq_BTJI: jax.Array, queries: Queries, whole: Whole, n_chosen: int) -> jax.Array:
    """Numbers of the n_chosen blocks of the highest scores of each query, and of its own; so many queries at once."""
    own_BT1 = queries.own_BT[:, :, None]
    if not n_chosen:
        return own_BT1

    def of_some(given):
        iq_BQJI, place_BQ, document_BQ = given
        products = jnp.einsum("bqji,bni->bqjn", iq_BQJI, whole.key_BNI, preferred_element_type=jnp.float32)
        scores_BQN = jax.nn.relu(products).sum(axis=2) * iq_BQJI.shape[-1] ** -0.5
        seen_BQN = (whole.end_BN[:, None] <= place_BQ[..., None]) & (document_BQ != 0)[..., None]
        seen_BQN &= whole.document_BN[:, None] == document_BQ[..., None]
        scores_BQN = jnp.where(seen_BQN, scores_BQN, -1.0)  # none of a block is negative
        number_BQN = jnp.broadcast_to(whole.number_BN[:, None], seen_BQN.shape)
        early_BQ1 = seen_BQN.sum(axis=2, keepdims=True) <= FEW if n_chosen < FEW else False
        scores_BQN, number_BQN = (jnp.where(early_BQ1, a, a[:, :, ::-1]) for a in (scores_BQN, number_BQN))
        best_BQC, index_BQC = jax.lax.top_k(scores_BQN, n_chosen)  # of equals the first
        return jnp.where(best_BQC < 0, -1, jnp.take_along_axis(number_BQN, index_BQC, axis=2))

    if iq_BTJI.shape[1] <= QUERIES:
        chosen_BTC = of_some((iq_BTJI, *queries[:2]))
    else:
        by_query = tuple(jnp.moveaxis(a, 1, 0) for a in (iq_BTJI, *queries[:2]))
        one = lambda given: of_some(tuple(a[:, None] for a in given))[:, 0]
        chosen_BTC = jnp.moveaxis(jax.lax.map(one, by_query, batch_size=QUERIES), 0, 1)
    return jnp.concatenate([chosen_BTC, own_BT1], axis=-1)
