# SPDX-License-Identifier: Apache-2.0
"""Attention: MHA, GQA or MQA; rotary, windowed, capped, with sinks, gated.

Letters: B batch, T tokens, S keys, D model, H heads, K key/value heads, P head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers_hybridlm import Norm, Tokens, linear


class Attention(nn.Module):
    """Projections, norm and rotation of queries and keys, causal attention, output gate, output projection."""

    def __init__(self, block: dict, d_model: int, d_out: int | None = None, **_):
        """d_out: width of the output (None: d_model)."""
        super().__init__()
        self.block = block
        self.n_heads, self.n_kv_heads, self.d_head = H, K, P = block["n_heads"], block["n_kv_heads"], block["d_head"]
        bias = block["qkv_bias"]
        self.q_proj = linear(d_model, H * P, bias)
        self.k_proj = linear(d_model, K * P, bias)
        self.v_proj = linear(d_model, K * P, bias)
        n_gates = {None: 0, "head": H, "elementwise": H * P}[block["gate"]]
        self.gate_proj = linear(d_model, n_gates, block["gate_bias"]) if n_gates else None
        self.over_all = block["qk_norm_over"] == "all"
        norm = lambda n: Norm(n * P if self.over_all else P, block["qk_norm_eps"], block["qk_norm_offset"])
        self.q_norm = norm(H) if block["qk_norm"] else None
        self.k_norm = norm(K) if block["qk_norm"] else None
        self.sinks = nn.Parameter(torch.zeros(H)) if block["sinks"] else None
        self.o_proj = linear(H * P, d_out or d_model, block["out_bias"])

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None, added: tuple | None = None):
        """added: [B, T, H or K times P] each, added to the projections of queries, keys and values."""
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if added is not None:
            q, k, v = (a + more for a, more in zip((q, k, v), added))
        q = self._placed(q, self.q_norm, tokens)
        k = self._placed(k * self.block["key_multiplier"], self.k_norm, tokens)
        v, place_BS = v.unflatten(-1, (self.n_kv_heads, self.d_head)), tokens.place_BT
        c = self.block
        if cache is not None:
            (k, v), place_BS = remember(cache, {"k": k, "v": v}, place_BS, c["window"])
        places = {"place_BT": tokens.place_BT, "place_BS": place_BS}
        plain = cache is None and tokens.real_BT is None
        options = {"scale": c["scale"], "window": c["window"], "softcap": c["softcap"], "sinks": self.sinks}
        y_BTHP = attend(q, k, v, **places, plain=plain, **options)
        if self.gate_proj is not None:
            gate = torch.sigmoid(self.gate_proj(x_BTD).float()).unflatten(-1, (self.n_heads, -1))
            y_BTHP = (y_BTHP.float() * gate).to(x_BTD.dtype)
        return self.o_proj(y_BTHP.flatten(-2))

    def _placed(self, x, norm: Norm | None, tokens: Tokens):
        """Queries or keys [B, T, heads, P], normed and rotated."""
        c = self.block
        if norm is not None and not c["qk_norm_rotated"]:
            x = self._normed(x, norm)
        x = x.unflatten(-1, (-1, self.d_head))
        x = x if c["rope"] is None else rotate(x, tokens.position_BT, c["rope"])
        if norm is not None and c["qk_norm_rotated"]:
            x = self._normed(x.flatten(-2), norm).unflatten(-1, (-1, self.d_head))
        return x

    def _normed(self, x, norm: Norm):
        return norm(x) if self.over_all else norm(x.unflatten(-1, (-1, self.d_head))).flatten(-2)


def remember(cache: dict, new: dict[str, torch.Tensor], place_BS, window: int | None = None):
    """(New [B, T, ...] and their places behind those of the cache, which keeps what some later token may see)."""
    if "place" in cache:
        new = {name: torch.cat([cache[name], a], 1) for name, a in new.items()}
        place_BS = torch.cat([cache["place"], place_BS], 1)
    old = 0
    if window is not None:
        last_B1 = place_BS.amax(1, keepdim=True)
        unseen_S = ((place_BS < 0) | (place_BS <= last_B1 - window + 1)).all(0)
        old = int(unseen_S.long().cumprod(0).sum())
    cache.update({name: a[:, old:] for name, a in new.items()}, place=place_BS[:, old:])
    return new.values(), place_BS


def attend(q, k, v, *, place_BT, place_BS, plain: bool, scale: float, window=None, softcap=None, sinks=None):
    """[B, T, H, P] of queries at place_BT and keys and values at place_BS. plain: all tokens are here and real."""
    T, S, n = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(a.repeat_interleave(n, 2).transpose(1, 2) for a in (k, v))
    mask = None
    if not plain or window is not None:
        distance_BTS = place_BT[:, :, None] - place_BS[:, None]
        mask = (distance_BTS >= 0) & (place_BS >= 0)[:, None]
        mask = mask if window is None else mask & (distance_BTS < window)
        mask = (mask | torch.eye(S, dtype=torch.bool, device=q.device)[S - T :])[:, None]  # padding sees itself
    if softcap is None and sinks is None:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
        return y.transpose(1, 2)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = scale * (q.float() @ k.float().transpose(-1, -2))
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:  # one more key, without a value
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., :S] @ v.float()).to(v.dtype).transpose(1, 2)


def rotate(x_BTHP, position_BT, rope: dict):
    """The first part of each head rotated by its position, in float32; the rest as it is."""
    freqs, scale = frequencies(rope, x_BTHP.shape[-1])
    angles = position_BT.float()[..., None] * torch.tensor(freqs, dtype=torch.float32, device=x_BTHP.device)
    cos, sin = (scale * f(angles)[:, :, None] for f in (torch.cos, torch.sin))
    half = len(freqs)
    turning, rest = x_BTHP.float().split([2 * half, x_BTHP.shape[-1] - 2 * half], -1)
    if rope["interleaved"]:
        a, b = turning.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turning.split(half, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1).to(x_BTHP.dtype)


def frequencies(rope: dict, d_head: int) -> tuple[list[float], float]:
    """Radians a position of each rotated pair, and the scale of cos and sin."""
    scaling, theta, fraction = rope["scaling"] or {"type": None}, rope["theta"], rope["fraction"]
    kind = scaling["type"]
    d = d_head if kind == "Proportional" else int(d_head * fraction)
    if kind == "NTK":
        theta *= scaling["alpha"] ** (d / (d - 2))
    freqs = [theta ** (-i / d) for i in range(0, d, 2)]
    if kind == "Linear":
        freqs = [f / scaling["factor"] for f in freqs]
    elif kind == "Proportional":
        turning = int(fraction * d_head // 2)
        freqs = [(f if i < turning else 0.0) / scaling["factor"] for i, f in enumerate(freqs)]
    elif kind == "Llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = [scaling["original_max_positions"] * f / (2 * math.pi) for f in freqs]
        kept = [min(max((n - low) / (high - low), 0), 1) for n in turns]
        freqs = [k * f + (1 - k) * f / scaling["factor"] for k, f in zip(kept, freqs)]
    elif kind == "YaRN":
        return _yarn(freqs, theta, d, scaling)
    return freqs, 1.0


def _yarn(freqs: list[float], theta: float, d: int, yarn: dict) -> tuple[list[float], float]:
    """YaRN's frequencies and scale (Peng et al. 2023)."""

    def index_of(turns: float) -> float:
        return d * math.log(yarn["original_max_positions"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(yarn["beta_fast"]), index_of(yarn["beta_slow"])
    if yarn["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    high += 0.001 if low == high else 0.0
    divided = [min(max((i - low) / (high - low), 0), 1) for i in range(len(freqs))]
    factor, scale = yarn["factor"], yarn["attention_factor"]
    if scale is None:
        scale = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1
    return [f * (1 - part) + f / factor * part for f, part in zip(freqs, divided)], scale
