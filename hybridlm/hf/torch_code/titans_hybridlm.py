# SPDX-License-Identifier: Apache-2.0
"""The neural memory of Titans, and attention over what it remembers (Behrouz, Zhong and Mirrokni 2024).

Letters: B batch, T tokens, D model, H heads, P head width, F hidden width of a memory.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .attention_hybridlm import Attention
from .layers_hybridlm import ShortConv, Tokens, linear


class Titans(nn.Module):
    """Of each head the weights of a small network, which learn to give values for keys while they read."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, H, P, hidden = block, block["n_heads"], block["d_head"], block["d_memory"]
        self.qkv_proj, self.gate_proj = linear(d_model, 3 * H * P), linear(d_model, H * P)
        self.rates_proj, self.rates = linear(d_model, 3 * H), nn.Parameter(torch.zeros(3, H))
        self.conv1d = ShortConv(3 * H * P, block["d_conv"], bias=False, activation="silu")
        memory = lambda *shape: nn.Parameter(torch.randn(shape) / math.sqrt(shape[-2]))
        self.memory_norm = nn.Parameter(torch.zeros(H, P))
        self.memory_in, self.memory_out = memory(H, P, hidden), memory(H, hidden, P)
        self.out_proj = linear(H * P, d_model)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        c, H = self.block, self.block["n_heads"]
        qkv = self.conv1d(self.qkv_proj(x_BTD), tokens, cache).unflatten(-1, (3, H, -1)).float()
        q, k, v = qkv.unbind(2)
        q, k = (a * torch.rsqrt(a.square().sum(-1, keepdim=True) + 1e-6) for a in (q, k))
        rate, eta, alpha = (self.rates_proj(x_BTD).float().unflatten(-1, (3, H)) + self.rates.float()).unbind(2)
        y = self._read(q, k, v, c["max_rate"] * torch.sigmoid(rate), eta, alpha, tokens, cache).flatten(-2)
        return self.out_proj((y * torch.sigmoid(self.gate_proj(x_BTD).float())).to(x_BTD.dtype))

    def _read(self, q_BTHP, k, v, rate_BTH, eta_BTH, alpha_BTH, tokens: Tokens, cache: dict | None):
        """What the memory answers to each query, behind what its token has taught it.

        Weights, where gradients are taken, momentum and gradients are kept as what they have over the learned ones.
        """
        c, B = self.block, q_BTHP.shape[0]
        learned = [a.float()[None].expand(B, *a.shape) for a in (self.memory_norm, self.memory_in, self.memory_out)]
        nothing, zeros_BH = [torch.zeros_like(a) for a in learned], torch.zeros_like(rate_BTH[:, 0])
        state = None if cache is None else cache.get("memory")
        if state is None:
            state = {name: dict(enumerate(nothing)) for name in ("weights", "base", "momentum", "gradient")}
            state |= {"eta": zeros_BH, "alpha": zeros_BH, "count": zeros_BH[:, 0]}
        outputs, chunk = [], c["store_every"]
        for t, (q, k_t, v_t, rate, eta, alpha) in enumerate(
            zip(*(a.unbind(1) for a in (q_BTHP, k, v, rate_BTH, eta_BTH, alpha_BTH)))
        ):
            at = [a + state["base"][i] for i, a in enumerate(learned)]
            total = [state["gradient"][i] + a for i, a in enumerate(surprise(at, k_t, v_t, rate))]
            count, eta, alpha = state["count"] + 1, state["eta"] + eta, state["alpha"] + alpha
            kept, forget = torch.sigmoid(eta / chunk), torch.sigmoid(alpha / chunk)
            stores = count % chunk == 0
            renews = stores if c["refresh_every"] is None else count >= c["refresh_every"]
            new = {name: {} for name in ("weights", "base", "momentum", "gradient")}
            for i, (a, gradient) in enumerate(zip(learned, total)):
                moved = kept.view(B, -1, *(1,) * (a.dim() - 2)) * state["momentum"][i] if c["momentum"] else 0.0
                moved, loses = moved - gradient, forget.view(B, -1, *(1,) * (a.dim() - 2))
                changed = (1 - loses) * state["weights"][i] - loses * a + moved
                new["weights"][i] = chosen(stores, changed, state["weights"][i])
                base = state["base"][i]
                new["base"][i] = base if c["refresh_every"] is None else chosen(renews, changed, base)
                new["momentum"][i] = chosen(stores, moved, state["momentum"][i])
                new["gradient"][i] = chosen(stores, torch.zeros_like(gradient), gradient)
            new |= {"eta": chosen(stores, zeros_BH, eta), "alpha": chosen(stores, zeros_BH, alpha)}
            new["count"] = chosen(renews, torch.zeros_like(count), count)
            state = new if tokens.real_BT is None else chosen(tokens.real_BT[:, t], new, state)
            outputs.append(answer([a + state["weights"][i] for i, a in enumerate(learned)], q)[0])
        if cache is not None:
            cache["memory"] = state
        return torch.stack(outputs, 1)


