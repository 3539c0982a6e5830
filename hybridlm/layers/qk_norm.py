# SPDX-License-Identifier: Apache-2.0
"""RMS norm of the heads of queries or keys (Henry et al. 2020), and their rotation.

On a GPU XLA would write what is normed in float32 before it rotates it, and take its gradient in pieces of half a head.
There both are one function with a gradient that is written out: where `pallas_kernels.head_norm` serves each is one
pass; elsewhere there is a pass for the roots, kept for the backward, and one for the result, in the backward a pass for
the sums of each head and one for the gradient.

Axis letters: B batch, T tokens, H heads, P head width, C pairs that are rotated.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from hybridlm import exchange, sharding
from hybridlm.layers.norm import own_heads
from hybridlm.layers.rope import Rope, turns
from pallas_kernels import head_norm
from pallas_kernels.platform import platform

ROTATED = "attention_rotated"
"""Name, for remat, of what attention reads, and of the cosines and sines that make it."""


def is_faster(rope: Rope | None, d_head: int) -> bool:
    """Whether `normed_and_rotated` serves this rotation, and in less time than norm and rotation one by one."""
    whole = rope is None or (not rope.interleaved and rope.d_rotated(d_head) == d_head)
    return platform() == "gpu" and whole


def normed_and_rotated(
    x_BTHP: jax.Array, weight_P: jax.Array, positions_BT: jax.Array, rope: Rope | None, eps: float, name: str,
    axis: str, factor: float = 1.0, wide: bool = False,
) -> Any:  # fmt: skip
    """x / rms(x) * weight * factor of each head, then `rope.rotate` (None: not rotated); type of the input.

    Nothing is rounded between them. The weight is float32. name: under which remat keeps the roots, small beside x;
    axis: logical axis of the heads. wide: also the same in float32, a pair, which costs nothing unless it is read: to
    it can go a gradient that is not rounded.
    """
    turn = _turn(positions_BT, rope, x_BTHP.shape[-1])
    y_BTHP, *wide_BTHP = _fused(x_BTHP, weight_P, turn, eps, name, axis, factor, wide)
    y_BTHP = checkpoint_name(y_BTHP, ROTATED)
    return (y_BTHP, *wide_BTHP) if wide else y_BTHP


def serves_beside(k_BTKP: jax.Array) -> bool:
    """Whether `keys_beside_values` serves keys like these: where its kernels do, and no device has parts of tokens."""
    apart = sharding.axis_size("tensor") == sharding.axis_size("context") == 1
    return apart and _has_kernel(k_BTKP, "kv_heads")


def keys_beside_values(kv_BTcP, weight_P, positions_BT: jax.Array, rope: Rope | None, eps: float) -> tuple:
    """(keys, `normed_and_rotated` of the first half of the heads of kv [B, T, 2 K, P]; kv as it was).

    Gradients may come to either: of what reads the keys, and to the first heads of the other in their place; to the
    other's last heads those of values. They are put there, and kv's gradient is made where they lie.
    """
    k_BTKP, kv_BTcP = _beside(kv_BTcP, weight_P, _turn(positions_BT, rope, kv_BTcP.shape[-1]), eps)
    return checkpoint_name(k_BTKP, ROTATED), kv_BTcP


def _turn(positions_BT: jax.Array, rope: Rope | None, width: int) -> jax.Array | None:
    """Cosines and sines, [B, T, 2, C]."""
    return None if rope is None else checkpoint_name(jnp.stack(turns(positions_BT, rope, width), axis=2), ROTATED)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _fused(x_BTHP, weight_P, turn, eps: float, name: str, axis: str, factor: float, wide: bool) -> tuple:
    return _run(x_BTHP, weight_P, turn, eps, name, axis, factor, wide)[0]


def _run(x_BTHP, weight_P, turn, eps, name, axis, factor, wide):
    root = None
    if _has_kernel(x_BTHP, axis):
        y_BTHP = _in_kernel(x_BTHP, weight_P, turn, eps, axis, factor)
    else:
        x, weight = x_BTHP.astype(jnp.float32), _of_head(weight_P, factor)
        root = lax.optimization_barrier(lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps))
        root = checkpoint_name(root, name)
        y_BTHP = _turned(x * root * weight, turn).astype(x_BTHP.dtype)
    return (y_BTHP, *[y_BTHP.astype(jnp.float32)] * wide), (x_BTHP, weight_P, turn, root)


def _forward(*args):
    arrays, more = args[:3], args[3:]
    return _run(*jax.tree.map(lambda a: a.value, arrays), *more)


def _backward(eps, name, axis, factor, wide, saved, grads):
    del name, wide
    x_BTHP, weight_P, turn, root = saved
    grads = [grad for grad in grads if not isinstance(grad, SymbolicZero)]
    dy_BTHP = grads[0] if len(grads) == 1 else sum(grad.astype(jnp.float32) for grad in grads)
    if root is None:
        dx, d_weight = _gradients_in_kernel(x_BTHP, weight_P, turn, dy_BTHP, eps, axis, factor=factor)
        return dx, d_weight.astype(weight_P.dtype), None

    def parts(x_BTHP, dy_BTHP):
        """What was normed, before its weight, and the gradient behind the weight."""
        return x_BTHP.astype(jnp.float32) * root, _turned(dy_BTHP.astype(jnp.float32), turn, back=True)

    weight = _of_head(weight_P, factor)
    normed, d_out = parts(x_BTHP, dy_BTHP)
    mean = jnp.mean(d_out * weight * normed, axis=-1, keepdims=True)
    x_BTHP, dy_BTHP, mean = lax.optimization_barrier((x_BTHP, dy_BTHP, mean))  # else the first pass's float32 is kept
    normed, d_out = parts(x_BTHP, dy_BTHP)
    dx = root * (d_out * weight - normed * mean)
    d_weight = jnp.sum(d_out * normed, axis=(0, 1, 2)) * factor
    return dx.astype(x_BTHP.dtype), d_weight.astype(weight_P.dtype), None


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _beside(kv_BTcP, weight_P, turn, eps: float) -> tuple:
    batch, tokens, heads, width = kv_BTcP.shape
    run = partial(head_norm.head_norm, eps=eps, n_heads=heads // 2)
    outs = ("batch", "tokens", "kv_heads", None), (batch, tokens, heads // 2, width)
    return _per_device(run, kv_BTcP, weight_P, turn, (), "kv_heads", outs), kv_BTcP


def _beside_forward(kv_BTcP, weight_P, turn, eps):
    arrays = jax.tree.map(lambda a: a.value, (kv_BTcP, weight_P, turn))
    return _beside(*arrays, eps), arrays


def _beside_backward(eps, saved, grads):
    kv_BTcP, weight_P, turn = saved
    dk_BTKP, d_BTcP = (None if isinstance(grad, SymbolicZero) else grad for grad in grads)
    if dk_BTKP is not None:
        wide = jnp.pad(dk_BTKP, [(0, n - m) for n, m in zip(kv_BTcP.shape, dk_BTKP.shape, strict=True)])
        d_BTcP = wide if d_BTcP is None else d_BTcP + wide
    more = {"n_heads": kv_BTcP.shape[2] // 2}
    dx, d_weight = _gradients_in_kernel(kv_BTcP, weight_P, turn, d_BTcP, eps, "kv_heads", **more)
    return dx, d_weight.astype(weight_P.dtype), None


_beside.defvjp(_beside_forward, _beside_backward, symbolic_zeros=True)


def _has_kernel(x_BTHP, axis: str) -> bool:
    """Whether `pallas_kernels.head_norm` serves heads, as each device has them."""
    own = own_heads(("batch", "tokens", axis, None), x_BTHP.shape)
    return own is not None and head_norm.why_not(*own, x_BTHP.dtype) is None


def _per_device(kernel, x_BTHP, weight_P, turn, grads: tuple, axis: str, outs) -> Any:
    """`kernel(x, weight, turn, *grads)` of rows, each device that of its own tokens and heads; `outs` as of
    `exchange.manual`."""
    heads, n_turns = ("batch", "tokens", axis, None), 0 if turn is None else 1

    def of_device(x, weight, *more):
        turn, grads = more[:n_turns], more[n_turns:]
        rows = [a.reshape(-1, *a.shape[2:]) for a in (x, *turn, *grads)]
        made = kernel(rows[0], weight, rows[1] if turn else None, *rows[1 + n_turns :])
        return (made[0].reshape(x.shape), made[1][None]) if grads else made.reshape(*x.shape[:2], *made.shape[1:])

    arrays = (x_BTHP, weight_P.astype(jnp.float32), *([turn] * n_turns), *grads)
    axes = [heads, (None,), *[("batch", "tokens", None, None)] * n_turns, *[heads] * len(grads)]
    return exchange.manual(of_device, arrays, axes, outs)


def _in_kernel(x_BTHP, weight_P, turn, eps: float, axis: str, factor: float) -> jax.Array:
    outs = ("batch", "tokens", axis, None), x_BTHP.shape
    return _per_device(partial(head_norm.head_norm, eps=eps, factor=factor), x_BTHP, weight_P, turn, (), axis, outs)


def _gradients_in_kernel(x_BTHP, weight_P, turn, dy_BTHP, eps: float, axis: str, **more) -> tuple:
    heads, shape = ("batch", "tokens", axis, None), x_BTHP.shape
    outs = [(heads, shape), ((exchange.of_parts(heads, shape), None), (1, *weight_P.shape))]
    run = partial(head_norm.head_norm_gradients, eps=eps, **more)
    dx, d_weight = _per_device(run, x_BTHP, weight_P, turn, (dy_BTHP,), axis, outs)
    return dx, d_weight.sum(0)


def _of_head(weight_P, factor: float):
    return jnp.expand_dims(weight_P.astype(jnp.float32) * factor, (0, 1, 2))


def _turned(x_BTHP, turn, back: bool = False):
    """Pairs (i, i + R) of whole heads rotated, or back: sums of each half and the other; nothing is put together."""
    if turn is None:
        return x_BTHP
    cos, sin = (jnp.expand_dims(turn[:, :, i], (2, 3)) for i in range(2))
    x = x_BTHP.reshape(*x_BTHP.shape[:3], 2, cos.shape[-1])
    sign = jnp.array([1.0, -1.0] if back else [-1.0, 1.0], jnp.float32)[None, None, None, :, None]
    return (x * cos + lax.rev(x, (3,)) * (sin * sign)).reshape(x_BTHP.shape)
