# SPDX-License-Identifier: Apache-2.0
"""Feed-forward sublayers: the MLP and the mixtures of experts.

Letters: B batch, T tokens, M tokens of all rows, E experts, k chosen ones, J sinks, R width of a latent or of a router.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .layers_hybridlm import ACTIVATIONS, GATED, Norm, Tokens, linear


class FeedForward(nn.Module):
    """down(activation(gate x) * up x), or down(activation(up x))."""

    def __init__(self, d_model: int, d_ff: int, activation: str, bias: bool = False):
        super().__init__()
        self.activation = ACTIVATIONS[GATED.get(activation, activation)]
        self.gate_proj = linear(d_model, d_ff, bias) if activation in GATED else None
        self.up_proj = linear(d_model, d_ff, bias)
        self.down_proj = linear(d_ff, d_model, bias)

    def forward(self, x, multiplier: float = 1.0, added: tuple | None = None):
        """multiplier: of what goes through the activation. added: to the results of gate and up, or of up alone."""
        firsts = [proj(x) for proj in (self.gate_proj, self.up_proj) if proj is not None]
        firsts = firsts if added is None else [a + more for a, more in zip(firsts, added)]
        first = firsts[0] if multiplier == 1 else firsts[0] * multiplier
        hidden = self.activation(first)
        return self.down_proj(hidden if len(firsts) == 1 else hidden * firsts[1])


class MLP(FeedForward):
    """A feed-forward sublayer."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__(d_model, block["d_ff"], block["activation"], block["bias"])
        self.block = block

    def forward(self, x, tokens: Tokens | None = None, cache: dict | None = None, added: tuple | None = None):
        return super().forward(x, self.block["gate_multiplier"], added) * self.block["out_multiplier"]


class MoE(nn.Module):
    """sum over the chosen experts of weight * expert(x), plus the output of the experts that all tokens share."""

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, E, R = block, block["n_experts"], block["d_latent"] or d_model
        self.router = linear(d_model, E + block.get("sinks", 0))
        self.selection_bias = nn.Parameter(torch.zeros(E)) if block["router"]["selection_bias"] else None
        latent, bias = block["d_latent"] is not None, block["latent_bias"]
        self.latent_in = linear(d_model, R, bias) if latent else None
        self.latent_out = linear(R, d_model, bias) if latent else None
        self.experts = nn.ModuleList([FeedForward(R, block["d_ff"], block["activation"]) for _ in range(E)])
        self.shared_expert = None if block["shared"] is None else MLP(block["shared"], d_model)
        self.shared_expert_gate = linear(d_model, 1) if block["shared_gate"] else None
        sinks = [FeedForward(d_model, block["d_ff"], block["activation"]) for _ in range(block.get("sinks", 0))]
        self.weighed_experts = nn.ModuleList(sinks) if sinks else None

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None):
        experts_Mk, weights_Mk = self._route(x_BTD.flatten(0, 1).float())
        weights_Mk, of_sinks_MJ = weights_Mk.split([experts_Mk.shape[1], self.block.get("sinks", 0)], -1)
        u_MR = x_BTD.flatten(0, 1) if self.latent_in is None else self.latent_in(x_BTD.flatten(0, 1))
        y_MR = mixed(self.experts, u_MR, experts_Mk, weights_Mk)
        y_BTD = (y_MR if self.latent_out is None else self.latent_out(y_MR)).view_as(x_BTD)
        for sink, weight_M in zip(self.weighed_experts or (), of_sinks_MJ.unbind(-1)):
            y_BTD = y_BTD + (sink(x_BTD) * weight_M.view(*x_BTD.shape[:2], 1)).to(x_BTD.dtype)
        if self.shared_expert is None:
            return y_BTD
        shared = self.shared_expert(x_BTD)
        gate = self.shared_expert_gate
        return y_BTD + (shared if gate is None else shared * torch.sigmoid(gate(x_BTD)))

    def _route(self, x_MD):
        """The chosen experts of each token, [M, k], and their weights, behind them those of the sinks, [M, k + J]."""
        c = self.block["router"]
        logits, sinks = exact(self.router, x_MD).split([self.block["n_experts"], self.block.get("sinks", 0)], -1)
        scores = torch.sigmoid(logits) if c["score"] == "sigmoid" else logits.softmax(-1)
        choice = logits if c["score"] == "softmax_after" else scores
        choice = choice if self.selection_bias is None else choice + self.selection_bias.float()
        if c["n_groups"] > 1:
            grouped = choice.unflatten(-1, (c["n_groups"], -1))
            best = grouped.topk(min(c["group_top"], grouped.shape[-1]), -1).values.sum(-1)
            allowed = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(c["top_groups"], -1).indices, True)
            choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
        experts = choice.topk(c["top_k"], -1).indices
        weights = (logits if c["score"] == "softmax_after" else scores).gather(-1, experts)
        weights = weights.softmax(-1) if c["score"] == "softmax_after" else weights
        weights = torch.cat([weights, torch.sigmoid(sinks)], -1)
        if c["renormalise"]:
            weights = weights / (weights.sum(-1, keepdim=True) + c["renormalise_eps"])
        return experts, weights * c["scaling"]


def mixed(experts: nn.ModuleList, u_MR, experts_Mk, weights_Mk):
    """The sum over a token's choices of weight * expert(u), of a choice behind the last expert 0; in the type of u."""
    y_MR = torch.zeros_like(u_MR, dtype=torch.float32)
    for i in experts_Mk[experts_Mk < len(experts)].unique().tolist():
        rows, choice = torch.where(experts_Mk == i)
        y_MR = y_MR.index_add(0, rows, experts[i](u_MR[rows]).float() * weights_Mk[rows, choice, None])
    return y_MR.to(u_MR.dtype)


class DepthMoE(nn.Module):
    """Experts chosen by an MLP of a state that each depth hands to the next; one choice more is none of them."""

    hands_on = True

    def __init__(self, block: dict, d_model: int, **_):
        super().__init__()
        self.block, E, R = block, block["n_experts"], block["d_router"]
        self.router_in = linear(d_model, R, bias=True)
        self.state_scale = None if block["first"] else nn.Parameter(torch.ones(R))
        self.router_norm = Norm(R, block["norm_eps"])
        self.fc1, self.fc2 = linear(R, R, bias=True), linear(R, R, bias=True)
        self.router_out = linear(R, E + 1)
        self.selection_bias = nn.Parameter(torch.zeros(E + 1))
        self.experts = nn.ModuleList([FeedForward(d_model, block["d_ff"], block["activation"]) for _ in range(E)])

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None, passed_BTR):
        """The output, and the router's state for the next depth."""
        state_BTR = exact(self.router_in, x_BTD.float())
        if passed_BTR is not None and self.state_scale is not None:
            state_BTR = state_BTR + passed_BTR * self.state_scale.float()
        h_BTR = self.router_norm(state_BTR)
        for layer in (self.fc1, self.fc2):
            h_BTR = ACTIVATIONS["gelu"](exact(layer, h_BTR))
        scores_ME = exact(self.router_out, h_BTR).softmax(-1).flatten(0, 1)
        experts_Mk = (scores_ME + self.selection_bias.float()).topk(self.block["top_k"], -1).indices
        y_MD = mixed(self.experts, x_BTD.flatten(0, 1), experts_Mk, scores_ME.gather(-1, experts_Mk))
        return y_MD.view_as(x_BTD), state_BTR


def exact(layer: nn.Linear, x):
    """A linear map in float32, whatever its weights are stored in."""
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())
