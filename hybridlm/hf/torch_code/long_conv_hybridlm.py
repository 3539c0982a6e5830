# SPDX-License-Identifier: Apache-2.0
"""Hyena (Poli et al. 2023): gates around a convolution as long as the text, whose inputs the cache keeps.

Letters: B batch, T tokens, S lags, D model and channels, N states.
"""

import math

import torch
from torch import nn

from .layers_hybridlm import ShortConv, Tokens, behind, linear


class Hyena(nn.Module):
    """x0 * (h ** (x1 * v) + D (x1 * v)) between projections; h is the filter, ** the convolution."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        bias, kind = block["proj_bias"], {"ImplicitFilter": ImplicitFilter, "ModalFilter": ModalFilter}
        self.in_proj = linear(d_model, 3 * d_model, bias)
        self.conv1d = ShortConv(3 * d_model, block["d_conv"], block["conv_bias"], activation=None)
        self.filter = kind[block["filter"]["type"]](block["filter"], d_model)
        self.D = nn.Parameter(torch.ones(d_model))
        self.out_proj = linear(d_model, d_model, bias)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        x0, x1, v = self.conv1d(self.in_proj(x_BTD), tokens, cache).chunk(3, -1)
        u = (x1 * v).float()
        known = 0 if cache is None or "history" not in cache else cache["history"].shape[1]
        history = behind(u, known, tokens, cache, "history")
        if cache is not None:
            cache["history"] = history
        n = history.shape[1]
        h_SD = self.filter(n)
        length = n + h_SD.shape[0]
        product = torch.fft.rfft(history, length, dim=1) * torch.fft.rfft(h_SD, length, dim=0)
        y = torch.fft.irfft(product, length, dim=1)[:, known:n] + self.D.float() * u
        return self.out_proj(x0 * y.to(x_BTD.dtype))


class ImplicitFilter(nn.Module):
    """decay * MLP(features of the lag), with sines between its layers; float32."""

    def __init__(self, block: dict, channels: int):
        super().__init__()
        self.block, F, width, n = block, block["d_features"], block["width"], block["n_inner"]
        parameter = lambda *shape: nn.Parameter(torch.randn(shape) / math.sqrt(max(width, 1)))
        self.first, self.first_bias, self.last = parameter(F, width), parameter(width), parameter(width, channels)
        self.inner, self.inner_bias = parameter(n, width, width), parameter(n, width)
        self.frequency = nn.Parameter(torch.full((width,), float(block["frequency"])))

    def forward(self, n_lags: int):
        """[S, D], of at most max_len lags."""
        c, like = self.block, self.last.float()
        lag_S1 = torch.arange(min(n_lags, c["max_len"]), device=like.device, dtype=torch.float32)[:, None]
        share_S1, bands = lag_S1 / max(c["max_len"] - 1, 1), (c["d_features"] - 1) // 2
        angle = lag_S1 * (2 * math.pi / c["max_len"]) * torch.linspace(1e-4, bands - 1, bands, device=like.device)
        u, frequency = torch.cat([share_S1, angle.cos(), -angle.sin()], -1), self.frequency.float()
        u = torch.sin(frequency * (u @ self.first.float() + self.first_bias.float()))
        for weight, bias in zip(self.inner.float(), self.inner_bias.float()):
            u = torch.sin(frequency * (u @ weight + bias))
        slow, fast = (-math.log(c["target"]) / c[name] for name in ("slow_decay", "fast_decay"))
        rates = torch.linspace(slow, fast, like.shape[1], device=like.device)
        return (u @ like) * ((-share_S1 * rates).exp() + c["shift"])


class ModalFilter(nn.Module):
    """2 Re sum over states of C (exp(dt A) - 1) / A exp(t dt A); float32."""

    def __init__(self, block: dict, channels: int):
        super().__init__()
        N = block["d_state"]
        self.dt_log = nn.Parameter(torch.full((channels,), math.log(0.01)))
        self.A_log = nn.Parameter(torch.full((N, channels), math.log(0.5)))
        self.A_imaginary = nn.Parameter(math.pi * torch.arange(1.0 * N)[:, None].expand(N, channels).clone())
        self.weights = nn.Parameter(torch.randn(2, N, channels))

    def forward(self, n_lags: int):
        """[S, D]."""
        dt, total = self.dt_log.float().exp(), 0.0
        lag_S1 = torch.arange(n_lags, device=dt.device, dtype=torch.float32)[:, None]
        for log, imaginary, real, other in zip(self.A_log.float(), self.A_imaginary.float(), *self.weights.float()):
            A = torch.complex(-log.exp(), imaginary)
            weight = 2 * torch.complex(real, other) * ((dt * A).exp() - 1) / A
            total = total + (weight * torch.exp(lag_S1 * (dt * A))).real
        return total
