# SPDX-License-Identifier: Apache-2.0
"""Arrays over the vocabulary where a mesh splits them: no TPU has a whole table, nor its whole gradient.

A table [V, D] lies by rows over `tensor` and by columns over `fsdp`. Where columns are split, its rows are put together
a chunk at a time, and the gradient of a chunk is scattered before the next one is made. Shards by columns alone would
need no exchange of rows, but each device would look up the tokens of all. On a GPU all of a device's rows are one chunk
(see ROWS): each chunk passes over all tokens, and takes a product with ones in the place of a sum by index.

Axis letters: B batch, T tokens, V vocabulary, D model, C chunks, R rows of a chunk, M tokens of a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybridlm import exchange, sharding
from pallas_kernels.platform import platform

CHUNK = 4096
"""Rows of a chunk, per shard of the vocabulary."""
ROWS = {"gpu": 2**30}
"""By platform: rows of a chunk in `look_up`, elsewhere CHUNK."""
TABLE = ("vocab", "d_model")
"""Logical axes of a table."""
WHOLE = ("vocab", None)
"""Those of one whose columns are put together."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Summed:
    """A table in the place of a parameter, whose gradient goes to the sums beside it, on each device to its own."""

    value: jax.Array
    """[V, D], its columns whole, float32 or in the type of the computation; it has no gradient."""
    sums: jax.Array
    """[N, V, D], float32, for N devices with tokens of their own (`Places.partial`): what was summed so far. Its
    gradient is the sums themselves and what is added to them."""
    tied: bool = field(default=False, metadata={"static": True})
    """Whether a look-up leaves the sums themselves out of it, as `train.loss.training_loss` of the same table has them
    in."""

    def __getitem__(self, index) -> "Summed":
        if index is not Ellipsis:
            raise TypeError(f"a table with its sums is taken whole, not at [{index}]")
        return self


class Places(NamedTuple):
    """How a mesh splits a table and the tokens that meet it: mesh axes, () where it splits nothing.

    Its methods are for use inside `exchange.manual`, and change nothing where nothing is split.
    """

    rows: tuple[str, ...] = ()
    """Of the vocabulary: each device has products with its own rows."""
    columns: tuple[str, ...] = ()
    """Of d_model."""
    tokens: tuple[str, ...] = ()
    """Of batch and tokens, as they meet the table."""
    stream: tuple[str, ...] = ()
    """Of the residual stream, beyond those."""
    dim: int = 1
    """What they split of the stream: 0, its rows; 1, its tokens."""

    @property
    def partial(self) -> tuple:
        """Axes of sums [N, V, D] of each of the N devices that have tokens of their own."""
        return self.tokens, self.rows, ()

    @property
    def at(self) -> tuple[str, str]:
        """Logical axes of [B, T] as they meet the table."""
        return ("batch", "tokens" if self.rows else "stream")

    def first_row(self, n_rows: int) -> jax.Array | int:
        """The first vocabulary id of this device, which has n_rows."""
        return lax.axis_index(self.rows) * n_rows if self.rows else 0

    def enter(self, x_BTD: jax.Array) -> jax.Array:
        """Tokens of the stream as they meet the table."""
        return exchange.gather(x_BTD, self.stream, self.dim)

    def leave(self, x_BTD: jax.Array) -> jax.Array:
        """Sums over devices with different rows, as tokens of the stream."""
        return exchange.scatter(x_BTD, self.stream, self.dim) if self.stream else exchange.add(x_BTD, self.rows)

    def whole_rows(self, w: jax.Array) -> jax.Array:
        """Rows with all their columns, the last dim."""
        return exchange.gather_weight(w, self.columns, w.ndim - 1)

    def sum_rows(self, dw: jax.Array, shared: Sequence[str] = ()) -> jax.Array:
        """This device's columns of a gradient of whole rows, summed over all tokens. shared: of the axes that split
        those, such along which each device keeps a share of the rows."""
        if not set(self.columns) <= set(self.tokens):  # all devices of a row of the mesh have the same tokens
            dw = dw / lax.axis_size(self.columns)
        dw = exchange.scatter_weight(dw, self.columns, dw.ndim - 1)
        dw = exchange.scatter_weight(dw, shared, 0)
        return exchange.add(dw, tuple(axis for axis in self.tokens if axis not in (*self.columns, *shared)))