def chosen(rows_B, new, old):
    """Of some rows the new, of the others the old; also of dicts of tensors."""
    if isinstance(new, dict):
        return {name: chosen(rows_B, value, old[name]) for name, value in new.items()}
    return torch.where(rows_B.view(-1, *(1,) * (new.dim() - 1)), new, old)


def answer(memory: list, x_BHP):
    """(x + (g + 1) o norm(gelu(x W1) W2), and what it is made of on the way)."""
    g, W1, W2 = memory
    a = torch.einsum("bhp,bhpf->bhf", x_BHP, W1)
    h = torch.einsum("bhf,bhfp->bhp", F.gelu(a), W2)
    h = h - h.mean(-1, keepdim=True)
    root = torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    return x_BHP + (g + 1) * h * root, (a, h * root, root)


def surprise(memory: list, k_BHP, v_BHP, rate_BH):
    """The gradient at g, W1 and W2 of rate times the mean over channels of (answer to k - v)^2, written out: it is
    taken where torch takes none, and in training it has one itself."""
    g, _, W2 = memory
    y, (a, normed, root) = answer(memory, k_BHP)
    d_y = 2 / k_BHP.shape[-1] * rate_BH[..., None] * (y - v_BHP)
    d_normed = d_y * (g + 1)
    d_h = d_normed - d_normed.mean(-1, keepdim=True) - normed * (d_normed * normed).mean(-1, keepdim=True)
    d_h = root * d_h
    slope = 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
    d_a = torch.einsum("bhp,bhfp->bhf", d_h, W2) * slope
    return d_y * normed, k_BHP[..., None] * d_a[:, :, None], F.gelu(a)[..., None] * d_h[:, :, None]


class MemoryAsContext(nn.Module):
    """attention(r_1, x_1, r_2, x_2, ...) at the x, times sigmoid(r); r is the memory's answer at each token."""

    def __init__(self, block: dict, d_model: int, make, **_):
        """make: (block, d_model) -> a mixer."""
        super().__init__()
        self.memory, self.attention = make(block["memory"], d_model), Attention(block["attention"], d_model)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        of_memory, of_attention = (None if cache is None else cache.setdefault(n, {}) for n in ("memory", "attention"))
        r_BTD = self.memory(x_BTD, tokens, of_memory)
        both = torch.stack([r_BTD, x_BTD], 2).flatten(1, 2)
        place = torch.stack([2 * tokens.place_BT, 2 * tokens.place_BT + 1], 2)
        place = place.masked_fill(tokens.place_BT[..., None] < 0, -1).flatten(1, 2)
        real = None if tokens.real_BT is None else tokens.real_BT.repeat_interleave(2, 1)
        in_turn = Tokens(place, real, place.clamp(min=0), both)
        y_BTD = self.attention(both, in_turn, of_attention)[:, 1::2]
        return (y_BTD * torch.sigmoid(r_BTD.float())).to(y_BTD.dtype)
