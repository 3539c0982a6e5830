# SPDX-License-Identifier: Apache-2.0
"""RMS norm (Zhang & Sennrich 2019) and layer norm (Ba et al. 2016), in float32 whatever the type of their input."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hybridlm import exchange, sharding
from hybridlm.layers import params
from pallas_kernels import gated_head_norm, gated_norm
from pallas_kernels.platform import platform

LEAST = 1024
"""Tokens of a device, below which one pass over heads is not worth another kernel to compile: as of decoding."""
HEADS = ("batch", "tokens", "heads", None)
"""Logical axes of a norm's heads."""


def rms_normalise(x: jax.Array, eps: float, n_axes: int = 1) -> jax.Array:
    """`x` over its root mean square along the last n_axes axes; float32."""
    x = x.astype(jnp.float32)
    axes = tuple(range(-n_axes, 0))
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + eps)


def layer_normalise(x: jax.Array, eps: float) -> jax.Array:
    """`x` without its mean along the last axis, over the root of its variance there; float32."""
    x = x.astype(jnp.float32)
    return rms_normalise(x - jnp.mean(x, axis=-1, keepdims=True), eps)


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight) + bias along the last axis or axes; the result has the type of the input."""

    def __init__(
        self,
        width: int | tuple[int, ...],
        eps: float = 1e-5,
        *,
        axis: str | tuple[str | None, ...] | None = "d_model",
        offset: float = 0.0,
        bias: bool = False,
    ):
        """width: size of the last axis, or sizes of the last axes; axis: their logical names, for sharding; offset: is
        added to the weights, which start at 1 - offset; bias: whether there is one."""
        self.eps, self.offset = eps, offset
        axes: Any
        width, axes = (width, axis) if isinstance(width, tuple) else ((width,), (axis,))
        self.weight = params.make(jnp.full(width, 1.0 - offset), axes, "norm")
        self.bias = params.zeros(width, axes, "bias") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return _weighed(self, rms_normalise(x, self.eps, len(self.weight.get_metadata()["axes"]))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * (offset + weight) + bias along the last axis; the result has the type of the input."""

    def __init__(
        self, width: int, eps: float = 1e-5, *, axis: str | None = "d_model", offset: float = 0.0, bias: bool = True
    ):
        """As of RMSNorm."""
        self.eps, self.offset = eps, offset
        self.weight = params.make(jnp.full((width,), 1.0 - offset), (axis,), "norm")
        self.bias = params.zeros((width,), (axis,), "bias") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return _weighed(self, layer_normalise(x, self.eps)).astype(x.dtype)


def _weighed(norm: RMSNorm | LayerNorm, x: jax.Array) -> jax.Array:
    """x [..., *axes] times the weights [*axes], plus the bias; float32."""
    weight = params.use(norm.weight, jnp.float32)
    weight = weight if norm.offset == 0 else norm.offset + weight
    x = x * jnp.expand_dims(weight, range(x.ndim - weight.ndim))
    if norm.bias is None:
        return x
    return x + jnp.expand_dims(params.use(norm.bias, jnp.float32), range(x.ndim - weight.ndim))


def head_layer_norm(y_BTHP: jax.Array, weight_HP: jax.Array, bias_HP: jax.Array, eps: float) -> jax.Array:
    """Layer norm of each head by itself (a group norm, Wu & He 2018), weight and bias by channel; float32."""
    return layer_normalise(y_BTHP, eps) * weight_HP[None, None] + bias_HP[None, None]


GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}
"""What a gated norm multiplies by, of z."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def gated_rms_norm(
    y_BTHP, z_BTHP, weight, eps: float, n_groups: int, before_gate: bool, dtype, gating: str = "silu"
) -> jax.Array:
    """norm(y * silu(z)) * weight, or norm(y) * weight * silu(z) with `before_gate`: [B, T, H, P] in `dtype`.

    weight: [H, P], or [P], the same for all heads. gating: "silu", or "sigmoid" in its place.

    The norm is taken over each of n_groups equal parts of the channels H * P, everything in float32. Mamba-2's output
    (Dao & Gu 2024, section 7). The gradient is written out: it keeps y, z and the roots, of which everything else
    follows in one pass over y, z and the cotangent for each kind of sum and one for dy and dz. On a GPU it makes the
    roots again, in the pass for the sums: where nothing asks for them, the forward is one pass, too. Where groups are
    heads of one weight that `pallas_kernels.gated_head_norm` serves, forward and backward are one pass each.
    """
    return _gated_rms_norm(y_BTHP, z_BTHP, weight, eps, n_groups, before_gate, dtype, gating)[0]


def _gated_rms_norm(y_BTHP, z_BTHP, weight, eps, n_groups, before_gate, dtype, gating):
    if _heads_have_kernel(y_BTHP, z_BTHP, weight, n_groups, before_gate, dtype):
        kernel = functools.partial(gated_head_norm.gated_head_norm, eps=eps, gating=gating)
        return _per_device(kernel, HEADS, y_BTHP, z_BTHP, weight), (y_BTHP, z_BTHP, weight, None)
    weight_HP = jnp.broadcast_to(weight, y_BTHP.shape[2:])
    if platform() == "gpu":
        out = _in_one_pass(y_BTHP, z_BTHP, weight_HP, eps, n_groups, before_gate, dtype, gating)
        return out, (y_BTHP, z_BTHP, weight, None)
    y, gate = y_BTHP.astype(jnp.float32), GATES[gating](z_BTHP.astype(jnp.float32))
    u = y if before_gate else y * gate
    root_BTG = checkpoint_name(jax.lax.rsqrt(_group_mean(jnp.square(u), n_groups) + eps), "mamba_root")
    out = u * _per_channel(root_BTG, u.shape) * weight_HP.astype(jnp.float32)[None, None]
    out = out * gate if before_gate else out
    return out.astype(dtype), (y_BTHP, z_BTHP, weight, root_BTG)


def _in_one_pass(y_BTHP, z_BTHP, weight_HP, eps, n_groups, before_gate, dtype, gating):
    """The same, of channels in groups: XLA makes one program of it for a GPU."""
    shape = y_BTHP.shape
    grouped = (*shape[:2], n_groups, shape[2] * shape[3] // n_groups)
    # the barrier: else it widens y before it groups the channels, in a pass of its own
    y, z = jax.lax.optimization_barrier(tuple(a.reshape(grouped) for a in (y_BTHP, z_BTHP)))
    y, gate = y.astype(jnp.float32), GATES[gating](z.astype(jnp.float32))
    u = y if before_gate else y * gate
    root = jax.lax.rsqrt(jnp.mean(jnp.square(u), axis=-1, keepdims=True) + eps)
    out = u * root * weight_HP.astype(jnp.float32).reshape(1, 1, *grouped[2:])
    out = out * gate if before_gate else out
    return out.astype(dtype).reshape(shape)


def _gated_rms_norm_bwd(eps, n_groups, before_gate, dtype, gating, saved, d_out):
    y_BTHP, z_BTHP, weight, root_BTG = saved
    if _heads_have_kernel(y_BTHP, z_BTHP, weight, n_groups, before_gate, dtype):
        kernel = functools.partial(gated_head_norm.gated_head_norm_gradients, eps=eps, gating=gating)
        dy, dz, d_weight = _per_device(kernel, HEADS, y_BTHP, z_BTHP, weight, d_out)
    else:
        arrays = y_BTHP, z_BTHP, jnp.broadcast_to(weight, y_BTHP.shape[2:]), d_out
        if _has_kernel(y_BTHP, z_BTHP, d_out, n_groups, gating):
            kernel = functools.partial(gated_norm.gated_norm_gradients, eps=eps, before_gate=before_gate)
            dy, dz, d_weight = _per_device(kernel, (*HEADS[:2], None, None), *arrays)
        else:
            dy, dz, d_weight = _in_passes(*arrays, root_BTG, eps, n_groups, before_gate, gating)
    d_weight = d_weight.sum(tuple(range(d_weight.ndim - weight.ndim)))
    return dy, dz, d_weight.astype(weight.dtype)


def _in_passes(y_BTHP, z_BTHP, weight_HP, d_out, root_BTG, eps, n_groups, before_gate, gating):
    """The gradient by XLA."""
    weight = weight_HP.astype(jnp.float32)[None, None]
    if root_BTG is None:
        # Two passes over the inputs: XLA would keep the first one's float32 for the second. Behind the barrier is none
        # of d_out, which is read from where its parts are.
        one = jnp.ones((*y_BTHP.shape[:2], n_groups), jnp.float32)
        parts = _parts_of_gradient(y_BTHP, z_BTHP, d_out, one, before_gate, gating)
        root_BTG = jax.lax.rsqrt(_group_mean(jnp.square(parts["normed"]), n_groups) + eps)
        mean_BTG = root_BTG * _group_mean(parts["d_normed"] * weight * parts["normed"], n_groups)
        y, z, root_BTG, mean_BTG = jax.lax.optimization_barrier((y_BTHP, z_BTHP, root_BTG, mean_BTG))
        parts = _parts_of_gradient(y, z, d_out, root_BTG, before_gate, gating)
    else:
        parts = _parts_of_gradient(y_BTHP, z_BTHP, d_out, root_BTG, before_gate, gating)
        mean_BTG = _group_mean(parts["d_normed"] * weight * parts["normed"], n_groups)
    root = _per_channel(root_BTG, y_BTHP.shape)
    d_weight = (parts["d_normed"] * parts["normed"]).sum((0, 1))
    d_u = root * (parts["d_normed"] * weight - parts["normed"] * _per_channel(mean_BTG, y_BTHP.shape))
    if before_gate:
        d_y, d_z = d_u, parts["d_out"] * parts["normed"] * weight * parts["d_gate"]
    else:
        d_y, d_z = d_u * parts["gate"], d_u * parts["y"] * parts["d_gate"]
    return d_y.astype(y_BTHP.dtype), d_z.astype(z_BTHP.dtype), d_weight


def _has_kernel(y_BTHP, z_BTHP, d_out, n_groups: int, gating: str) -> bool:
    """Whether `pallas_kernels.gated_norm` serves the gradient: of channels that no axis splits."""
    if gating != "silu" or n_groups != 1 or sharding.axis_size("tensor") > 1:
        return False
    if not y_BTHP.dtype == z_BTHP.dtype == d_out.dtype:
        return False
    return gated_norm.why_not(math.prod(y_BTHP.shape[2:]), y_BTHP.dtype) is None


def _heads_have_kernel(y_BTHP, z_BTHP, weight, n_groups: int, before_gate: bool, dtype) -> bool:
    """Whether `pallas_kernels.gated_head_norm` serves: groups that are heads, with one weight for all, as each device
    has them."""
    if not before_gate or weight.ndim != 1 or n_groups != y_BTHP.shape[2]:
        return False
    if not y_BTHP.dtype == z_BTHP.dtype == jnp.dtype(dtype):
        return False
    if (own := own_heads(HEADS, y_BTHP.shape)) is None:
        return False
    n_tokens, n_heads, width = own
    return gated_head_norm.why_not(n_tokens * n_heads, width, y_BTHP.dtype) is None


def own_heads(axes: tuple, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(Tokens, heads, their width) of what each device has of heads [B, T, H, P] with these logical axes; None where
    its tokens are fewer than LEAST, or of a number that is not known."""
    batch, tokens, n_heads, width = exchange.own_shape(axes, shape)
    n_tokens = batch * tokens
    return (n_tokens, n_heads, width) if isinstance(n_tokens, int) and n_tokens >= LEAST else None


