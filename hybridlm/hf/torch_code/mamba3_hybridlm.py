# SPDX-License-Identifier: Apache-2.0
"""Mamba-3 (2025, openreview.net/forum?id=HwCvaJOiCj), token by token.

Letters: B batch, T tokens, D model, H heads, P head width, G groups, N state, R inputs and outputs of a head, S angles.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers_hybridlm import Norm, Tokens, linear, rms_normalise


class Mamba3(nn.Module):
    """z, x, B, C, dt, A, trapezoid's share, angles = projection; norms of B and C; scan of a turned state; gate."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, P, N, G = block, block["d_head"], block["d_state"], block["n_groups"]
        self.n_heads, self.rank = H, R = round(block["expand"] * d_model) // P, block["rank"]
        ranks = () if R is None else (R,)
        BC, self.n_angles = (R or 1) * G * N, int(N * block["rope_fraction"]) // 2
        self.sizes = [H * P, H * P, BC, BC, H, H, H, self.n_angles]
        self.in_proj = linear(d_model, sum(self.sizes))
        self.dt_bias = nn.Parameter(torch.full((H,), math.log(math.expm1(0.01))))
        self.B_norm, self.C_norm = Norm(N, 1e-5), Norm(N, 1e-5)
        self.B_bias, self.C_bias = nn.Parameter(torch.ones(H, *ranks, N)), nn.Parameter(torch.ones(H, *ranks, N))
        self.D = nn.Parameter(torch.ones(H))
        mimo = lambda value: None if R is None else nn.Parameter(torch.full((H, R, P), value))
        self.mimo_v, self.mimo_z, self.mimo_o = mimo(1 / (R or 1)), mimo(1.0), mimo(1 / (R or 1))
        self.norm_weight = nn.Parameter(torch.ones(H, P)) if block["out_norm"] else None
        self.out_proj = linear(H * P, d_model)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        H = self.n_heads
        z, x, B, C, dt, A, share, angles = self.in_proj(x_BTD).split(self.sizes, -1)
        dt, A, share, angles = (a.float() for a in (dt, A, share, angles))
        dt = tokens.without_padding(F.softplus(dt + self.dt_bias.float()))
        share, g = torch.sigmoid(share), dt * self._rates(A)
        turn = dt[..., None] * math.pi * torch.tanh(angles)[:, :, None]
        B, C = (self._keys(*of) for of in ((B, self.B_norm, self.B_bias), (C, self.C_norm, self.C_bias)))
        x_BTHRP = x.float().unflatten(-1, (H, 1, -1))
        x_BTHRP = x_BTHRP if self.mimo_v is None else x_BTHRP * self.mimo_v.float()
        y = self._scan(x_BTHRP, B, C, g, share * dt, (1 - share) * dt, turn, tokens, cache)
        y = self._gated(y + self.D.float()[:, None, None] * x_BTHRP, z.float().unflatten(-1, (H, 1, -1)))
        return self.out_proj(y.flatten(-2).to(x_BTD.dtype))

    def _rates(self, raw):
        """A, below zero."""
        heavy = torch.where(raw >= 0, 1 + raw, 1 / (1 - raw.clamp(max=0)))
        size = heavy if self.block["A_activation"] == "heavy_tail" else F.softplus(raw)
        return -size.clamp(min=self.block["A_floor"])

    def _keys(self, a, norm: Norm, bias):
        """B or C [B, T, H, R, N] in float32: normed, of the head's group, with the head's bias."""
        G = self.block["n_groups"]
        a = norm(a.unflatten(-1, (self.rank or 1, G, -1))).float().repeat_interleave(self.n_heads // G, 3)
        return a.transpose(2, 3) + bias.float().view(self.n_heads, -1, a.shape[-1])

    def _scan(self, x, B, C, g, now_BTH, late_BTH, turn_BTHS, tokens: Tokens, cache: dict | None):
        """h_t = exp(g) (h_(t-1) + late x_(t-1) B_(t-1)') + now x_t B_t', y_t = h_t C_t, B and C turned by all angles
        so far; [B, T, H, R, P]."""
        names = ("angle", "state", "key", "value")
        if cache is None or "state" not in cache:
            state = x.new_zeros(*x.shape[:1], self.n_heads, x.shape[-1], B.shape[-1])
            last = [torch.zeros_like(turn_BTHS[:, 0]), state, torch.zeros_like(B[:, 0]), torch.zeros_like(x[:, 0])]
        else:
            last = [cache[name] for name in names]
        outputs = []
        for t, (x_t, B_t, C_t, decay, now, late, turn) in enumerate(
            zip(*(a.unbind(1) for a in (x, B, C, g.exp(), now_BTH, late_BTH, turn_BTHS)))
        ):
            angle, state, key, value = last
            angle = torch.remainder(angle + turn, 2 * math.pi)
            B_t, C_t = (turned(a, angle[:, :, None], self.block["rotary_pairs"]) for a in (B_t, C_t))
            outer = lambda x, B: torch.einsum("bhrp,bhrn->bhpn", x, B)
            state = decay[..., None, None] * (state + late[..., None, None] * outer(value, key))
            state = state + now[..., None, None] * outer(x_t, B_t)
            outputs.append(torch.einsum("bhpn,bhrn->bhrp", state, C_t))
            new = [angle, state, B_t, x_t]
            if tokens.real_BT is not None:
                real_B = tokens.real_BT[:, t]
                new = [torch.where(real_B.view(-1, *(1,) * (a.dim() - 1)), a, old) for a, old in zip(new, last)]
            last = new
        if cache is not None:
            cache.update(zip(names, last))
        return torch.stack(outputs, 1)

    def _gated(self, y_BTHRP, z_BTH1P):
        """[B, T, H, P]: each rank's output normed and gated, and their sum."""
        if self.norm_weight is not None:
            y_BTHRP = rms_normalise(y_BTHRP, 1e-5) * self.norm_weight.float()[:, None]
        y_BTHRP = y_BTHRP * F.silu(z_BTH1P if self.mimo_z is None else z_BTH1P * self.mimo_z.float())
        return y_BTHRP.squeeze(-2) if self.mimo_o is None else (y_BTHRP * self.mimo_o.float()).sum(-2)


def turned(x, angle, pairs: str):
    """x [..., N] with the first pairs of channels turned by angle [..., S]: those beside each other, or N / 2 apart."""
    S, half, cos, sin = angle.shape[-1], x.shape[-1] // 2, angle.cos(), angle.sin()
    if pairs == "adjacent":
        a, b = x[..., : 2 * S].unflatten(-1, (S, 2)).unbind(-1)
        return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), x[..., 2 * S :]], -1)
    a, b = x[..., :S], x[..., half : half + S]
    return torch.cat([a * cos - b * sin, x[..., S:half], a * sin + b * cos, x[..., half + S :]], -1)
