# SPDX-License-Identifier: Apache-2.0
"""Attention whose scores have a term of the query and the distance alone.

Letters: B batch, T tokens, S keys, H heads, K key/value heads, P head width, R profiles, E distances.
"""

import torch
from torch import nn

from .attention_hybridlm import remember
from .layers_hybridlm import Norm, ShortConv, Tokens, linear


class RelativeAttention(nn.Module):
    """Queries; keys and values, each plus its convolution; norms of queries and keys; attention; output projection."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block = block
        H, K, P = block["n_heads"], block["n_kv_heads"], block["d_head"]
        self.q_proj, self.o_proj = linear(d_model, H * P), linear(H * P, d_model)
        self.k_proj, self.v_proj = linear(d_model, K * P), linear(d_model, K * P)
        self.r_proj = linear(d_model, H * block["n_profiles"])
        self.k_conv1d = ShortConv(K * P, block["d_conv"], bias=False, activation=None)
        self.v_conv1d = ShortConv(K * P, block["d_conv"], bias=False, activation=None)
        self.q_norm, self.k_norm = Norm(P, block["norm_eps"]), Norm(P, block["norm_eps"])
        self.profiles = nn.Parameter(torch.zeros(block["n_profiles"], block["extent"]))

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        c = self.block
        k, v = self.k_proj(x_BTD), self.v_proj(x_BTD)
        k, v = k + self.k_conv1d(k, tokens, cache, "conv_k"), v + self.v_conv1d(v, tokens, cache, "conv_v")
        q = self.q_norm(self.q_proj(x_BTD).unflatten(-1, (c["n_heads"], -1)))
        r = self.r_proj(x_BTD).unflatten(-1, (c["n_heads"], -1))
        k, v = (a.unflatten(-1, (c["n_kv_heads"], -1)) for a in (k, v))
        k, place_BS = self.k_norm(k), tokens.place_BT
        if c["log_floor"] is not None:
            beyond = (tokens.position_BT + 1).float() / c["log_floor"]
            factor = (1 + c["log_scale"] * torch.log(beyond.clamp(min=1)))[..., None, None]
            q, r = ((a.float() * factor).to(a.dtype) for a in (q, r))
        if cache is not None:
            (k, v), place_BS = remember(cache, {"k": k, "v": v}, place_BS, c["window"])
        return self.o_proj(self._attend(q, k, v, r, tokens.place_BT, place_BS).flatten(-2))

    def _attend(self, q, k, v, r, place_BT, place_BS):
        """[B, T, H, P] of queries at place_BT and keys and values at place_BS."""
        c, (T, S) = self.block, (q.shape[1], k.shape[1])
        n = c["n_heads"] // c["n_kv_heads"]
        q, k, v = q.transpose(1, 2), *(a.repeat_interleave(n, 2).transpose(1, 2) for a in (k, v))
        distance_BTS = place_BT[:, :, None] - place_BS[:, None]
        mask = (distance_BTS >= 0) & (place_BS >= 0)[:, None]
        mask = mask if c["window"] is None else mask & (distance_BTS < c["window"])
        mask = (mask | torch.eye(S, dtype=torch.bool, device=q.device)[S - T :])[:, None]  # padding sees itself
        terms_BHTE = torch.einsum("bthr,re->bhte", r.float(), self.profiles.float())
        index = distance_BTS.clamp(0, c["extent"] - 1)[:, None].expand(-1, c["n_heads"], -1, -1)
        near = (distance_BTS >= 0) & (distance_BTS < c["extent"])
        terms = terms_BHTE.gather(-1, index).masked_fill(~near[:, None], 0.0)
        scores = q.float() @ k.float().transpose(-1, -2) / c["d_head"] + terms
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (weights @ v.float()).to(v.dtype).transpose(1, 2)
