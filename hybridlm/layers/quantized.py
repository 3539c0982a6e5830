# SPDX-License-Identifier: Apache-2.0
"""Matrices in eight bits with a scale for each output channel, and products with them.

What is rounded to what is qwix's (`qwix.quantize`), and so are products of int8 with int8 (`qwix.dot_general`,
`qwix.einsum`). A product with activations that stay in float has the scale behind it, y = (x q) * scale: q is exact in
bfloat16, and a compiler converts it on its way into the product, so that no copy of the matrix is made. (qwix scales
such a matrix first, which rounds it once more and needs the whole.) `fp8_product` is a product of training, in fp8
forward and backward, of a matrix that stays what it is.

A scale has the axes of its matrix, of size 1 where the product contracts them: matrices of several axes, fused ones and
those stacked over depths have one for each of their outputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from hybridlm.errors import ConfigError
from pallas_kernels import platform

TYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
"""What values are stored as."""
FEW_ROWS = 16
"""Up to so many rows a CPU converts a matrix block by block: its products want operands in float32 in memory."""
BLOCK = 128
"""Rows of such a block."""
LEAST_ROWS = 8
"""Rows of a product on a GPU."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A matrix W = values * scale; a pytree of two arrays."""

    values: Any
    """int8 or float8_e4m3fn, in the shape of the matrix."""
    scale: Any
    """float32, the same axes, of size 1 where they are contracted."""
    activations: str | None = field(default=None, metadata={"static": True})
    """What the other side of a product is rounded to, token by token: int8; None: it stays as it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)

    def __getitem__(self, index) -> "Quantized":
        """Parts of the matrix along axes that are not contracted. IndexError for others."""
        if index is Ellipsis:
            return self
        index = index if isinstance(index, tuple) else (index,)
        for at, n, n_scales in zip(index, self.shape, self.scale.shape):
            if at != slice(None) and n != n_scales:
                raise IndexError(f"index {index} cuts an axis of the quantised matrix {self.shape} that has one scale")
        return Quantized(self.values[index], self.scale[index], self.activations)

    def dequantised(self, dtype: Any) -> jax.Array:
        """The matrix, in a float type."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


