# SPDX-License-Identifier: Apache-2.0
"""Gradients of tables over the vocabulary, summed over the microbatches of a step on each device by itself.

Where the loss forms its gradient in the forward, each chunk of logits adds to the sums, and so does a look-up: no array
of a table's gradient is made and added in each microbatch, and devices exchange sums once a step.

Axis letters: N devices with tokens of their own, V vocabulary, D model.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from hybridlm import exchange, sharding
from hybridlm.layers.vocabulary import TABLE, WHOLE, Summed, places
from hybridlm.model.config import ModelConfig

SUMS = "table_sums"
"""Key, beside those of the parameters, of the sums by table."""


class Tables(NamedTuple):
    """Which tables have sums of their own, of one kind of microbatch; without any, nothing is done."""

    names: tuple[str, ...] = ()
    """Parameters: `embedding`, and `output` where it is not tied."""
    cast: tuple[str, ...] = ()
    """Those of them that are cast once a step. A look-up that multiplies reads float32."""
    dtype: str = "float32"
    """That of the computation."""
    shape: tuple[int, int] = (1, 1)
    """[B, T] of a microbatch."""
    shared: tuple[str, ...] = ()
    """Mesh axes along which devices keep shares of the rows of what is summed: see `train.shares`."""

    def prepared(self, weights: dict) -> dict:
        """The weights, tables with their columns put together."""
        return weights | {name: self._whole(name, weights[name]) for name in self.names}

    def zeros(self, weights: dict) -> dict:
        """Sums of nothing, by table."""
        return {name: self.placed(jnp.zeros(self._sums(weights[name]), jnp.float32)) for name in self.names}

    def placed(self, sums_NVD: jax.Array) -> jax.Array:
        """Sums, each on its device."""
        where = places(self.shape, sums_NVD.shape[1:])
        spec = P(where.tokens or None, where.rows or None, None)
        return lax.with_sharding_constraint(sums_NVD, spec) if sharding.is_split() else sums_NVD

    def summed(self, sums_NVD: jax.Array) -> jax.Array:
        """[V, D], float32, split as the table is in the state: the sum over devices, which are exchanged in the type of
        the computation, as gradients of matrices are."""
        where = places(self.shape, sums_NVD.shape[1:])
        rows = (*where.rows, *self.shared)
        divides = sums_NVD.shape[1] % math.prod(map(sharding.axis_size, rows)) == 0
        shared = self.shared if divides and set(self.shared) <= set(where.tokens) else ()
        run = lambda dw_1VD: where.sum_rows(dw_1VD[0].astype(self.dtype), shared).astype(jnp.float32)
        if not sharding.is_split():
            return sums_NVD[0]
        out = (rows if shared else TABLE[0], TABLE[1])
        return exchange.manual(run, [sums_NVD], [where.partial], (out, sums_NVD.shape[1:]))

    def all_summed(self, sums: dict) -> dict:
        """`summed` of each table."""
        return {name: self.summed(of_table) for name, of_table in sums.items()}

    def _whole(self, name: str, w_VD: jax.Array) -> jax.Array:
        w_VD = w_VD.astype(self.dtype) if name in self.cast else w_VD
        return sharding.constrain(w_VD, *WHOLE)

    def _sums(self, w_VD: jax.Array) -> tuple[int, int, int]:
        n_devices = 1
        for axis in places(self.shape, w_VD.shape).tokens:
            n_devices *= sharding.axis_size(axis)
        return n_devices, *w_VD.shape


def of_model(model: ModelConfig, shape: tuple[int, int]) -> Tables:
    """Of all tables of a model, for microbatches [B, T] of this shape."""
    names = ("embedding",) if model.tie_embeddings else ("embedding", "output")
    cast = tuple(name for name in names if name == "output" or model.embedding_multiplier == 1)
    return Tables(names, cast, model.compute_dtype, shape)


def with_sums(params: dict) -> dict:
    """Parameters as a model takes them, of which those of `SUMS` have theirs beside them."""
    sums = params.get(SUMS, {})
    tied = "output" not in sums
    given = {name: Summed(params[name], of_table, tied) for name, of_table in sums.items()}
    return {name: value for name, value in params.items() if name != SUMS} | given
