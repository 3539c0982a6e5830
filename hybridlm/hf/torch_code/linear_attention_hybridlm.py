# SPDX-License-Identifier: Apache-2.0
"""Linear attention with a decay: RetNet, lightning attention, GLA, Based, HGRN2, token by token.

Letters: B batch, T tokens, D model, H heads, N key width, P value width, R low rank.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .attention_hybridlm import rotate
from .layers_hybridlm import ACTIVATIONS, Tokens, linear, rms_normalise


def linear_attention(q_BTHN, k_BTHN, v_BTHP, g_BTHN, tokens: Tokens, cache: dict | None, bonus_HN=None):
    """S_t = exp(g_t) S_(t-1) + k_t v_t', y_t = S_t' q_t, in float32, behind the state of the cache.

    g: log decays, of the head ([B, T, H, 1]) or not. bonus: y_t = (S_(t-1) + bonus k_t v_t')' q_t in its place.
    """
    q, k, v = q_BTHN.float(), tokens.without_padding(k_BTHN.float()), v_BTHP.float()
    state = None if cache is None else cache.get("state")
    state = v.new_zeros(*k[:, 0].shape, v.shape[-1]) if state is None else state
    outputs = []
    for q_t, k_t, v_t, decay in zip(*(a.unbind(1) for a in (q, k, v, tokens.without_padding(g_BTHN).exp()))):
        added = k_t[..., None] * v_t[:, :, None]
        read = None if bonus_HN is None else state + bonus_HN[..., None] * added
        state = decay[..., None] * state + added
        outputs.append(((state if read is None else read) * q_t[..., None]).sum(-2))
    if cache is not None:
        cache["state"] = state
    return torch.stack(outputs, 1)


class LinearAttention(nn.Module):
    """Projections, features, rotation and decay of queries and keys; the sum; norm, gate, output projection."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, H, N, P = block, block["n_heads"], block["d_key"], block["d_head"]
        self.q_proj, self.k_proj, self.v_proj = linear(d_model, H * N), linear(d_model, H * N), linear(d_model, H * P)
        self.gate_proj = linear(d_model, H * P) if block["gate"] else None
        decay = block["decay"] or {"type": None}
        kind, R = decay["type"], decay.get("rank")
        shape = {"HeadDecay": (H,), "ChannelDecay": (H, N)}.get(kind)
        self.decay_proj = None
        if shape is not None:
            low = kind == "ChannelDecay"
            self.decay_proj = nn.Sequential(linear(d_model, R), linear(R, H * N)) if low else linear(d_model, H)
            self.decay_bias = nn.Parameter(torch.zeros(shape))
        self.slopes = nn.Parameter(torch.ones(H), requires_grad=False) if decay.get("kind") == "lightning" else None
        self.lower_bound = nn.Parameter(torch.zeros(H, N)) if decay.get("lower_bound") else None
        width = {"head": P, "channel": H * P}.get(block["norm"]["weight"] if block["norm"] else None)
        self.norm_weight = None if width is None else nn.Parameter(torch.ones(width))
        self.o_proj = linear(H * P, d_model)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        c, H, features = self.block, self.block["n_heads"], self.block["feature_map"]
        q, k, v = (proj(x_BTD).unflatten(-1, (H, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if features not in (None, "taylor"):
            q = feature(features, q)
            k = k if (c["decay"] or {}).get("type") == "ForgetDecay" else feature(features, k)
        v = (v if c["value_activation"] is None else ACTIVATIONS[c["value_activation"]](v)).float()
        g, k = self._decay(x_BTD, k)
        if c["rope"] is not None:
            q, k = (rotate(a, tokens.position_BT, c["rope"]) for a in (q, k))
        q, k = q.float() * c["scale"], k.float()
        if features == "taylor":
            q, k = taylor(q, 0.5), taylor(k, 1.0)
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1) if c["normalizer"] else v
        y = linear_attention(q, k, v, g, tokens, cache)
        y = y[..., :-1] / (y[..., -1:] + c["normalizer_eps"]) if c["normalizer"] else y
        y = self._normed(y).flatten(-2)
        if self.gate_proj is not None:
            gate = {"silu": F.silu, "sigmoid": torch.sigmoid}[c["gate"]]
            y = y * gate(self.gate_proj(x_BTD).float())
        return self.o_proj(y.to(x_BTD.dtype))

    def _decay(self, x_BTD, k_BTHN):
        """Log decays [B, T, H, 1 or N] in float32, and the keys."""
        decay, like = self.block["decay"] or {"type": None}, k_BTHN[..., :1].float()
        if decay["type"] is None:
            return torch.zeros_like(like), k_BTHN
        if decay["type"] == "FixedDecay":
            heads = torch.arange(self.block["n_heads"], device=like.device)
            g_H = torch.log1p(-(2.0 ** (-5.0 - heads))) if self.slopes is None else -self.slopes.float()
            return g_H[:, None].expand_as(like), k_BTHN
        if decay["type"] != "ForgetDecay":
            bias = self.decay_bias.float()
            raw = self.decay_proj(x_BTD).float().unflatten(-1, bias.shape) + bias
            g = F.logsigmoid(raw) / decay["divisor"]
            return g if g.dim() == 4 else g[..., None], k_BTHN
        f = k_BTHN.float()
        if self.lower_bound is None:
            return F.logsigmoid(f), torch.sigmoid(-f).to(k_BTHN.dtype)
        bound, rest = F.logsigmoid(self.lower_bound.float()), F.logsigmoid(-self.lower_bound.float())  # of b and 1 - b
        g = torch.logaddexp(bound.expand_as(f), rest + F.logsigmoid(f))
        return g, (rest + F.logsigmoid(-f)).exp().to(k_BTHN.dtype)

    def _normed(self, y_BTHP):
        norm = self.block["norm"]
        if norm is None:
            return y_BTHP
        y = rms_normalise(y_BTHP if norm["per_head"] else y_BTHP.flatten(-2), norm["eps"]).view_as(y_BTHP)
        return y if self.norm_weight is None else y * self.norm_weight.float().view(-1, y.shape[-1])


def feature(name: str, x):
    """Queries or keys before they meet."""
    return F.elu(x) + 1 if name == "elu" else ACTIVATIONS[name](x)


def taylor(x, share: float):
    """1, x, and share * x x': the products of two, with shares of 1 and 1/2, are 1 + s + s^2 / 2."""
    squares = share * x[..., :, None] * x[..., None, :]
    return torch.cat([torch.ones_like(x[..., :1]), x, squares.flatten(-2)], -1)
