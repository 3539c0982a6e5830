# SPDX-License-Identifier: Apache-2.0
"""Attention whose keys and values are made of a latent (DeepSeek-AI 2024), or convolved (Figliolia et al. 2025).

Letters: B batch, T tokens, S keys, D model, H heads, K key/value heads, P head width, R latent width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention_hybridlm import attend, remember, rotate
from .layers_hybridlm import Norm, ShortConv, Tokens, behind, linear


class LatentAttention(nn.Module):
    """Keys and values are projections of one latent a token, which the cache holds beside the rotated key of all."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, H, R, rank = block, block["n_heads"], block["kv_rank"], block["q_rank"]
        nope, rope, value, bias = block["d_nope"], block["d_rope"], block["d_value"], block["bias"]
        if rank is None:
            self.q_proj = linear(d_model, H * (nope + rope))
        else:
            self.q_a_proj = linear(d_model, rank, bias)
            self.q_a_layernorm = Norm(rank, block["norm_eps"])
            self.q_b_proj = linear(rank, H * (nope + rope))
        self.kv_a_proj_with_mqa = linear(d_model, R + rope, bias)
        self.kv_a_layernorm = Norm(R, block["norm_eps"])
        self.kv_b_proj = linear(R, H * (nope + value))
        self.g_proj = linear(d_model, H) if block["head_gate"] else None
        self.o_proj = linear(H * value, d_model, bias)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        c, H = self.block, self.block["n_heads"]
        q = self.q_proj(x_BTD) if c["q_rank"] is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        q_nope, q_rope = q.unflatten(-1, (H, -1)).split([c["d_nope"], c["d_rope"]], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x_BTD).split([c["kv_rank"], c["d_rope"]], -1)
        latent, k_rope, place_BS = self.kv_a_layernorm(latent), k_rope[:, :, None], tokens.place_BT
        if c["rope"] is not None:
            q_rope, k_rope = (rotate(a, tokens.position_BT, c["rope"]) for a in (q_rope, k_rope))
        if cache is not None:
            (latent, k_rope), place_BS = remember(cache, {"latent": latent, "key": k_rope}, place_BS)
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (H, -1)).split([c["d_nope"], c["d_value"]], -1)
        q, k = torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope.expand(-1, -1, H, -1)], -1)
        places = {"place_BT": tokens.place_BT, "place_BS": place_BS}
        y_BTHP = attend(q, k, v, **places, plain=cache is None and tokens.real_BT is None, scale=c["scale"])
        if self.g_proj is not None:
            y_BTHP = (y_BTHP.float() * torch.sigmoid(self.g_proj(x_BTD).float())[..., None]).to(x_BTD.dtype)
        return self.o_proj(y_BTHP.flatten(-2))


class HeadsConv(nn.Module):
    """Two convolutions: of each channel, and of the channels of a head with each other.

    In front of a row's first token the first one gives its bias: that goes through all taps of the second.
    """

    def __init__(self, n_heads: int, d_head: int, window: int, window_heads: int):
        super().__init__()
        self.n_heads, self.first = n_heads, ShortConv(n_heads * d_head, window, bias=True, activation=None)
        bound = 1 / math.sqrt(d_head * window_heads)
        self.weight = nn.Parameter(torch.empty(n_heads * d_head, d_head, window_heads).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n_heads * d_head))

    def forward(self, x_BTC, tokens: Tokens, cache: dict | None, name: str):
        weight, through = self.weight.float(), self.first.bias.float().unflatten(0, (self.n_heads, -1))
        x = self.first(x_BTC, tokens, cache, f"conv_{name}", with_bias=False)
        x = behind(x, weight.shape[-1] - 1, tokens, cache, f"heads_{name}")
        y = F.conv1d(x.float().transpose(1, 2), weight, self.bias.float(), groups=self.n_heads).transpose(1, 2)
        taps_HPQ = weight.sum(-1).unflatten(0, (self.n_heads, -1))
        return (y + torch.einsum("hpq,hq->hp", taps_HPQ, through).flatten()).to(x.dtype)


class ConvolvedAttention(nn.Module):
    """Queries and keys convolved over tokens and brought to one length; half of the values are a token late."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, H, K, P = block, block["n_heads"], block["n_kv_heads"], block["d_head"]
        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, n * P, block["bias"]) for n in (H, K, K))
        self.q_conv1d, self.k_conv1d = (HeadsConv(n, P, block["d_conv"], block["d_conv_heads"]) for n in (H, K))
        self.key_scale = nn.Parameter(torch.ones(K))
        self.o_proj = linear(H * P, d_model, block["bias"])

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        c, K, P = self.block, self.block["n_kv_heads"], self.block["d_head"]
        q, k = self.q_proj(x_BTD), self.k_proj(x_BTD)
        q_BTKnP, k_BTK1P = (a.unflatten(-1, (K, -1, P)) for a in (q, k))
        means_BTKnP = 0.5 * (q_BTKnP + k_BTK1P)
        q = self.q_conv1d(q, tokens, cache, "q") + means_BTKnP.flatten(-3)
        k = self.k_conv1d(k, tokens, cache, "k") + means_BTKnP.mean(-2).flatten(-2)
        q, k = (of_one_length(a.unflatten(-1, (-1, P))) for a in (q, k))
        k = k * self.key_scale.to(k.dtype)[:, None]
        q, k = (rotate(a, tokens.position_BT, c["rope"]) for a in (q, k))
        v, place_BS = self._values(x_BTD, tokens, cache), tokens.place_BT
        if cache is not None:
            (k, v), place_BS = remember(cache, {"k": k, "v": v}, place_BS, c["window"])
        places = {"place_BT": tokens.place_BT, "place_BS": place_BS}
        plain = cache is None and tokens.real_BT is None
        y_BTHP = attend(q, k, v, **places, plain=plain, scale=P**-0.5, window=c["window"])
        return self.o_proj(y_BTHP.flatten(-2))

    def _values(self, x_BTD, tokens: Tokens, cache: dict | None):
        """[B, T, K, P]: the first half of all channels is the token's, the second that of the token before."""
        now, late = F.linear(x_BTD, self.v_proj.weight).chunk(2, -1)
        late = behind(late, 1, tokens, cache, "late")[:, :-1]
        v = torch.cat([now, late], -1)
        v = v if self.v_proj.bias is None else v + self.v_proj.bias
        return v.unflatten(-1, (self.block["n_kv_heads"], -1))


def of_one_length(x_BTHP):
    """Each head's vector brought to length sqrt(P), computed in float32."""
    x = x_BTHP.float()
    square = x.square().sum(-1, keepdim=True).clamp(min=2.0**-46)
    return (x * math.sqrt(x.shape[-1]) * square.rsqrt()).to(x_BTHP.dtype)
