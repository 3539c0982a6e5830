# SPDX-License-Identifier: Apache-2.0
"""What the blocks have in common: what is known of the tokens, norms, the short convolution, activations.

Letters: B batch, T tokens, D model, H heads, P head width, K key/value heads, G groups, N state, W window, F width.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Tokens(NamedTuple):
    """What a mixer knows of the tokens beside their vectors. Padding of a row stands in front of its real tokens."""

    place_BT: torch.Tensor
    """How many real tokens of the row stand before each; -1 for padding."""
    real_BT: torch.Tensor | None
    """False for padding; None: there is none."""
    position_BT: torch.Tensor
    """For rotations."""
    embedded_BTD: torch.Tensor
    """The embedded tokens."""

    def without_padding(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, ...], zero at padding."""
        if self.real_BT is None:
            return x
        return x.masked_fill(~self.real_BT.view(*self.real_BT.shape, *(1,) * (x.dim() - 2)), 0.0)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu", "reglu2": "relu2"}
"""Gated activations by what goes through the gate's side."""


def linear(n_in: int, n_out: int, bias: bool = False) -> nn.Linear:
    """A linear map."""
    return nn.Linear(n_in, n_out, bias=bias)


def rms_normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x over its root mean square along the last axis; float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    """RMS norm, or with `centred` layer norm, along the last axis: ... * (offset + weight) + bias, in float32."""

    def __init__(self, width: int, eps: float, offset: float = 0.0, bias: bool = False, centred: bool = False):
        super().__init__()
        self.eps, self.offset, self.centred = eps, offset, centred
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y - y.mean(-1, keepdim=True) if self.centred else y
        y = rms_normalise(y, self.eps) * (self.offset + self.weight.float())
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class GatedNorm(nn.Module):
    """norm(y * gate(z)) * weight, or norm(y) * weight * gate(z), over each of n_groups parts of the last axis."""

    def __init__(self, width: int, eps: float, n_groups: int = 1, before_gate: bool = True, gate: str = "silu"):
        super().__init__()
        self.eps, self.n_groups, self.before_gate = eps, n_groups, before_gate
        self.gate = {"silu": F.silu, "sigmoid": torch.sigmoid}[gate]
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """y and z [..., width] -> the type of z."""
        u, gate = y.float(), self.gate(z.float())
        u = u if self.before_gate else u * gate
        u = rms_normalise(u.unflatten(-1, (self.n_groups, -1)), self.eps).flatten(-2) * self.weight.float()
        return (u * gate if self.before_gate else u).to(z.dtype)


def behind(x: torch.Tensor, before: int, tokens: Tokens, cache: dict | None, name: str) -> torch.Tensor:
    """x [B, T, C] behind the last `before` tokens, [B, before + T, C]: cache[name], which is brought up to date, or
    zeros. They stand right before the row's real tokens, behind its padding."""
    window = None if cache is None else cache.get(name)
    window = x.new_zeros(x.shape[0], before, x.shape[2]) if window is None else window
    x = torch.cat([window, tokens.without_padding(x)], 1)
    if tokens.real_BT is not None:
        kept = torch.cat([tokens.real_BT.new_ones(x.shape[0], before), tokens.real_BT], 1)
        order = kept.int().argsort(dim=1, stable=True)
        x = x.gather(1, order[..., None].expand_as(x))
    if cache is not None:
        cache[name] = x[:, x.shape[1] - before :]
    return x


class ShortConv(nn.Module):
    """Causal convolution of W tokens, each channel by itself; the last W - 1 tokens are its memory."""

    def __init__(self, width: int, window: int, bias: bool, activation: str | None):
        super().__init__()
        self.activation = activation
        bound = 1 / math.sqrt(window)
        self.weight = nn.Parameter(torch.empty(width, 1, window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(
        self, x: torch.Tensor, tokens: Tokens, cache: dict | None, name: str = "conv", with_bias: bool = True
    ) -> torch.Tensor:
        """x [B, T, C] behind the tokens of cache[name], which is brought up to date."""
        x = behind(x, self.weight.shape[-1] - 1, tokens, cache, name)
        bias = None if self.bias is None or not with_bias else self.bias.float()
        y = F.conv1d(x.float().transpose(1, 2), self.weight.float(), bias, groups=x.shape[2]).transpose(1, 2)
        return (y if self.activation is None else ACTIVATIONS[self.activation](y)).to(x.dtype)


class HeadNorm(nn.Module):
    """Layer norm of each head by itself, with a weight and a bias for each channel of all; float32."""

    def __init__(self, width: int, eps: float, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, y_BTHP: torch.Tensor) -> torch.Tensor:
        """[B, T, H, P] -> [B, T, H * P]."""
        y = y_BTHP.float()
        y = rms_normalise(y - y.mean(-1, keepdim=True), self.eps).flatten(-2) * self.weight.float()
        return y if self.bias is None else y + self.bias.float()


def number(value: Any) -> float:
    """A number of config.json, which writes infinity as a text."""
    return float(value)
