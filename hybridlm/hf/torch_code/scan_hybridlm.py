# SPDX-License-Identifier: Apache-2.0
"""Channels by themselves: minGRU, minLSTM, HGRN, the RG-LRU of Griffin, and the gated short convolution of LFM.

Letters: B batch, T tokens, D model, F channels, H heads, P channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers_hybridlm import ACTIVATIONS, GatedNorm, ShortConv, Tokens, linear


def linear_scan(x_BTF, log_decay_BTF, tokens: Tokens, cache: dict | None):
    """h_t = exp(log_decay_t) h_(t-1) + x_t in float32, behind the state of the cache."""
    x, decay = tokens.without_padding(x_BTF), tokens.without_padding(log_decay_BTF).exp()
    state = None if cache is None else cache.get("state")
    state = torch.zeros_like(x[:, 0]) if state is None else state
    states = []
    for x_t, decay_t in zip(x.unbind(1), decay.unbind(1)):
        state = decay_t * state + x_t
        states.append(state)
    if cache is not None:
        cache["state"] = state
    return torch.stack(states, 1)


class GatedScan(nn.Module):
    """minGRU, minLSTM (Feng et al. 2024) or HGRN (Qin et al. 2023), behind a convolution where there is one."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, width = block, int(block["expand"] * d_model)
        hgrn = block["cell"] == "hgrn"
        window = block["d_conv"]
        self.conv1d = None if window is None else ShortConv(d_model, window, bias=True, activation="silu")
        self.in_proj = linear(d_model, {"mingru": 2, "minlstm": 3, "hgrn": 3}[block["cell"]] * width)
        self.lower_bound = nn.Parameter(torch.zeros(width)) if hgrn and block["lower_bound"] else None
        self.norm = GatedNorm(width, block["norm_eps"]) if hgrn else None
        self.out_proj = linear(width, d_model)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        x_BTD = x_BTD if self.conv1d is None else self.conv1d(x_BTD, tokens, cache)
        parts = self.in_proj(x_BTD).chunk(2 if self.block["cell"] == "mingru" else 3, -1)
        h = linear_scan(*self._gates(*(part.float() for part in parts)), tokens, cache).to(x_BTD.dtype)
        return self.out_proj(h if self.norm is None else self.norm(h, parts[2]))

    def _gates(self, first, second, third=None):
        """What is added to the state, and the log decay."""
        if self.block["cell"] == "mingru":
            return torch.sigmoid(first) * self._candidate(second), F.logsigmoid(-first)
        if self.block["cell"] == "minlstm":
            log_f, log_i = F.logsigmoid(first), F.logsigmoid(second)
            total = torch.logaddexp(log_f, log_i)
            return (log_i - total).exp() * self._candidate(third), log_f - total
        if self.lower_bound is None:
            return torch.sigmoid(-first) * F.silu(second), F.logsigmoid(first)
        bound = self.lower_bound.float()
        g = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + F.logsigmoid(first))
        return torch.sigmoid(-bound) * torch.sigmoid(-first) * F.silu(second), g

    def _candidate(self, x):
        return torch.where(x >= 0, x + 0.5, torch.sigmoid(x)) if self.block["positive"] else x


class RGLRU(nn.Module):
    """Output projection of activation(y) * RG-LRU(convolution(x)) (De et al. 2024), y and x projections."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, width, H, bias = block, block["d_inner"], block["n_heads"], block["bias"]
        self.n_heads, P = H, width // H
        self.linear_y, self.linear_x = linear(d_model, width, bias), linear(d_model, width, bias)
        self.conv1d = ShortConv(width, block["d_conv"], bias=True, activation=None)
        self.gate_weights = nn.Parameter(torch.randn(2, H, P, P) / math.sqrt(P))
        self.gate_biases = nn.Parameter(torch.zeros(2, H, P))
        self.decay = nn.Parameter(torch.full((H, P), -4.0))
        self.linear_out = linear(width, d_model, bias)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        gate, u = self.linear_y(x_BTD), self.conv1d(self.linear_x(x_BTD), tokens, cache)
        u_BTHP = u.unflatten(-1, (self.n_heads, -1))
        gates = torch.einsum("bthq,chqp->cbthp", u_BTHP, self.gate_weights.to(u.dtype)).float()
        i, r = torch.sigmoid(gates + self.gate_biases.float()[:, None, None])
        log_a = -8.0 * r * F.softplus(self.decay.float())
        scale = (-torch.expm1(2 * log_a)).clamp(min=1e-12).sqrt()
        scale = torch.where((tokens.place_BT == 0)[..., None, None], 1.0, scale)  # nothing came before the first token
        h = linear_scan(scale * i * u_BTHP.float(), log_a, tokens, cache).flatten(-2)
        return self.linear_out((h * ACTIVATIONS[self.block["activation"]](gate).float()).to(x_BTD.dtype))


class GatedConv(nn.Module):
    """B, C, x = projection; output projection of C * convolution(B * x)."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        width, bias = block["d_inner"], block["bias"]
        self.in_proj = linear(d_model, 3 * width, bias)
        self.conv1d = ShortConv(width, block["d_conv"], bias, activation=None)
        self.out_proj = linear(width, d_model, bias)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        before, behind, x = self.in_proj(x_BTD).chunk(3, -1)
        return self.out_proj(behind * self.conv1d(before * x, tokens, cache))
