# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 (Dao & Gu 2024) and Mamba-1 (Gu & Dao 2023), in plain PyTorch.

Letters: B batch, T tokens, D model, H heads, P head width, G groups, N state, R rank, S tokens of a chunk, Q queries.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers_hybridlm import GatedNorm, Norm, ShortConv, Tokens, linear, number, rms_normalise

CHUNK = 64
"""Tokens that Mamba-2 takes at once."""


class Mamba2(nn.Module):
    """z, x, B, C, dt = projection; convolution of x, B, C; state space; norm with the gate z; projection."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block = block
        self.n_heads, self.d_head = H, P = block["n_heads"], block["d_head"]
        self.n_groups, self.d_state = G, N = block["n_groups"], block["d_state"]
        inner, self.low_high = H * P, tuple(number(limit) for limit in block["dt_limit"])
        self.sizes = [inner, inner, G * N, G * N, H]
        self.in_proj = linear(d_model, sum(self.sizes), block["proj_bias"])
        self.conv1d = ShortConv(inner + 2 * G * N, block["d_conv"], block["conv_bias"], block["activation"])
        self.A_log = nn.Parameter(torch.linspace(1.0, 16.0, H).log())
        self.dt_bias = nn.Parameter(torch.full((H,), math.log(math.expm1(0.01))))
        self.D = nn.Parameter(torch.ones(inner if block["per_channel_D"] else H))
        norm = block["gated_norm"]
        self.norm = None if norm is None else GatedNorm(inner, norm["eps"], norm["n_groups"], norm["before_gate"])
        self.out_proj = linear(inner, d_model, block["out_bias"])

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        parts = self.in_proj(x_BTD).split(self.sizes, -1)
        z, x, B, C, dt = (part if m == 1 else part * m for part, m in zip(parts, self.block["multipliers"]))
        xBC = self.conv1d(torch.cat([x, B, C], -1), tokens, cache)
        x, B, C = (a.float() for a in xBC.split(self.sizes[1:4], -1))
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*self.low_high)
        dt = tokens.without_padding(dt)  # padding neither decays the state nor adds to it
        x = x.unflatten(-1, (self.n_heads, self.d_head))
        B, C = (
            a.unflatten(-1, (self.n_groups, self.d_state)).repeat_interleave(self.n_heads // self.n_groups, 2)
            for a in (B, C)
        )
        state = None if cache is None else cache.get("state")
        y, state = state_space(x, dt, -self.A_log.float().exp(), B, C, state)
        if cache is not None:
            cache["state"] = state
        D = self.D.float().view(self.n_heads, -1)
        y = (y + D * x).flatten(-2)
        y = (y * F.silu(z.float())).to(z.dtype) if self.norm is None else self.norm(y.to(z.dtype), z)
        return self.out_proj(y)


def state_space(x_BTHP, dt_BTH, A_H, B_BTHN, C_BTHN, state_BHPN=None):
    """h_t = exp(dt A) h_(t-1) + dt x B', y_t = h_t C: (y [B, T, H, P], the last h), in float32, a chunk at a time."""
    batch, _, H, P = x_BTHP.shape
    state = x_BTHP.new_zeros(batch, H, P, B_BTHN.shape[-1]) if state_BHPN is None else state_BHPN
    outputs = []
    for x, dt, B, C in zip(*(a.split(CHUNK, 1) for a in (x_BTHP, dt_BTH, B_BTHN, C_BTHN))):
        decay_BHT = (dt * A_H).cumsum(1).transpose(1, 2)
        Q = decay_BHT.shape[-1]
        ahead = torch.ones(Q, Q, dtype=torch.bool, device=x.device).triu(1)
        gap_BHQS = (decay_BHT[..., :, None] - decay_BHT[..., None, :]).masked_fill(ahead, -torch.inf)
        scores_BHQS = torch.einsum("bqhn,bshn->bhqs", C, B) * gap_BHQS.exp() * dt.transpose(1, 2)[:, :, None]
        entering = torch.einsum("bqhn,bhpn->bqhp", C, state) * decay_BHT.exp().transpose(1, 2)[..., None]
        outputs.append(torch.einsum("bhqs,bshp->bqhp", scores_BHQS, x) + entering)
        last_BH1 = decay_BHT[..., -1:]
        kept_BSH = (last_BH1 - decay_BHT).exp().transpose(1, 2) * dt
        state = last_BH1[..., None].exp() * state + torch.einsum("bsh,bshp,bshn->bhpn", kept_BSH, x, B)
    return torch.cat(outputs, 1), state


