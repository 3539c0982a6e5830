# SPDX-License-Identifier: Apache-2.0
"""Feed-forward sublayers: SwiGLU (Shazeer 2020), GELU, squared ReLU (So et al. 2021)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from hybridlm import exchange, sharding
from hybridlm.errors import require
from hybridlm.fields import check_fields
from hybridlm.layers import one_row, params
from hybridlm.layers.block import Kept, Make, Output, Statistic, Tokens, is_kept, on_arrays
from hybridlm.layers.quantized import Wide, dot
from pallas_kernels import gated_product


@dataclass(frozen=True)
class MLP:
    """Feed-forward sublayer of width d_ff."""

    d_ff: int = 4096
    """Feed-forward width F."""
    activation: Literal[
        "swiglu", "geglu", "geglu_tanh", "reglu", "reglu2", "silu", "gelu", "gelu_tanh", "relu", "relu2"
    ] = "swiglu"
    """Those in -glu are gated (three matrices); the others are not (two matrices). gelu is exact but with _tanh."""
    bias: bool = False
    """Bias of the projections."""
    gate_multiplier: float = 1.0
    """Multiplies what goes through the activation, before it."""
    out_multiplier: float = 1.0
    """Multiplies the output."""

    FREE: ClassVar[frozenset[str]] = frozenset()
    KEPT: ClassVar[Mapping[str, Kept]] = {
        "mlp_in": Kept("MLP: result of the first product", kernels=True),
        "mlp_hidden": Kept("MLP: input of the last product"),
    }
    STATISTICS: ClassVar[Mapping[str, Statistic]] = {}
    MIXES_TOKENS = False

    def __post_init__(self):
        check_fields(self)
        require(self.d_ff > 0, f"d_ff ({self.d_ff}) must be positive")

    def check(self, d_model: int) -> None:
        """An MLP fits any model width."""
        require(d_model > 0, f"d_model ({d_model}) must be positive")

    def build(self, d_model: int, make: Make) -> "FeedForward":
        """The mixer of one sublayer."""
        return make.mixer(FeedForward, self, d_model)

    def split(self, d_model: int) -> list[tuple[str, int, str]]:
        """The feed-forward width."""
        return [("d_ff", self.d_ff, "d_ff")]

    def flops(self, d_model: int, seq_len: int) -> float:
        """Two or three matrices."""
        return 2.0 * (3 if self.gated else 2) * d_model * self.d_ff

    def resolved(self, d_model: int) -> "MLP":
        """Nothing is derived."""
        return self

    @property
    def gated(self) -> bool:
        """One matrix more: its product, through the activation, multiplies the other's."""
        return self.activation in GATED


GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "reglu2": "relu2"}
"""Gated activations by what goes through the gate's side."""
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class FeedForward(nnx.Module):
    """w_out(activation(w_in x)); gated: w_out(activation(w_in[0] x) * w_in[1] x)."""

    def __init__(
        self,
        config: MLP,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        init_std: float = 0.02,
        out_std: float | None = None,
        dtype: DTypeLike = "bfloat16",
    ):
        """init_std, out_std: standard deviations of the first matrices and of the last (None: init_std)."""
        self.config, self.d_model, self.dtype = config, d_model, dtype
        out_std = init_std if out_std is None else out_std
        d_ff, bias = config.d_ff, config.bias
        if config.gated:
            self.w_in = params.matrix(rngs, (d_model, 2, d_ff), ("d_model", None, "d_ff"), init_std, fused_axes=(1,))
            self.b_in = params.zeros((2, d_ff), (None, "d_ff"), "bias") if bias else None
        else:
            self.w_in = params.matrix(rngs, (d_model, d_ff), ("d_model", "d_ff"), init_std)
            self.b_in = params.zeros((d_ff,), ("d_ff",), "bias") if bias else None
        self.w_out = params.matrix(rngs, (d_ff, d_model), ("d_ff", "d_model"), out_std)
        self.b_out = params.zeros((d_model,), ("d_model",), "bias") if bias else None

    cache_grows = False
    __call__ = on_arrays

    def mix(self, x_BTD: jax.Array, tokens: Tokens, added: jax.Array | None = None) -> Output:
        """[B, T, D] -> [B, T, D] in `dtype`. Every token for itself: segment ids and positions do not matter.

        added: [B, T, F], or [B, T, 2, F] where gated, added to the first product.
        """
        x_BTD = x_BTD.astype(self.dtype)
        goes_round = added is None and self.goes_round(x_BTD.shape)
        in_kernels = added is None and self._is_plain and _serve_products(x_BTD, self.w_in, self.w_out, goes_round)
        if goes_round:
            weights = [w for w in (self.w_in, self.w_out, self.b_in) if w is not None]
            begin, end = (_first_product, _last_product) if in_kernels else (self._begin, self._end)
            y_BTD = params.round_products(begin, end, x_BTD, weights)
            y_BTD = y_BTD if self.b_out is None else y_BTD + params.use(self.b_out, self.dtype)[None, None]
        elif in_kernels:
            y_BTD = params.enter(_in_products, x_BTD, [self.w_in, self.w_out], sharding.STREAM)
        else:
            with jax.named_scope("mlp_in"):
                h = params.project(x_BTD, self.w_in, self.b_in)
                h = h if added is None else h + added
                h = sharding.constrain(h, "batch", "tokens", *(None,) * (h.ndim - 3), "d_ff")
                h = checkpoint_name(h, "mlp_in")
            h_BTF = self._hidden(h)
            with jax.named_scope("mlp_out"):
                y_BTD = params.leave(h_BTF, self.w_out, self.b_out, kept="mlp_hidden")
        return Output(y_BTD if self.config.out_multiplier == 1 else y_BTD * self.config.out_multiplier)

    def goes_round(self, shape: tuple[int, ...]) -> bool:
        """Whether tokens of a stream of this shape go round: see `exchange.round_products`."""
        return exchange.goes_round(shape, "d_ff", self.config.d_ff)

    @property
    def _is_plain(self) -> bool:
        """silu of the gate itself times the other half, without biases."""
        c = self.config
        return c.activation == "swiglu" and c.gate_multiplier == 1 and self.b_in is self.b_out is None

    def _begin(self, x_BTD: jax.Array, w_in, w_out, b_in: jax.Array | None = None) -> jax.Array:
        """The first product, of a device's widths."""
        with jax.named_scope("mlp_in"):
            h = dot(x_BTD, w_in)
            return checkpoint_name(h if b_in is None else h + b_in[None, None], "mlp_in")

    def _end(self, h: jax.Array, w_in, w_out, b_in: jax.Array | None = None) -> jax.Array:
        """What it becomes, without the last bias."""
        h_BTF = checkpoint_name(self._hidden(h), "mlp_hidden")
        with jax.named_scope("mlp_out"):
            return dot(h_BTF, w_out)

    def _hidden(self, h: jax.Array) -> jax.Array:
        """What the last product takes, of the first one's result."""
        with jax.named_scope("mlp_hidden"):
            run = gated if self.config.gated else _activated
            return run(h, GATED.get(self.config.activation, self.config.activation), self.config.gate_multiplier)

    def init_cache(self, batch: int, max_len: int) -> dict:
        """Nothing to remember."""
        return {}

    def extend(
        self, x_BTD: jax.Array, cache: dict, length_B, real_BT=None, layer=None, *, gaps: bool = True
    ) -> tuple[jax.Array, dict]:
        """`mix`: the past does not matter."""
        return self.mix(x_BTD, Tokens()).y_BTD, cache

    def extend_row(self, row: one_row.Row, cache: dict, length_B, layer) -> tuple[jax.Array, dict] | None:
        """See `layers.one_row`."""
        plain = self._is_plain and self.config.out_multiplier == 1
        if not plain or not one_row.takes(self.w_in, self.w_out):
            return None
        with jax.named_scope("mlp_in"):
            (h_BcF,) = one_row.products(row, self.w_in)
        with jax.named_scope("mlp_out"):
            return one_row.add(row, "silu", [h_BcF], self.w_out), cache


