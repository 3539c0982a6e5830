# SPDX-License-Identifier: Apache-2.0
"""Embeddings of hashed n-grams, added to the residual stream where it asks for them: the per-layer embedding of
Qwen4-Exp (Qwen Team 2026), of the kind of Engram (Cheng et al. 2026, arXiv:2601.07372).

Axis letters: B batch, T tokens, D model, C streams, E = C D, N size of the longest n-gram, H hashes, M width of a
token's embeddings, V rows of the table, W taps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields, check_positive
from hybridlm.layers import cache as caches
from hybridlm.layers import ngrams, ops, params, vocabulary
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, on_arrays
from hybridlm.layers.quantized import dot
from hybridlm.layers.streams import normed_apart


@dataclass(frozen=True)
class NgramMemory:
    """y + silu(convolution(norm(y))) of the gated values y of a token's n-grams, which hashes find in a table.

    A sublayer by itself, of the tokens and of the residual stream as it is, all streams of it: what it gives is added
    to them. Its convolution has taps N tokens apart. Outside of a model, where tokens are not known, each is `eos_id`.
    """

    vocab_size: int = 50_304
    """Tokens that the hash knows; others have hashes, too."""
    n: int = 3
    """Tokens N of the longest n-grams; there are those of two on."""
    n_hashes: int = 8
    """Hashes of each size of n-grams."""
    d_embed: int = 768
    """Width M of a token's embeddings, of all hashes together."""
    least_rows: int = 100_000
    """Each hash has a prime number of rows, the next ones from here on that no other hash of the model has."""
    multiple: int = 128
    """Rows of the whole table are a multiple of this."""
    index: int = 0
    """Number of this block's table among the model's."""
    seed: int = 1234
    """Of the hashes."""
    eos_id: int = 0
    """The token that ends a text: n-grams do not reach over it. It stands for what is not there, too."""
    d_conv: int = 4
    """Taps W of the convolution."""
    n_streams: int = 1
    """Residual streams C, each with a gate of its own."""
    norm_eps: float = 1e-6
    """Added to the mean square in norms."""
    norm_offset: float = 0.0
    """Added to the weights of norms (1: Qwen4-Exp)."""
    n_files: int = 1
    """Tensors of as many rows each that published files have in the place of the table."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "ngram_embedding": Kept("n-grams: embeddings of a token's n-grams", kernels=True),
        "ngram_in": Kept("n-grams: keys and values of these", kernels=True),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = True
    READS_TOKENS = True
    OF_STREAMS = True

    def __post_init__(self):
        check_fields(self)
        sizes = ("vocab_size", "n_hashes", "d_embed", "least_rows", "multiple", "d_conv", "n_streams", "n_files")
        check_positive(self, sizes)
        require(self.n >= 2, f"n ({self.n}) must be at least 2")
        require(self.index >= 0, f"index ({self.index}) must not be negative")
        n_all = (self.n - 1) * self.n_hashes
        require(self.d_embed % n_all == 0, f"d_embed ({self.d_embed}) not divisible by the {n_all} hashes")
        require(self.least_rows * n_all < 2**31, f"least_rows ({self.least_rows}) of {n_all} hashes exceed 2 ** 31")
        require(self.rows % self.n_files == 0, f"n_files ({self.n_files}) must divide the {self.rows} rows")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each hash."""
        n_all = (self.n - 1) * self.n_hashes
        return ngrams.primes(self.least_rows, self.index * n_all, n_all)

    @property
    def rows(self) -> int:
        """Rows V of the table."""
        return -(-sum(self.sizes) // self.multiple) * self.multiple

    @property
    def d_hash(self) -> int:
        """Width of a row of the table: of one hash's embedding."""
        return self.d_embed // len(self.sizes)

    @property
    def multipliers(self) -> list[int]:
        """Of the hashes, see `ngrams.multipliers`."""
        return ngrams.multipliers(self.vocab_size, self.n, self.index, self.seed)

    def check(self, d_model: int) -> None:
        """Raises ConfigError where the streams do not divide the width that it is built at."""
        require(d_model % self.n_streams == 0, f"n_streams ({self.n_streams}) must divide the width {d_model}")

    def build(self, d_model: int, make: Make) -> "NgramMemoryMixer":
        """The mixer of one sublayer. d_model: of all streams."""
        return make.mixer(NgramMemoryMixer, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """Rows of the table, and their width."""
        return [("rows", self.rows, "vocab"), ("d_hash", self.d_hash, "d_model")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Keys, values and the convolution. d_model: of all streams."""
        return 2.0 * self.d_embed * (d_model + d_model // self.n_streams) + 2.0 * d_model * self.d_conv

    def resolved(self, d_model: int) -> "NgramMemory":
        """Nothing is derived."""
        return self


class NgramMemoryMixer(nnx.Module):
    """Of the embeddings e of a token's n-grams and each stream x_c: g = norm(W_k e)_c . norm(x)_c / sqrt(D), y_c =
    sigmoid(sign(g) sqrt|g|) W_v e; the result is y + silu(convolution(norm(y)))."""

    cache_grows = False
    __call__ = on_arrays

    def __init__(
        self,
        config: NgramMemory,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std: standard deviation of the table and of the matrices. d_model: of all streams. The convolution
        starts at zero, as published."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        E, C, M = d_model, config.n_streams, config.d_embed
        D = E // C
        table_VN = init_std * jax.random.normal(rngs.params(), (config.rows, config.d_hash))
        self.table = params.make(table_VN, vocabulary.TABLE, "embedding")
        self.w_k = params.matrix(rngs, (M, E), (None, "d_model"), init_std)
        self.w_v = params.matrix(rngs, (M, D), (None, "d_model"), init_std)
        start, axes = jnp.full((C, D), 1.0 - config.norm_offset), (None, "d_model")
        self.norm_k, self.norm_q, self.norm_conv = (params.make(start, axes, "norm") for _ in range(3))
        self.conv = params.zeros((E, config.d_conv), (None, "conv"), "conv")

    def mix(self, x_BTD: jax.Array, tokens: Tokens) -> Output:
        """[B, T, E] of the streams, in `dtype`."""
        return Output(self._run(x_BTD, tokens, None)[0])

    def init_cache(self, batch: int, max_len: int, layout: caches.Layout = caches.PLAIN) -> dict[str, Any]:
        """What the convolution reads before the next token, and the last tokens, each 1 above its number."""
        span, c = (self.config.d_conv - 1) * self.config.n, self.config
        window = layout.zeros((batch, span, self.d_model), self.dtype)
        return {"conv": window, "recent": layout.zeros((batch, c.n - 1), jnp.int32)}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True, ids_BT=None
    ) -> tuple[jax.Array, dict]:
        """Outputs of the next T tokens and the cache after them; see `block.Mixer`. ids_BT: the tokens."""
        ids = None if real_BT is None else real_BT.astype(jnp.int32)
        old = caches.read_all(cache, layer)
        y_BTD, new = self._run(x_BTD, Tokens(ids, ids_BT=ids_BT, gaps=gaps), old)
        return y_BTD, caches.write_all(cache, layer, new)

    def _run(self, x_BTE: jax.Array, tokens: Tokens, old: dict | None) -> tuple[jax.Array, dict]:
        """All tokens at once, from the cache `old` (None: from nothing), and the new one."""
        x_BTE = x_BTE.astype(self.dtype)
        with jax.named_scope("look_up"):
            e_BTM, recent = self._embeddings(x_BTE, tokens, old)
        with jax.named_scope("gate"):
            y_BTE = self._gated(x_BTE, e_BTM)
        with jax.named_scope("convolve"):
            n_BTE = self._apart(y_BTE, self.norm_conv).reshape(y_BTE.shape)
            more_BTE, window = ops.causal_conv1d(
                n_BTE, self._taps(), None, channels=(None,), activation="silu", segment_ids=tokens.segment_ids,
                initial_state=old and old["conv"], gaps=tokens.gaps,
            )  # fmt: skip
        y_BTE = sharding.constrain(y_BTE + more_BTE, *sharding.STREAM)
        return y_BTE, {"conv": window, "recent": recent}

    def _embeddings(self, x_BTE: jax.Array, tokens: Tokens, old: dict | None) -> tuple[jax.Array, jax.Array]:
        """([B, T, M], the row's last tokens as the cache has them). All tokens of a row are on each of its devices."""
        c, whole, shape = self.config, ("batch", None), x_BTE.shape[:2]
        ids_BT = jnp.full(shape, c.eos_id, jnp.int32) if tokens.ids_BT is None else tokens.ids_BT

        def find(ids_BT, segment_ids_BT, recent_BN):
            earlier, last_BN = ngrams.before(ids_BT, segment_ids_BT, recent_BN, c.n, tokens.gaps)
            return ngrams.rows(ids_BT, earlier, c.eos_id, c.multipliers, c.sizes), last_BN

        given = ids_BT, tokens.segment_ids, None if old is None else old["recent"]
        rows_BTH, recent_BN = sharding.per_device(find, given, [whole] * 3, [(*whole, None), whole])
        rows_BT = rows_BTH.reshape(shape[0], -1)  # of each token its hashes, one behind the other
        e_BTM = vocabulary.look_up(self.table[...], rows_BT, self.dtype).reshape(*shape, c.d_embed)
        return checkpoint_name(sharding.constrain(e_BTM, *sharding.STREAM), "ngram_embedding"), recent_BN

    def _gated(self, x_BTE: jax.Array, e_BTM: jax.Array) -> jax.Array:
        """y: values of the embeddings, times the gate of each stream."""
        products = lambda e, *weights: [dot(e, w) for w in weights]
        k_BTE, v_BTD = params.enter(products, e_BTM, [self.w_k, self.w_v], [sharding.STREAM] * 2)
        k_BTE, v_BTD = (checkpoint_name(a, "ngram_in") for a in (k_BTE, v_BTD))
        k_BTCD, q_BTCD = self._apart(k_BTE, self.norm_k), self._apart(x_BTE, self.norm_q)
        g_BTC1 = (k_BTCD.astype(jnp.float32) * q_BTCD.astype(jnp.float32)).sum(axis=-1, keepdims=True)
        g_BTC1 = g_BTC1 / math.sqrt(v_BTD.shape[-1])
        root_BTC1 = jnp.sign(g_BTC1) * jnp.sqrt(jnp.maximum(jnp.abs(g_BTC1), 1e-6))
        y_BTCD = jax.nn.sigmoid(root_BTC1) * v_BTD.astype(jnp.float32)[:, :, None]
        return y_BTCD.astype(self.dtype).reshape(x_BTE.shape)

    def _apart(self, x_BTE: jax.Array, weight: nnx.Param) -> jax.Array:
        """[B, T, C, D], each stream normed by itself."""
        x_BTCD = x_BTE.reshape(*x_BTE.shape[:2], self.config.n_streams, -1)
        return normed_apart(x_BTCD, weight, self.config.norm_eps, self.config.norm_offset)

    def _taps(self) -> jax.Array:
        """[E, (W - 1) N + 1]: the taps, N tokens apart, zeros between them."""
        span = (self.config.d_conv - 1) * self.config.n + 1
        return jnp.zeros((self.d_model, span), jnp.float32).at[:, :: self.config.n].set(self.conv[...])