class Mamba1(nn.Module):
    """x, z = projection; convolution of x; dt, B, C from x; selective scan, token by token; gate; projection."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block = block
        inner, H, N, R = round(block["expand"] * d_model), block["n_heads"], block["d_state"], block["dt_rank"]
        P, norm = inner // H, block["inner_norm"]
        self.n_heads, self.d_head, self.sizes = H, P, [R, N, N]
        self.in_proj = linear(d_model, 2 * inner, block["proj_bias"])
        self.conv1d = ShortConv(inner, block["d_conv"], block["conv_bias"], block["activation"])
        self.x_proj = nn.Parameter(torch.randn(H, R + 2 * N, P) / math.sqrt(P))
        self.dt_proj = nn.Parameter(torch.randn(H, P, R) / math.sqrt(R))
        self.dt_bias = nn.Parameter(torch.full((H, P), math.log(math.expm1(0.01))))
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().expand(H, P, N).clone())
        self.D = nn.Parameter(torch.ones(H, P))
        learned = norm is not None and norm["learned"]
        self.norms = nn.ModuleList([Norm(n, norm["eps"]) for n in self.sizes]) if learned else None
        self.out_proj = linear(inner, d_model, block["proj_bias"])

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        x, z = self.in_proj(x_BTD).chunk(2, -1)
        x_BTHP = self.conv1d(x, tokens, cache).unflatten(-1, (self.n_heads, self.d_head))
        low = torch.einsum("bthp,hrp->bthr", x_BTHP, self.x_proj.to(x.dtype)).split(self.sizes, -1)
        if self.norms is not None:
            low = [norm(part) for norm, part in zip(self.norms, low)]
        elif self.block["inner_norm"] is not None:
            low = [rms_normalise(part, self.block["inner_norm"]["eps"]).to(part.dtype) for part in low]
        dt, B, C = (part.float() for part in low)
        dt = F.softplus(torch.einsum("bthr,hpr->bthp", dt, self.dt_proj.float()) + self.dt_bias.float())
        dt, x_BTHP = tokens.without_padding(dt), x_BTHP.float()
        state = None if cache is None else cache.get("state")
        y, state = selective_scan(x_BTHP, dt, -self.A_log.float().exp(), B, C, state)
        if cache is not None:
            cache["state"] = state
        y = (y + self.D.float() * x_BTHP).flatten(-2)
        return self.out_proj((y * F.silu(z.float())).to(z.dtype))


def selective_scan(x_BTHP, dt_BTHP, A_HPN, B_BTHN, C_BTHN, state_BHPN=None):
    """h_t = exp(dt A) h_(t-1) + dt x B', y_t = h_t C: (y [B, T, H, P], the last h), in float32."""
    state = x_BTHP.new_zeros(x_BTHP.shape[0], *A_HPN.shape) if state_BHPN is None else state_BHPN
    outputs = []
    for x, dt, B, C in zip(*(a.unbind(1) for a in (x_BTHP, dt_BTHP, B_BTHN, C_BTHN))):
        state = (dt[..., None] * A_HPN).exp() * state + (dt * x)[..., None] * B[:, :, None]
        outputs.append((state * C[:, :, None]).sum(-1))
    return torch.stack(outputs, 1), state
