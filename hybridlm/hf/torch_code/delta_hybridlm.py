# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024) and Kimi Delta Attention, token by token.

Letters: B batch, T tokens, D model, H heads, P head width, G key heads, N key width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .layers_hybridlm import GatedNorm, ShortConv, Tokens, linear


class DeltaRule(nn.Module):
    """What both have in common: convolutions of q, k and v, the rule, the norm of each head with its gate."""

    def __init__(self, block: dict, d_model: int, n_key_heads: int, gate: str):
        super().__init__()
        self.block, self.n_key_heads = block, n_key_heads
        H, P, N, W = block["n_heads"], block["d_head"], block["d_key"], block["d_conv"]
        self.q_proj = linear(d_model, n_key_heads * N)
        self.k_proj = linear(d_model, n_key_heads * N)
        self.v_proj = linear(d_model, H * P)
        conv = lambda width: ShortConv(width, W, bias=False, activation=block["activation"])
        self.q_conv1d, self.k_conv1d, self.v_conv1d = conv(n_key_heads * N), conv(n_key_heads * N), conv(H * P)
        self.A_log = nn.Parameter(torch.linspace(0.1, 16.0, H).log())
        self.o_norm = GatedNorm(P, block["norm_eps"], gate=gate)
        self.o_proj = linear(H * P, d_model)

    def rule(self, x_BTD, z, beta_BTH, g_BTHN, tokens: Tokens, cache: dict | None):
        """The mixer's output from the gate z, step sizes beta and log decays g, of the head ([B, T, H, 1]) or not."""
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        q, k, v = (
            conv(a, tokens, cache, name)
            for conv, a, name in ((self.q_conv1d, q, "q"), (self.k_conv1d, k, "k"), (self.v_conv1d, v, "v"))
        )
        H = self.block["n_heads"]
        q, k = (
            unit(a.unflatten(-1, (self.n_key_heads, -1))).repeat_interleave(H // self.n_key_heads, 2) for a in (q, k)
        )
        q, v = q * q.shape[-1] ** -0.5, v.float().unflatten(-1, (H, -1))
        beta_BTH, g_BTHN = tokens.without_padding(beta_BTH), tokens.without_padding(g_BTHN)
        state = None if cache is None else cache.get("state")
        y, state = delta_rule(q, k, v, beta_BTH, g_BTHN, state)
        if cache is not None:
            cache["state"] = state
        y = self.o_norm(y.to(z.dtype), z.unflatten(-1, (H, -1)))
        return self.o_proj(y.flatten(-2))


def unit(x):
    """x in float32 over its length along the last axis."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(q_BTHN, k_BTHN, v_BTHP, beta_BTH, g_BTHN, state_BHNP=None):
    """S_t = exp(g) S_(t-1) + k beta (v - k' exp(g) S_(t-1)), y_t = q' S_t: (y [B, T, H, P], the last S)."""
    batch, _, H, N = k_BTHN.shape
    state = v_BTHP.new_zeros(batch, H, N, v_BTHP.shape[-1]) if state_BHNP is None else state_BHNP
    outputs = []
    for q, k, v, beta, g in zip(*(a.unbind(1) for a in (q_BTHN, k_BTHN, v_BTHP, beta_BTH, g_BTHN))):
        state = g.exp()[..., None] * state
        read = (state * k[..., None]).sum(-2)
        state = state + k[..., None] * (beta[..., None] * (v - read))[:, :, None]
        outputs.append((state * q[..., None]).sum(-2))
    return torch.stack(outputs, 1), state


class GatedDeltaNet(DeltaRule):
    """Step sizes sigmoid(b), log decays -exp(A_log) softplus(a + dt_bias) of each head, gate silu(z) or sigmoid(z)."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__(block, d_model, block["n_key_heads"], block["gate"])
        H = block["n_heads"]
        self.z_proj = linear(d_model, H * block["d_head"])
        self.b_proj = linear(d_model, H)
        self.a_proj = linear(d_model, H)
        self.dt_bias = nn.Parameter(torch.full((H,), -4.6))

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        beta = torch.sigmoid(self.b_proj(x_BTD).float()) * (2.0 if self.block["neg_eigval"] else 1.0)
        g = -self.A_log.float().exp() * F.softplus(self.a_proj(x_BTD).float() + self.dt_bias.float())
        return self.rule(x_BTD, self.z_proj(x_BTD), beta, g[..., None], tokens, cache)


class KimiDelta(DeltaRule):
    """Step sizes sigmoid(b); log decays of each channel, of low rank where the config says so; gate sigmoid(z)."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__(block, d_model, block["n_heads"], "sigmoid")
        H, N, P = block["n_heads"], block["d_key"], block["d_head"]
        self.b_proj = linear(d_model, H)
        self.f_proj = low_rank(d_model, block["decay_rank"], H * N)
        self.g_proj = low_rank(d_model, block["gate_rank"], H * P)
        self.dt_bias = nn.Parameter(torch.full((H * N,), -4.6))

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        c = self.block
        beta = torch.sigmoid(self.b_proj(x_BTD).float()) * (2.0 if c["neg_eigval"] else 1.0)
        f = (self.f_proj(x_BTD).float() + self.dt_bias.float()).unflatten(-1, (c["n_heads"], -1))
        A, bound = self.A_log.float().exp()[:, None], c["lower_bound"]
        g = -A * F.softplus(f) if bound is None else bound * torch.sigmoid(A * f)
        return self.rule(x_BTD, self.g_proj(x_BTD), beta, g, tokens, cache)


def low_rank(n_in: int, rank: int | None, n_out: int) -> nn.Module:
    """A linear map, through a narrow width where that is given."""
    return linear(n_in, n_out) if rank is None else nn.Sequential(linear(n_in, rank), linear(rank, n_out))
