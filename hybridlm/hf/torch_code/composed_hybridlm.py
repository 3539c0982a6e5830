# SPDX-License-Identifier: Apache-2.0
"""Blocks that hold others: branches side by side, a convolution of the output, and a transformer whose weights several
depths share."""

import math

import torch
from torch import nn

from .attention_hybridlm import Attention
from .feed_forward_hybridlm import MLP
from .layers_hybridlm import Norm, ShortConv, Tokens, linear


class Parallel(nn.Module):
    """Mixers that read one input; their outputs are added, or the first by name times the others' sigmoids."""

    def __init__(self, block: dict, d_model: int, make, norm_eps: float):
        """make: (block, d_model) -> a mixer."""
        super().__init__()
        self.block = block
        for branch in block["branches"]:
            setattr(self, f"branch_{branch['name']}", make(branch["mixer"], d_model))
            setattr(self, f"norm_{branch['name']}", Norm(d_model, norm_eps) if branch["norm"] else None)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        parts = []
        for branch in sorted(self.block["branches"], key=lambda branch: branch["name"]):
            name, memory = branch["name"], None if cache is None else cache.setdefault(branch["name"], {})
            y = getattr(self, f"branch_{name}")(x_BTD * branch["in_multiplier"], tokens, memory)
            norm = getattr(self, f"norm_{name}")
            parts.append((y if norm is None else norm(y)) * branch["out_multiplier"])
        if self.block["merge"] == "add":
            return sum(parts)
        return (parts[0] * math.prod(torch.sigmoid(y.float()) for y in parts[1:])).to(x_BTD.dtype)


class OutputConv(nn.Module):
    """y + convolution(y) of the output y of another block, which may be times a learned number."""

    def __init__(self, block: dict, d_model: int, make, **_):
        """make: (block, d_model) -> a mixer."""
        super().__init__()
        self.mixer = make(block["mixer"], d_model)
        self.scale = nn.Parameter(torch.ones(1)) if block["scaled"] else None
        self.conv1d = ShortConv(d_model, block["d_conv"], bias=False, activation=None)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        y = self.mixer(x_BTD, tokens, None if cache is None else cache.setdefault("mixer", {}))
        y = y if self.scale is None else y * self.scale.to(y.dtype)
        return y + self.conv1d(y, tokens, cache)


class SharedTransformer(nn.Module):
    """mlp(norm(attention(norm(concat(x, embeddings))))): what the depths of a symbol share."""

    def __init__(self, block: dict, d_model: int, norm_eps: float):
        super().__init__()
        self.norm = Norm(2 * d_model, norm_eps)
        self.attention = Attention(block["attention"], 2 * d_model, d_out=d_model)
        self.mlp_norm = Norm(d_model, norm_eps)
        self.mlp = MLP(block["mlp"], d_model)


class SharedLink(nn.Module):
    """A depth's own part: its low-rank additions to the shared weights, and the linear map behind them."""

    def __init__(self, block: dict, d_model: int):
        super().__init__()
        heads, mlp, P = block["attention"], block["mlp"], block["attention"]["d_head"]
        gated = mlp["activation"].endswith("glu") or mlp["activation"] in ("geglu_tanh", "reglu2")
        adapters = {}
        if block["attention_adapter"] is not None:
            for name, n in (("q", heads["n_heads"]), ("k", heads["n_kv_heads"]), ("v", heads["n_kv_heads"])):
                adapters[name] = (2 * d_model, block["attention_adapter"], n * P)
        if block["mlp_adapter"] is not None:
            adapters["mlp"] = (d_model, block["mlp_adapter"], (2 if gated else 1) * mlp["d_ff"])
        self.n_first = 2 if gated else 1
        self.adapters = nn.ModuleDict(
            {name: nn.Sequential(linear(n_in, rank), linear(rank, out)) for name, (n_in, rank, out) in adapters.items()}
        )
        self.linear = linear(d_model, d_model)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None, shared: SharedTransformer):
        """What is added to the mixer's input."""
        u = shared.norm(torch.cat([x_BTD, tokens.embedded_BTD], -1))
        added = tuple(self.adapters[name](u) for name in "qkv") if "q" in self.adapters else None
        y = shared.mlp_norm(shared.attention(u, tokens, cache, added))
        more = self.adapters["mlp"](y).chunk(self.n_first, -1) if "mlp" in self.adapters else None
        return self.linear(shared.mlp(y, added=more))


class Shared:
    """A mixer of its own at each depth, behind a transformer whose weights all depths of the symbol share."""

    transformer, link = SharedTransformer, SharedLink