def _activated(h: jax.Array, activation: str, multiplier: float) -> jax.Array:
    """activation(multiplier * h)."""
    return ACTIVATIONS[activation](h if multiplier == 1 else h * multiplier)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gated(h_BTcF: jax.Array, activation: str, multiplier: float) -> jax.Array:
    """activation(multiplier * gate) * up, [B, T, F], of both in one array [B, T, 2, F].

    The gradient is written out: its two halves are put together, where they would be padded to the whole and added.
    """
    return _activated(h_BTcF[:, :, 0], activation, multiplier) * h_BTcF[:, :, 1]


def _gated_fwd(h_BTcF, activation, multiplier):
    return gated(h_BTcF, activation, multiplier), h_BTcF


def _gated_bwd(activation, multiplier, h_BTcF, d_BTF):
    if activation == "silu" and multiplier == 1 and _has_kernel(h_BTcF, d_BTF):
        return (_in_kernel(h_BTcF, d_BTF),)
    gate, up = h_BTcF[:, :, 0], h_BTcF[:, :, 1]
    active, back = jax.vjp(lambda gate: _activated(gate, activation, multiplier), gate)
    return (jnp.stack([back(d_BTF * up)[0], d_BTF * active], axis=2),)


gated.defvjp(_gated_fwd, _gated_bwd)


HIDDEN = ("batch", "tokens", None, "d_ff")
"""Logical axes of both halves [B, T, 2, F]."""


def _has_kernel(h_BTcF, d_BTF) -> bool:
    """Whether `pallas_kernels.gated_product` serves the gradient: of one expert, as each device has it."""
    if h_BTcF.ndim != 4 or h_BTcF.dtype != d_BTF.dtype:
        return False
    batch, tokens, _, width = exchange.own_shape(HIDDEN, h_BTcF.shape)
    return gated_product.why_not(batch * tokens, width, h_BTcF.dtype) is None


def _in_kernel(h_BTcF, d_BTF) -> jax.Array:
    """The gradient in one pass, each device that of its own; XLA reads what both halves are of for each of them."""

    def of_device(h, d):
        dh = gated_product.gated_product_gradients(h.reshape(-1, *h.shape[2:]), d.reshape(-1, d.shape[2]))
        return dh.reshape(h.shape)

    return exchange.manual(of_device, (h_BTcF, d_BTF), (HIDDEN, (*HIDDEN[:2], "d_ff")), (HIDDEN, h_BTcF.shape))


# What stands between both products, made by their kernels ------------------------------------------------------------


def _serve_products(x_BTD: jax.Array, w_in: nnx.Param, w_out: nnx.Param, goes_round: bool) -> bool:
    """Whether `pallas_kernels.gated_product` serves the products, as each device has its tokens: of whole widths, or of
    its own where tokens go round."""
    if sharding.axis_size("tensor") > 1 and not goes_round:
        return False
    if not all(isinstance(params.operand(w, x_BTD.dtype), jax.Array | Wide) for w in (w_in, w_out)):
        return False
    batch, tokens, n_inputs = exchange.own_shape(sharding.STREAM, x_BTD.shape)
    (width,) = exchange.own_shape(("d_ff",), w_out.shape[:1])
    return gated_product.why_not_products(batch * tokens, n_inputs, width, x_BTD.dtype) is None


def _first_product(x_BTD: jax.Array, w_in: jax.Array | Wide, w_out: jax.Array | Wide) -> tuple[jax.Array, jax.Array]:
    """x w_in and the hidden of it, [B, T, 2, F] and [B, T, F]."""
    with jax.named_scope("mlp_in"):
        h_BTcF, h_BTF = _enter(x_BTD, w_in)
        return checkpoint_name(h_BTcF, "mlp_in"), checkpoint_name(h_BTF, "mlp_hidden")


