# SPDX-License-Identifier: Apache-2.0
"""RWKV-4, RWKV-6 and RWKV-7 with their channel mixes (Peng et al. 2023, 2024, 2025), token by token.

Letters: B batch, T tokens, D model, H heads, N width of a head, F inner width, R low rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers_hybridlm import HeadNorm, Tokens, behind, linear
from .linear_attention_hybridlm import linear_attention


def before(x_BTD, tokens: Tokens, cache: dict | None):
    """The token before each; zeros before a row's first."""
    return behind(x_BTD, 1, tokens, cache, "before")[:, :-1]


def blend(x, x_before, share):
    """x with a share of the token before it, by channel."""
    return x + (x_before - x) * share.to(x.dtype)


class Rwkv7(nn.Module):
    """Generalised delta rule, S_t = (diag(w) - (a o u) u') S_(t-1) + k v'; norm of heads, bonus, gate."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        D, N = d_model, block["d_head"]
        self.block, self.n_heads, self.hands_on = block, D // N, block["values"] != "own"
        self.shares = nn.Parameter(torch.zeros(6, D))  # of r, w, k, v, a, g
        self.r_proj, self.k_proj, self.v_proj = linear(D, D), linear(D, D), linear(D, D)
        pair = lambda rank, *between: nn.Sequential(linear(D, block[rank]), *between, linear(block[rank], D))
        self.decay_proj = pair("decay_rank", nn.Tanh())
        self.rate_proj = pair("rate_rank")
        self.gate_proj = pair("gate_rank", nn.Sigmoid())
        self.share_proj = pair("value_rank") if block["values"] == "mixed" else None
        parameter = lambda: nn.Parameter(torch.zeros(D))
        self.decay_bias, self.rate_bias, self.k_k, self.k_a, self.r_k = (parameter() for _ in range(5))
        self.share_bias = parameter() if block["values"] == "mixed" else None
        self.norm = HeadNorm(D, block["norm_eps"])
        self.o_proj = linear(D, D)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None, passed_BTD=None):
        """The output; where values are handed on, those of the first depth with it."""
        x_before, heads = before(x_BTD, tokens, cache), lambda a: a.unflatten(-1, (self.n_heads, -1))
        xr, xw, xk, xv, xa, xg = (blend(x_BTD, x_before, share) for share in self.shares)
        r, k, v = self.r_proj(xr).float(), self.k_proj(xk).float(), self.v_proj(xv)
        g = -math.exp(-0.5) * torch.sigmoid(self.decay_proj(xw).float() + self.decay_bias.float())
        rate = torch.sigmoid(self.rate_proj(xa).float() + self.rate_bias.float())
        if self.block["values"] == "first":
            passed_BTD = v.float()
        elif self.share_proj is not None:
            share = torch.sigmoid(self.share_proj(xv).float() + self.share_bias.float())
            first = 0.0 if passed_BTD is None else passed_BTD
            v = (v.float() + (first - v.float()) * share).to(v.dtype)
        unit = F.normalize(heads(k * self.k_k.float()), dim=-1)
        r, k, v, rate, g = (heads(a) for a in (r, k * (1 + (rate - 1) * self.k_a.float()), v.float(), rate, g))
        y = self.norm(self._rule(r, k, v, unit, unit * rate, g, tokens, cache))
        bonus = (r * k * heads(self.r_k.float())).sum(-1, keepdim=True) * v
        y = self.o_proj(((y + bonus.flatten(-2)) * self.gate_proj(xg).float()).to(x_BTD.dtype))
        return (y, passed_BTD) if self.hands_on else y

    def _rule(self, r, k, v, removed, written, g, tokens: Tokens, cache: dict | None):
        """What is read of S_t = diag(exp(g)) S_(t-1) - written (removed' S_(t-1)) + k v', all [B, T, H, N]."""
        k, written, g = (tokens.without_padding(a) for a in (k, written, g))
        state = None if cache is None else cache.get("state")
        state = v.new_zeros(*k[:, 0].shape, v.shape[-1]) if state is None else state
        outputs = []
        for r_t, k_t, v_t, u, b, w in zip(*(a.unbind(1) for a in (r, k, v, removed, written, g.exp()))):
            old = (state * u[..., None]).sum(-2)
            state = w[..., None] * state - b[..., None] * old[:, :, None] + k_t[..., None] * v_t[:, :, None]
            outputs.append((state * r_t[..., None]).sum(-2))
        if cache is not None:
            cache["state"] = state
        return torch.stack(outputs, 1)


class Rwkv6(nn.Module):
    """Linear attention with a decay by channel and a bonus; shares of the token before depend on the data."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, D, R = block, d_model, block["mix_rank"]
        self.n_heads = D // block["d_head"]
        self.first_share = nn.Parameter(torch.zeros(D))
        self.shares = nn.Parameter(torch.zeros(5, D))  # of r, w, k, v, g
        self.share_down = linear(D, 5 * R)
        self.share_up = nn.Parameter(torch.zeros(5, R, D))
        self.r_proj, self.k_proj, self.v_proj, self.gate_proj = (linear(D, D) for _ in range(4))
        self.decay_proj = nn.Sequential(linear(D, block["decay_rank"]), nn.Tanh(), linear(block["decay_rank"], D))
        self.decay_bias, self.bonus = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.norm = HeadNorm(D, block["norm_eps"])
        self.o_proj = linear(D, D)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        x_before, heads = before(x_BTD, tokens, cache), lambda a: a.unflatten(-1, (self.n_heads, -1))
        low = torch.tanh(self.share_down(blend(x_BTD, x_before, self.first_share))).unflatten(-1, (5, -1))
        more = torch.einsum("btcr,crd->btcd", low, self.share_up.to(low.dtype))
        r, w, k, v, g = (
            blend(x_BTD, x_before, share.to(low.dtype) + part) for share, part in zip(self.shares, more.unbind(2))
        )
        log_decay = -(self.decay_proj(w).float() + self.decay_bias.float()).exp()
        r, k, v, log_decay = (heads(a) for a in (self.r_proj(r), self.k_proj(k), self.v_proj(v), log_decay))
        y = self.norm(linear_attention(r, k, v, log_decay, tokens, cache, heads(self.bonus.float())))
        return self.o_proj((y * F.silu(self.gate_proj(g).float())).to(x_BTD.dtype))


class ChannelMix(nn.Module):
    """down(relu(up(mixed x))^2), times the receptance where there is one."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.share_in = nn.Parameter(torch.zeros(d_model))
        self.share_gate = nn.Parameter(torch.zeros(d_model)) if block["gate"] else None
        self.up_proj, self.down_proj = linear(d_model, block["d_ff"]), linear(block["d_ff"], d_model)
        self.receptance = linear(d_model, d_model) if block["gate"] else None

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        x_before = before(x_BTD, tokens, cache)
        y = self.down_proj(F.relu(self.up_proj(blend(x_BTD, x_before, self.share_in))).square())
        if self.receptance is None:
            return y
        return y * torch.sigmoid(self.receptance(blend(x_BTD, x_before, self.share_gate)))


def shared_out(x, x_before, shares):
    """Mixtures of each token and the one before, of which the shares are those of the token itself."""
    x, x_before, shares = x.float(), x_before.float(), shares.float()
    return [x * share + x_before * (1 - share) for share in shares]


class Rwkv4(nn.Module):
    """A mean of values weighed by keys and age, one channel by itself; sigmoid receptance; output projection."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        width = block["d_inner"]
        self.shares = nn.Parameter(torch.zeros(3, d_model))  # of key, value, receptance
        self.k_proj, self.v_proj, self.r_proj = (linear(d_model, width) for _ in range(3))
        self.decay, self.bonus = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.o_proj = linear(width, d_model)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        mixed = (a.to(x_BTD.dtype) for a in shared_out(x_BTD, before(x_BTD, tokens, cache), self.shares))
        k, v, r = (proj(a) for proj, a in zip((self.k_proj, self.v_proj, self.r_proj), mixed))
        y = self._mean(k.float(), v.float(), tokens, cache).to(x_BTD.dtype)
        return self.o_proj(y * torch.sigmoid(r))

    def _mean(self, k_BTF, v_BTF, tokens: Tokens, cache: dict | None):
        """Sums a and b of values and weights are kept over exp(m), so that nothing overflows."""
        decay_F, bonus_F = -self.decay.float().exp(), self.bonus.float()
        nothing = torch.zeros_like(k_BTF[:, 0])
        a, b, m = (None,) * 3 if cache is None else (cache.get(name) for name in "abm")
        a, b, m = (nothing, nothing, nothing - 1e30) if a is None else (a, b, m)
        real_BT = tokens.real_BT
        outputs = []
        for t, (k, v) in enumerate(zip(k_BTF.unbind(1), v_BTF.unbind(1))):
            top = torch.maximum(m, k + bonus_F)
            keep, add = (m - top).exp(), (k + bonus_F - top).exp()
            outputs.append((keep * a + add * v) / (keep * b + add))
            top = torch.maximum(m + decay_F, k)
            keep, add = (m + decay_F - top).exp(), (k - top).exp()
            new = keep * a + add * v, keep * b + add, top
            if real_BT is not None:
                new = (torch.where(real_BT[:, t, None], after, old) for after, old in zip(new, (a, b, m)))
            a, b, m = new
        if cache is not None:
            cache.update(a=a, b=b, m=m)
        return torch.stack(outputs, 1)


class Rwkv4Channel(nn.Module):
    """sigmoid(receptance) * down(relu(up x)^2), both of the token mixed with the one before."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.shares = nn.Parameter(torch.zeros(2, d_model))  # of key, receptance
        self.up_proj, self.down_proj = linear(d_model, block["d_ff"]), linear(block["d_ff"], d_model)
        self.receptance = linear(d_model, d_model)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        key, receptance = (a.to(x_BTD.dtype) for a in shared_out(x_BTD, before(x_BTD, tokens, cache), self.shares))
        return torch.sigmoid(self.receptance(receptance)) * self.down_proj(F.relu(self.up_proj(key)).square())