def _per_device(kernel, axes: tuple, y_BTHP, z_BTHP, weight, *d_out) -> Any:
    """`kernel(y, z, weight, *d_out)` of rows as wide as the weight, each device that of what it has of arrays with
    these logical axes: a result like y, or (dy, dz, d_weight of each device, [N, *weight.shape])."""
    of_all = (None,) * weight.ndim

    def of_device(y, z, weight, *d_out):
        rows = lambda a: a.reshape(-1, weight.size)
        made = kernel(rows(y), rows(z), weight.astype(jnp.float32).reshape(-1), *map(rows, d_out))
        if not d_out:
            return made.reshape(y.shape)
        dy, dz, d_weight = made
        return dy.reshape(y.shape), dz.reshape(z.shape), d_weight.reshape(1, *weight.shape)

    arrays, like_y = (y_BTHP, z_BTHP, weight, *d_out), (axes, y_BTHP.shape)
    like_weights = (exchange.of_parts(*like_y), *of_all), (1, *weight.shape)
    outs = [like_y, like_y, like_weights] if d_out else like_y
    return exchange.manual(of_device, arrays, (axes, axes, of_all, *[axes] * len(d_out)), outs)


def _parts_of_gradient(y_BTHP, z_BTHP, d_out, root_BTG, before_gate: bool, gating: str) -> dict[str, jax.Array]:
    """What the gradient is made of, token by token, float32."""
    y, z, d_out = (a.astype(jnp.float32) for a in (y_BTHP, z_BTHP, d_out))
    sigmoid = jax.nn.sigmoid(z)
    if gating == "silu":
        gate, d_gate = z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))
    else:
        gate, d_gate = sigmoid, sigmoid * (1.0 - sigmoid)
    u, d_normed = (y, d_out * gate) if before_gate else (y * gate, d_out)
    normed = u * _per_channel(root_BTG, y.shape)
    return {"y": y, "d_out": d_out, "gate": gate, "d_gate": d_gate, "normed": normed, "d_normed": d_normed}


gated_rms_norm.defvjp(_gated_rms_norm, _gated_rms_norm_bwd)


def _group_mean(u_BTHP: jax.Array, n_groups: int) -> jax.Array:
    """Means of the groups of channels, [B, T, n_groups]."""
    return u_BTHP.reshape(*u_BTHP.shape[:2], n_groups, -1).mean(-1)


def _per_channel(v_BTG: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Each group's value at all its channels, [B, T, H, P]."""
    per_group = shape[2] * shape[3] // v_BTG.shape[2]
    return jnp.broadcast_to(v_BTG[..., None], (*v_BTG.shape, per_group)).reshape(shape)