def places(tokens_shape: tuple[int, int], table_shape: tuple[int, int]) -> Places:
    """Places of tokens [B, T] and a table [V, D] on the mesh that is set; all empty without one."""
    n_rows, width = table_shape
    rows, columns = _wide("vocab", n_rows), _wide("d_model", width)
    names = ("batch", "tokens") if rows else sharding.STREAM[:2]
    met = [axis for of_dim in sharding.dims_axes(names, tokens_shape) for axis in of_dim]
    dim, stream = sharding.stream_split(*tokens_shape)
    return Places(rows, columns, tuple(met), tuple(axis for axis in stream if axis not in met), dim)


def _wide(name: str, size: int) -> tuple[str, ...]:
    """Mesh axes of more than one device that split a dim."""
    return tuple(axis for axis in sharding.split_axes(name, size) if sharding.axis_size(axis) > 1)


def layout(n_vocab: int, chunk: int, shards: int = 1) -> tuple[int, int, int]:
    """(rows of a shard, chunks of a shard, rows of a chunk); chunks of even size, on TPU and GPU tiles if large."""
    shard = -(-n_vocab // shards)
    n_chunks = -(-shard // min(chunk, shard))
    rows = -(-shard // n_chunks)
    if rows > 128 and n_chunks > 1:
        rows = -(-rows // 128) * 128
        n_chunks = -(-shard // rows)
    return shard, n_chunks, rows


def look_up(w_VD: Any, tokens_BT: jax.Array, dtype, multiplier: float = 1.0, chunk: int | None = None) -> jax.Array:
    """multiplier * w[tokens] in `dtype`, split over tokens like the residual stream. w: float32, as is its gradient,
    which is summed in float32; or a `Summed`. chunk: rows put together at a time where columns are split; None: see
    ROWS."""
    if isinstance(w_VD, Summed):
        return _look_up_summed(w_VD.value, tokens_BT, w_VD.sums, jnp.dtype(dtype), multiplier, w_VD.tied)
    if sharding.is_split():
        chunk = ROWS.get(platform(), CHUNK) if chunk is None else chunk
        return _look_up(w_VD, tokens_BT, jnp.dtype(dtype), multiplier, chunk)
    x_BTD = w_VD[tokens_BT]
    return (x_BTD if multiplier == 1 else x_BTD * multiplier).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _look_up(w_VD, tokens_BT, dtype, multiplier, chunk):
    where = places(tokens_BT.shape, w_VD.shape)

    def run(w_VD, tokens_BT):
        tokens_BT = tokens_BT - where.first_row(w_VD.shape[0])
        w_CRD, first_C = _chunks((w_VD * multiplier).astype(dtype), where, chunk)

        def step(x_BTD, of_chunk):
            w_RD, first = of_chunk
            here_BT1, rows_BTD = _rows_at(where.whole_rows(w_RD), tokens_BT - first)
            return jnp.where(here_BT1, rows_BTD, x_BTD), None

        zeros_BTD = jnp.zeros((*tokens_BT.shape, d_model), dtype)
        return where.leave(lax.scan(step, zeros_BTD, (w_CRD, first_C))[0])

    d_model = w_VD.shape[1]
    out = (sharding.STREAM, (*tokens_BT.shape, d_model))
    return exchange.manual(run, (w_VD, tokens_BT), (TABLE, where.at), out)


def _look_up_forward(w_VD, tokens_BT, dtype, multiplier, chunk):
    return _look_up(w_VD, tokens_BT, dtype, multiplier, chunk), (w_VD, tokens_BT)


def _look_up_backward(dtype, multiplier, chunk, saved, dx_BTD):
    w_VD, tokens_BT = saved  # of the table nothing but its shape
    where, n_vocab = places(tokens_BT.shape, w_VD.shape), w_VD.shape[0]

    def run(tokens_BT, dx_BTD):
        dx_MD = where.enter(dx_BTD).reshape(-1, dx_BTD.shape[-1])
        n_rows = n_vocab // max(1, _size(where.rows))
        id_M = tokens_BT.reshape(-1) - where.first_row(n_rows)
        n_chunks, rows = _layout_of(n_rows, where, chunk)
        if n_chunks == 1:
            zeros_RD = jnp.zeros((n_rows, dx_MD.shape[1]), jnp.float32)
            return where.sum_rows(_added_at(zeros_RD, id_M, dx_MD.astype(jnp.float32))) * multiplier

        def step(_, first):
            """A product with ones: tokens of other chunks cost no more than those of this one, and none waits."""
            is_it_MR = (id_M[:, None] - first == jnp.arange(rows)[None]).astype(dx_MD.dtype)
            dw_RD = jnp.einsum(
                "mr,md->rd", is_it_MR, dx_MD, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST
            )
            return None, where.sum_rows(dw_RD)

        dw_CRD = lax.scan(step, None, jnp.arange(n_chunks) * rows)[1]
        return dw_CRD.reshape(-1, dw_CRD.shape[-1])[:n_rows] * multiplier

    axes = (where.at, sharding.STREAM)
    return exchange.manual(run, (tokens_BT, dx_BTD), axes, (TABLE, w_VD.shape)), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _look_up_summed(w_VD, tokens_BT, sums_NVD, dtype, multiplier, tied):
    where, d_model = places(tokens_BT.shape, w_VD.shape), w_VD.shape[1]

    def run(w_RD, tokens_BT):
        here_BT1, rows_BTD = _rows_at(w_RD, tokens_BT - where.first_row(w_RD.shape[0]))
        x_BTD = rows_BTD.astype(jnp.float32) * multiplier
        return where.leave(jnp.where(here_BT1, x_BTD, 0.0).astype(dtype))

    out = (sharding.STREAM, (*tokens_BT.shape, d_model))
    return exchange.manual(run, (w_VD, tokens_BT), (WHOLE, where.at), out)


def _look_up_summed_forward(w_VD, tokens_BT, sums_NVD, dtype, multiplier, tied):
    return _look_up_summed(w_VD, tokens_BT, sums_NVD, dtype, multiplier, tied), (sums_NVD, tokens_BT)


def _look_up_summed_backward(dtype, multiplier, tied, saved, dx_BTD):
    sums_NVD, tokens_BT = saved
    where = places(tokens_BT.shape, sums_NVD.shape[1:])

    def run(tokens_BT, dx_BTD, sums_1RD):
        dx_MD = where.enter(dx_BTD).reshape(-1, dx_BTD.shape[-1]).astype(jnp.float32) * multiplier
        id_M = tokens_BT.reshape(-1) - where.first_row(sums_1RD.shape[1])
        start_RD = jnp.zeros_like(sums_1RD[0]) if tied else sums_1RD[0]
        return _added_at(start_RD, id_M, dx_MD)[None]

    axes, out = (where.at, sharding.STREAM, where.partial), (where.partial, sums_NVD.shape)
    return None, None, exchange.manual(run, (tokens_BT, dx_BTD, sums_NVD), axes, out)


_look_up_summed.defvjp(_look_up_summed_forward, _look_up_summed_backward)


def _rows_at(w_RD, row_BT):
    """(which of the rows are these [B, T, 1], they [B, T, D]); where it is none, some row."""
    here_BT1 = ((row_BT >= 0) & (row_BT < w_RD.shape[0]))[..., None]
    return here_BT1, w_RD[jnp.clip(row_BT, 0, w_RD.shape[0] - 1)]


def _added_at(w_RD, id_M, dx_MD):
    """w with each of M vectors added to its row, if it is among these."""
    here_M = (id_M >= 0) & (id_M < w_RD.shape[0])
    return w_RD.at[jnp.where(here_M, id_M, w_RD.shape[0])].add(dx_MD, mode="drop")


def _chunks(w_RD, where: Places, chunk: int):
    """This device's rows as [C, R, D] (those beyond them are zero), and the first row of each chunk."""
    n_rows = w_RD.shape[0]
    n_chunks, rows = _layout_of(n_rows, where, chunk)
    w_RD = jnp.pad(w_RD, ((0, n_chunks * rows - n_rows), (0, 0)))
    return w_RD.reshape(n_chunks, rows, -1), jnp.arange(n_chunks) * rows


def _layout_of(n_rows: int, where: Places, chunk: int) -> tuple[int, int]:
    """(chunks, rows of a chunk): one chunk where columns are whole, as nothing is put together then."""
    return layout(n_rows, chunk if _size(where.columns) > 1 else n_rows)[1:]


def _size(axes: tuple[str, ...]) -> int:
    return lax.axis_size(axes) if axes else 1
