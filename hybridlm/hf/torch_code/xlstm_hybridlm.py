# SPDX-License-Identifier: Apache-2.0
"""mLSTM and sLSTM of xLSTM (Beck et al. 2024, 2025), token by token.

Letters: B batch, T tokens, D model, H heads, N key width, P head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers_hybridlm import HeadNorm, ShortConv, Tokens, linear


class MLSTM(nn.Module):
    """A matrix memory with exponential gates; layer norm of each head, sigmoid gate, output projection."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, H, N, P, bias = block, block["n_heads"], block["d_key"], block["d_head"], block["bias"]
        self.q_proj, self.k_proj = linear(d_model, H * N, bias), linear(d_model, H * N, bias)
        self.v_proj, self.out_gate_proj = linear(d_model, H * P, bias), linear(d_model, H * P, bias)
        self.gates_proj = linear(d_model, 2 * H)
        self.gate_biases = nn.Parameter(torch.zeros(2, H))
        self.norm = HeadNorm(H * P, block["norm_eps"], bias)
        self.o_proj = linear(H * P, d_model, bias)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        heads = lambda a: a.float().unflatten(-1, (self.block["n_heads"], -1))
        q, k, v = (heads(proj(x_BTD)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        gates = self.gates_proj(x_BTD).float().unflatten(-1, (2, -1)) + self.gate_biases.float()
        cap = self.block["gate_softcap"]
        i_BTH, f_BTH = (gates if cap is None else cap * torch.tanh(gates / cap)).unbind(2)
        y = self.norm(self._memory(q, k / math.sqrt(k.shape[-1]), v, i_BTH, F.logsigmoid(f_BTH), tokens, cache))
        return self.o_proj((y * torch.sigmoid(self.out_gate_proj(x_BTD).float())).to(x_BTD.dtype))

    def _memory(self, q, k, v, i_BTH, log_f_BTH, tokens: Tokens, cache: dict | None):
        """C_t = f C_(t-1) + i k v', n_t = f n_(t-1) + i k, y_t = C_t' q / max(|n_t' q|, 1); C and n over exp(m)."""
        if tokens.real_BT is not None:
            i_BTH = i_BTH.masked_fill(~tokens.real_BT[..., None], -torch.inf)
        log_f_BTH, eps = tokens.without_padding(log_f_BTH), self.block["eps"]
        c, n, m = (None,) * 3 if cache is None else (cache.get(name) for name in "cnm")
        if c is None:
            n, m = torch.zeros_like(k[:, 0]), torch.zeros_like(log_f_BTH[:, 0])
            c = n.new_zeros(*n.shape, v.shape[-1])
        outputs = []
        for q_t, k_t, v_t, i, log_f in zip(*(a.unbind(1) for a in (q, k, v, i_BTH, log_f_BTH))):
            kept = log_f + m
            m = torch.maximum(kept, i)
            forget, add = (kept - m).exp(), (i - m).exp()
            c = forget[..., None, None] * c + (add[..., None] * k_t)[..., None] * v_t[:, :, None]
            n = forget[..., None] * n + add[..., None] * k_t
            small = m.clamp(max=0).exp()  # both sides of the quotient times this, so that nothing overflows
            divisor = torch.maximum((n * q_t).sum(-1).abs() * small, (-m.clamp(min=0)).exp()) + eps * small
            outputs.append((c * q_t[..., None]).sum(-2) * (small / divisor)[..., None])
        if cache is not None:
            cache.update(c=c, n=n, m=m)
        return torch.stack(outputs, 1)


class SLSTM(nn.Module):
    """A scalar memory whose gates read the head's last output; layer norm of each head, no output projection."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.n_heads = H = block["n_heads"]
        P = d_model // H
        self.conv1d = ShortConv(d_model, block["d_conv"], bias=True, activation="silu")
        self.gate_weights = nn.Parameter(torch.randn(4, H, P, P) / math.sqrt(P))  # of i, f, z, o
        self.recurrent_weights = nn.Parameter(torch.zeros(4, H, P, P))
        self.gate_biases = nn.Parameter(torch.zeros(4, H, P))
        self.norm = HeadNorm(d_model, block["norm_eps"], bias=False)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        heads = lambda a: a.unflatten(-1, (self.n_heads, -1))
        u, x = heads(self.conv1d(x_BTD, tokens, cache)), heads(x_BTD)
        product = lambda a, w: torch.einsum("bthq,chpq->btchp", a, w.to(a.dtype))
        gates = torch.cat([product(u, self.gate_weights[:2]), product(x, self.gate_weights[2:])], 2)
        return self.norm(self._memory(gates.float() + self.gate_biases.float(), tokens, cache)).to(x_BTD.dtype)

    def _memory(self, gates_BTcHP, tokens: Tokens, cache: dict | None):
        """y_t = o c_t / n_t with c_t = f c_(t-1) + i z, n_t = f n_(t-1) + i; c and n over exp(m)."""
        weights, zeros = self.recurrent_weights.float(), torch.zeros_like(gates_BTcHP[:, 0, 0])
        state = [zeros] * 4 if cache is None or "y" not in cache else [cache[name] for name in "ycnm"]
        outputs = []
        for t, raw in enumerate(gates_BTcHP.unbind(1)):
            y, c, n, m = state
            i, f, z, o = (raw + torch.einsum("chpq,bhq->bchp", weights, y)).unbind(1)
            kept = m + F.logsigmoid(f)
            top = torch.where(n == 0, i, torch.maximum(i, kept))
            add, forget = (i - top).exp(), (kept - top).clamp(max=0).exp()
            c, n = forget * c + add * torch.tanh(z), forget * n + add
            new = [torch.sigmoid(o) * c / n, c, n, top]
            if tokens.real_BT is not None:
                new = [torch.where(tokens.real_BT[:, t, None, None], a, old) for a, old in zip(new, state)]
            state = new
            outputs.append(state[0])
        if cache is not None:
            cache.update(zip("ycnm", state))
        return torch.stack(outputs, 1)