def _last_product(begun: tuple[jax.Array, jax.Array], w_in: jax.Array | Wide, w_out: jax.Array | Wide) -> jax.Array:
    """The hidden times w_out, [B, T, D], whose gradient never has the hidden's in memory."""
    with jax.named_scope("mlp_out"):
        return _leave(*begun, w_out, is_kept("mlp_in") and not is_kept("mlp_hidden"))


def _in_products(x_BTD: jax.Array, w_in: jax.Array | Wide, w_out: jax.Array | Wide) -> jax.Array:
    """(silu(x w_in[:, 0]) * (x w_in[:, 1])) w_out, [B, T, D]."""
    return _last_product(_first_product(x_BTD, w_in, w_out), w_in, w_out)


@jax.custom_vjp
def _enter(x_BTD: jax.Array, w_DcF: jax.Array | Wide) -> tuple[jax.Array, jax.Array]:
    """The first product and the hidden of it, [B, T, 2, F] and [B, T, F]. What reaches the hidden, `_leave` has in the
    gradient of the product. Where nothing is differentiated, no kernel stores both."""
    h_BTcF = dot(x_BTD, w_DcF)
    return h_BTcF, gated(h_BTcF, "silu", 1.0)


def _enter_fwd(x_BTD, w_DcF):
    h, hidden = gated_product.gated_products(_rows(x_BTD), _value(w_DcF))
    of_tokens = lambda a: a.reshape(*x_BTD.shape[:2], *a.shape[1:])
    return (of_tokens(h), of_tokens(hidden)), (x_BTD, _unslotted(w_DcF))


def _enter_bwd(saved, grads):
    (x_BTD, w_DcF), (dh_BTcF, _) = saved, grads
    return jnp.tensordot(dh_BTcF, _value(w_DcF), ((2, 3), (1, 2))), _of_matrix(x_BTD, dh_BTcF, w_DcF)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _leave(h_BTcF: jax.Array, h_BTF: jax.Array, w_FD: jax.Array | Wide, again: bool) -> jax.Array:
    """The last product, of a hidden whose gradient is that of h. again: the backward makes the hidden of h, where h
    alone is kept."""
    return dot(h_BTF, w_FD)


def _leave_fwd(h_BTcF, h_BTF, w_FD, again):
    return dot(h_BTF, w_FD), (h_BTcF, None if again else h_BTF, _unslotted(w_FD))


def _leave_bwd(again, saved, dy_BTD):
    h_BTcF, h_BTF, w_FD = saved
    h_BTF = gated(h_BTcF, "silu", 1.0) if again else h_BTF
    dh = gated_product.hidden_gradients(_rows(dy_BTD), _value(w_FD), _rows(h_BTcF))
    return dh.reshape(h_BTcF.shape), None, _of_matrix(h_BTF, dy_BTD, w_FD)


_enter.defvjp(_enter_fwd, _enter_bwd)
_leave.defvjp(_leave_fwd, _leave_bwd)


def _rows(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [R, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _value(matrix: jax.Array | Wide) -> jax.Array:
    return matrix.value if isinstance(matrix, Wide) else matrix


def _unslotted(matrix: jax.Array | Wide) -> Any:
    """Without what is never read, so that nobody keeps it."""
    return replace(matrix, slot=cast(Any, None)) if isinstance(matrix, Wide) else matrix


def _of_matrix(x_BTI: jax.Array, dy: jax.Array, matrix: jax.Array | Wide) -> Any:
    """The matrix's gradient of x times it, [I, ...]; as `quantized.dot` has it of a `Wide`, that of its slot."""
    if not isinstance(matrix, Wide):
        return jnp.tensordot(x_BTI, dy, ((0, 1), (0, 1)))
    d_slot = jnp.tensordot(x_BTI, dy, ((0, 1), (0, 1)), preferred_element_type=jnp.float32)
    return replace(matrix, value=cast(Any, None), slot=d_slot[None])