@dataclass(frozen=True)
class _Beside:
    """A matrix in float that has something beside it."""

    value: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        """Its axes."""
        return len(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rounding(_Beside):
    """A matrix in float whose product rounds its other side, as training does that has a quantised model as its end; or
    whose product is taken in fp8, if activations is that."""

    activations: str = field(default="int8", metadata={"static": True})
    """int8 or fp8."""

    def __getitem__(self, index) -> "Rounding":
        return Rounding(self.value[index], self.activations)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parts:
    """Matrices that are stored together, [*inputs, c, ...], as arrays of their own, each with c = 1: a product with one
    of them needs no copy of it."""

    values: tuple[jax.Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one of them."""
        return tuple(self.values[0].shape)

    @property
    def ndim(self) -> int:
        """Axes of one of them."""
        return len(self.shape)

    def __getitem__(self, index) -> "Parts":
        return Parts(tuple(value[index] for value in self.values))

    def astype(self, dtype: Any) -> "Parts":
        """Each in a type."""
        return Parts(tuple(value.astype(dtype) for value in self.values))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joined:
    """A matrix that is one with others for a product: the first of them has all their outputs, side by side."""

    value: Any
    """[*inputs, 1, ..., outputs of all] with as many axes as the matrix, or a Wide; None of the others."""
    shapes: tuple[tuple[int, ...], ...] = field(metadata={"static": True})
    """Outputs of each."""
    index: int = field(metadata={"static": True})
    """Which one it is."""

    def __getitem__(self, index) -> "Joined":
        if index is not Ellipsis:
            raise IndexError(f"index {index} of a matrix that is one with others")
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Wide(_Beside):
    """A matrix in the type of the computation whose gradient by `dot` is that of a slot: float32, not rounded, so that
    a compiler adds it to a sum within the product. In any other place it is its value, with the gradient of that."""

    slot: jax.Array
    """float32, [N, *the matrix's] for N devices with rows of their own, each of which has its part; it is never
    read."""
    over: tuple[str, ...] = field(default=(), metadata={"static": True})
    """The mesh axes of those devices."""

    def __getitem__(self, index) -> "Wide":
        if index is Ellipsis:
            return self
        of_slot = (slice(None), *(index if isinstance(index, tuple) else (index,)))
        return Wide(self.value[index], self.slot[of_slot], self.over)

    @property
    def dtype(self) -> Any:
        """That of the value."""
        return self.value.dtype

    def __jax_array__(self) -> jax.Array:
        return self.value

    def astype(self, dtype: Any) -> jax.Array:
        """The value in a type."""
        return self.value.astype(dtype)


Operand = jax.Array | Quantized | Rounding | Parts | Joined | Wide
"""What products take as their matrix."""


def library() -> ModuleType:
    """qwix; ConfigError, one line, where it is not installed."""
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(f"quantising needs qwix ({error}): pip install 'hybridlm[quantize]'") from None
    return qwix


def quantise(matrix: Any, contracted: Sequence[int], weights: str) -> Quantized:
    """A matrix rounded to `weights`, a key of TYPES: symmetric, the largest of each output channel at the type's end.

    contracted: the axes that the product adds over.
    """
    matrix = jnp.asarray(matrix, jnp.float32)
    channels = [axis for axis in range(matrix.ndim) if axis not in contracted]
    made = library().quantize(matrix, TYPES[weights], channelwise_axes=channels)
    return Quantized(made.qvalue, made.scale)


def rounded(matrix: jax.Array, contracted: Sequence[int], weights: str) -> jax.Array:
    """The matrix that `quantise` stands for, float32."""
    return quantise(matrix, contracted, weights).dequantised(jnp.float32)


def leaf_axes(operand: Any, axes: tuple) -> list[tuple]:
    """The logical axes of each array of an operand whose matrix has these; a scale has none where it is of size 1."""
    if isinstance(operand, Parts):
        return [of for value in operand.values for of in leaf_axes(value, axes)]
    if isinstance(operand, Joined):
        return [] if operand.value is None else leaf_axes(operand.value, axes)
    if isinstance(operand, Wide):
        return [axes, (operand.over, *(None if name == "d_model" else name for name in axes))]
    if not isinstance(operand, Quantized):
        return [axes]
    return [axes, tuple(None if n == 1 else name for name, n in zip(axes, operand.scale.shape, strict=True))]


# Products -----------------------------------------------------------------------------------------------------------


def dot(x: jax.Array, matrix: Any, n: int = 1) -> jax.Array:
    """x [..., *inputs] times a matrix [*inputs, *outputs] of n inputs: [..., *outputs] in the type of x."""
    if isinstance(matrix, Wide):
        return _wide(x, matrix.value.astype(x.dtype), matrix.slot, n)
    if isinstance(matrix, Rounding) and matrix.activations == "fp8":
        inputs = math.prod(matrix.shape[:n])
        y_MN = fp8_product(x.reshape(-1, inputs), matrix.value.reshape(inputs, -1))
        return y_MN.reshape(*x.shape[: x.ndim - n], *matrix.shape[n:])
    if isinstance(matrix, Rounding):
        return jnp.tensordot(_activations(x, range(x.ndim - n, x.ndim)), matrix.value, n)
    if not isinstance(matrix, Quantized):
        return _plain(x, matrix, n)
    last, first = tuple(range(x.ndim - n, x.ndim)), tuple(range(n))
    if matrix.activations is not None:
        y = library().dot_general(_integers(x, last), _array(matrix), ((last, first), ((), ())))
        return y.astype(x.dtype)
    scale = matrix.scale.reshape((1,) * (x.ndim - n) + matrix.shape[n:])
    return (_product(x, matrix.values, n) * scale).astype(x.dtype)


def dot_parts(xs: Sequence[jax.Array], matrix: Any) -> list[jax.Array]:
    """x [B, T, D] times each of the matrices that are stored together as [D, c, ...]; xs: c arrays equal to it, each
    with its product's gradient. Of a quantised matrix, and for one token, the product is cut, not the matrix: its parts
    do not lie together, so that they would be copied."""
    if isinstance(matrix, Parts):
        return [dot(x, part[:, 0]) for x, part in zip(xs, matrix.values, strict=True)]
    if isinstance(matrix, Quantized) or xs[0].shape[1] == 1:
        y = dot(xs[0], matrix)
        return [y[:, :, i] for i in range(matrix.shape[1])]
    return [dot(x, matrix[:, i]) for i, x in enumerate(xs)]


def dot_all(x: jax.Array, matrices: Sequence[Any]) -> list[jax.Array]:
    """x [B, T, D] times each of several matrices [D, ...]; those that are joined have one product."""
    if not isinstance(matrices[0], Joined):
        return [dot(x, matrix) for matrix in matrices]
    whole, shapes = next(matrix.value for matrix in matrices if matrix.value is not None), matrices[0].shapes
    # the barrier: of its gradient, too, which two products read, is made once, not put together within each
    y = jax.lax.optimization_barrier(dot(x, whole))
    parts = cut_outputs(y, x.ndim - 1, shapes)
    return [parts[matrix.index] for matrix in matrices]


def cut_outputs(y: jax.Array, n: int, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Of outputs of these shapes side by side, behind the first n axes, each by itself."""
    flat = y.reshape(*y.shape[:n], -1)
    parts = jnp.split(flat, list(accumulate(map(math.prod, shapes)))[:-1], -1)
    return [part.reshape(*y.shape[:n], *shape) for part, shape in zip(parts, shapes, strict=True)]


def einsum(spec: str, x: jax.Array, matrix: Any, preferred: Any = None) -> jax.Array:
    """`jnp.einsum(spec, x, matrix)` in the type `preferred`, or that of x. Letters that are summed over are in both."""
    if not isinstance(matrix, Quantized | Rounding):
        return jnp.einsum(
            spec, x, matrix.value if isinstance(matrix, Wide) else matrix, preferred_element_type=preferred
        )
    of_x, of_matrix, out = spec.replace("->", ",").split(",")
    summed = [axis for axis, letter in enumerate(of_x) if letter not in out]
    if isinstance(matrix, Rounding):
        x = x if matrix.activations == "fp8" else _activations(x, summed)
        return jnp.einsum(spec, x, matrix.value, preferred_element_type=preferred)
    dtype = x.dtype if preferred is None else preferred
    if matrix.activations is not None:
        return library().einsum(spec, _integers(x, summed), _array(matrix)).astype(dtype)
    y = jnp.einsum(spec, x, matrix.values.astype(x.dtype), preferred_element_type=jnp.float32)
    kept = [letter for letter in out if letter in of_matrix]
    scale = jnp.einsum(f"{of_matrix}->{''.join(kept)}", matrix.scale)
    sizes = dict(zip(kept, scale.shape, strict=True))
    return (y * scale.reshape([sizes.get(letter, 1) for letter in out])).astype(dtype)


def rounded_rows(rows_RD: jax.Array, matrix: Any) -> jax.Array:
    """Rows as a product rounds them that takes floats alone."""
    return _activations(rows_RD, (1,)) if getattr(matrix, "activations", None) == "int8" else rows_RD


@jax.custom_vjp
def fp8_product(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
    """x w [M, N] in the type of x, of what both are in fp8 (e4m3), and so its gradients, of what reaches it in e5m2
    (Micikevicius et al. 2022, "FP8 formats for deep learning"): each array has one scale, by its largest number.

    ConfigError where qwix is not installed.
    """
    return _fp8_dot(_fp8(x_MK), _fp8(w_KN), (1, 0), x_MK.dtype)


def _fp8_forward(x_MK, w_KN):
    return fp8_product(x_MK, w_KN), (x_MK, w_KN)


def _fp8_backward(saved, dy_MN):
    x_MK, w_KN = saved
    dy = _fp8(dy_MN, jnp.float8_e5m2)
    return _fp8_dot(dy, _fp8(w_KN), (1, 1), x_MK.dtype), _fp8_dot(_fp8(x_MK), dy, (0, 0), w_KN.dtype)


fp8_product.defvjp(_fp8_forward, _fp8_backward)


def _fp8(array: jax.Array, dtype: Any = TYPES["fp8"]) -> Any:
    """Of qwix, with one scale."""
    return library().quantize(array, dtype, channelwise_axes=())


def _fp8_dot(left: Any, right: Any, summed: tuple[int, int], dtype: Any) -> jax.Array:
    """The product of two of them over an axis of each, in a float type."""
    axes = ((summed[:1], summed[1:]), ((), ()))
    return library().dot_general(left, right, axes).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _wide(x: jax.Array, matrix: jax.Array, slot: jax.Array, n: int) -> jax.Array:
    """`_plain`, whose gradient of the matrix is that of the slot."""
    return _plain(x, matrix, n)


def _wide_backward(n: int, saved, dy):
    x, matrix = saved
    rows = tuple(range(x.ndim - n))
    dx = jnp.tensordot(dy, matrix, [tuple(range(len(rows), dy.ndim)), tuple(range(n, matrix.ndim))])
    return dx, None, jnp.tensordot(x, dy, [rows, rows], preferred_element_type=jnp.float32)[None]


_wide.defvjp(lambda x, matrix, slot, n: (_plain(x, matrix, n), (x, matrix)), _wide_backward)


def _plain(x: jax.Array, matrix: jax.Array, n: int, preferred: Any = None) -> jax.Array:
    """`jnp.tensordot(x, matrix, n)`, of one row on a GPU with rows of zeros beside it.

    Alone, as in decoding one text, XLA makes a multiplication of such a product, whose result it writes to memory, and
    a sum, so that a matrix of up to 2**23 numbers moves three times. The sum over the rows is that of the one.
    """
    rows, inputs = x.shape[: x.ndim - n], x.shape[x.ndim - n :]
    if math.prod(rows) != 1 or platform.platform() != "gpu":
        return jnp.tensordot(x, matrix, n, preferred_element_type=preferred)
    x = jnp.pad(x.reshape(1, *inputs), [(0, LEAST_ROWS - 1), *[(0, 0)] * n])
    return jnp.tensordot(x, matrix, n, preferred_element_type=preferred).sum(axis=0).reshape(*rows, *matrix.shape[n:])


def _product(x: jax.Array, values: jax.Array, n: int) -> jax.Array:
    """x times eight-bit values, float32."""
    rows, inputs = x.shape[: x.ndim - n], math.prod(values.shape[:n])
    if platform.platform() != "cpu" or math.prod(rows) > FEW_ROWS or inputs <= BLOCK:
        return _plain(x, values.astype(x.dtype), n, jnp.float32)
    x_MK, w_KN = x.reshape(-1, inputs).astype(jnp.float32), values.reshape(inputs, -1)
    part = lambda start, size: jnp.dot(
        jax.lax.dynamic_slice_in_dim(x_MK, start, size, 1),
        jax.lax.dynamic_slice_in_dim(w_KN, start, size).astype(jnp.float32),
    )
    whole, rest = divmod(inputs, BLOCK)
    y_MN = part(whole * BLOCK, rest) if rest else jnp.zeros((x_MK.shape[0], w_KN.shape[1]), jnp.float32)
    y_MN = jax.lax.fori_loop(0, whole, lambda i, y_MN: y_MN + part(i * BLOCK, BLOCK), y_MN)
    return y_MN.reshape(*rows, *values.shape[n:])


def _array(matrix: Quantized) -> Any:
    """As qwix holds it."""
    return library().QArray(matrix.values, matrix.scale)


def _integers(x: jax.Array, summed: Sequence[int]) -> Any:
    """Activations as int8 of qwix, with a scale for each token."""
    channels = [axis for axis in range(x.ndim) if axis not in summed]
    return library().quantize(x.astype(jnp.float32), TYPES["int8"], channelwise_axes=channels)


def _activations(x: jax.Array, summed: Sequence[int]) -> jax.Array:
    """Activations rounded to int8 and back; the gradient is that of the activations themselves."""
    near = rounded(jax.lax.stop_gradient(x), [a for a in range(x.ndim) if a in summed], "int8").astype(x.dtype)
    return x + jax.lax.stop_gradient(near - x)
