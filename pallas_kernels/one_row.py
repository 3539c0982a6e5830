# SPDX-License-Identifier: Apache-2.0
"""Products of one token's vector with matrices on an NVIDIA GPU, with what stands before and behind them: what decoding
one text is made of.

Such a product reads its matrix once and does nothing else, so it takes as long as the memory does; what costs beside it
are small kernels between the products, each of which waits for the one before. Here norm and activation are part of
the product's kernel. A norm's root is one number a vector: it multiplies the sum, so that no program
waits for it before it reads the matrix.

Programs of Triton (`jax.experimental.pallas.triton`), one for each few columns. They run interpreted on a CPU.
Axis letters: K inputs, N outputs of a product, c matrices that are stored together.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import platform, triton

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"silu": lambda x: x / (1 + jnp.exp(-x))}
"""Activations that a kernel computes, in float32."""
LEAST = 16
"""Columns of a block at least: 32 bytes of a row of bfloat16, which the memory gives at once."""


COLUMNS = (32,)
"""Of a program, where enough programs are left for all multiprocessors; else LEAST."""
ROWS = 256
"""Of a block that is read at once: two of a thread, so that what stands beside the matrix is copied ahead, too."""
AHEAD = 2**16
"""Bytes of a matrix that a program holds or has on their way: so that three programs fit on a multiprocessor."""
STAGES = (3, 8)
"""Blocks of them, at least and at most."""
WARPS = 4
TILE = 16
"""Rows of a product on the matrix units at least: all of them are the one."""


def serves(x: jax.Array) -> str | None:
    """Why the kernels cannot serve products of x; None where they can."""
    return triton.why_not(x.dtype, *x.shape)


def fits(n_inputs: int, n_outputs: int) -> bool:
    """Whether a matrix can be cut in whole blocks."""
    return n_inputs % ROWS == 0 and n_outputs % LEAST == 0 and n_outputs > 0


def normed(
    x_K: jax.Array, norm_K: jax.Array, weights: Sequence[jax.Array], *, eps: float, gated: str | None = None,
) -> list[jax.Array]:  # fmt: skip
    """x / rms(x) * norm, times each matrix [K, N]: [N] each, in the type of x.

    norm_K: float32. gated: an activation; each matrix is [K, 2 N], and the result act(first half) * second half.
    """
    halves = 1 if gated is None else 2
    widths = [w.shape[1] // halves for w in weights]
    sizes = [_columns(n, sum(widths)) for n in widths]
    counts = [n // size for n, size in zip(widths, sizes, strict=True)]

    def kernel(x_ref, norm_ref, *refs):
        ins, outs = refs[: len(weights)], refs[len(weights) :]

        def read(rows):
            x = x_ref[rows].astype(jnp.float32)
            return x * norm_ref[rows], x * x

        first = 0
        for w_ref, out_ref, n, size, count in zip(ins, outs, widths, sizes, counts, strict=True):
            at = pl.program_id(0) - first

            @pl.when((at >= 0) & (at < count))
            def _(w_ref=w_ref, out_ref=out_ref, n=n, size=size, at=at):
                columns = [pl.ds(half * n + at * size, size) for half in range(halves)]
                sums, square = _sums(read, w_ref, columns)
                root = jax.lax.rsqrt(square / x_K.size + eps)
                ys = [(total * root).astype(x_K.dtype) for total in sums]
                if gated is not None:
                    gate = ACTIVATIONS[gated](ys[0].astype(jnp.float32)).astype(x_K.dtype)
                    ys = [gate * ys[1]]
                out_ref[columns[0]] = ys[0]

            first += count

    out = [jax.ShapeDtypeStruct((n,), x_K.dtype) for n in widths]
    call = triton.call(kernel, (sum(counts),), out, "normed_products", WARPS, _stages(halves * max(sizes)))
    return call(x_K, norm_K.astype(jnp.float32), *weights)


def added(
    x_N: jax.Array, parts: Sequence[jax.Array], read: Callable, w_KN: jax.Array, *, eps: float | None = None,
    multiplier: float = 1.0,
) -> jax.Array:  # fmt: skip
    """x + multiplier * (v w), [N], in the type of x.

    v is what `read(refs of parts, rows)` gives of so many rows, float32, with what the root of a norm is taken of, or
    None: the root of the mean of its squares, eps added, divides the product.
    """
    n_inputs, n = w_KN.shape
    size = _columns(n, n)

    def kernel(x_ref, w_ref, *refs):
        *ins, out_ref = refs
        columns = pl.ds(pl.program_id(0) * size, size)
        (total,), square = _sums(partial(read, ins), w_ref, [columns])
        if eps is not None:
            total = total * jax.lax.rsqrt(square / n_inputs + eps)
        y = total.astype(x_N.dtype)
        y = y if multiplier == 1 else y * multiplier
        out_ref[columns] = (x_ref[columns] + y).astype(x_N.dtype)

    out = jax.ShapeDtypeStruct((n,), x_N.dtype)
    return triton.call(kernel, (n // size,), out, "added_product", WARPS, _stages(size))(x_N, w_KN, *parts)


def as_it_is(refs, rows) -> tuple[jax.Array, None]:
    """For `added`: the vector itself."""
    return refs[0][rows].astype(jnp.float32), None


def gated_norm(before_gate: bool) -> Callable:
    """For `added`: of y [K], [2 K] whose first half is the gate z, and a norm's weights [K]: y * silu(z), normed, or y
    normed, times silu(z)."""

    def read(refs, rows):
        y, z, weight = (ref[rows].astype(jnp.float32) for ref in refs)
        gate = ACTIVATIONS["silu"](z)
        u = y if before_gate else y * gate
        return (u * weight * gate if before_gate else u * weight), u * u

    return read


def _columns(n: int, of_all: int) -> int:
    """Of a program for a matrix of n columns, one of several that have so many together."""
    least = platform.multiprocessors() * 3 // 4
    return math.gcd(n, next((size for size in COLUMNS if of_all // size >= least), LEAST))


def _stages(columns: int) -> int:
    """Blocks of so many columns that are held at once."""
    least, most = STAGES
    return min(max(AHEAD // (2 * ROWS * columns), least), most)


def _sums(read: Callable, w_ref, columns: Sequence) -> tuple[list[jax.Array], Any]:
    """(v W at each of these columns, the sum of what the root is taken of), float32."""

    def body(i, carry):
        sums, square = carry
        rows = pl.ds(i * ROWS, ROWS)
        v, squares = read(rows)
        square = square if squares is None else square + squares
        tile = jnp.broadcast_to(v.astype(w_ref.dtype)[None], (TILE, ROWS))
        products = [jnp.dot(tile, w_ref[rows, at], preferred_element_type=jnp.float32) for at in columns]
        return [total + y for total, y in zip(sums, products, strict=True)], square

    start = [jnp.zeros((TILE, at.size), jnp.float32) for at in columns], jnp.zeros((ROWS,), jnp.float32)
    sums, square = jax.lax.fori_loop(0, w_ref.shape[0] // ROWS, body, start)
    return [total.sum(axis=0) * (1 / TILE) for total in sums], square.sum()
