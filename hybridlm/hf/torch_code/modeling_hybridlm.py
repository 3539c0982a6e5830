# SPDX-License-Identifier: Apache-2.0
"""A hybrid language model in plain PyTorch: embedding, residual sublayers as the config's pattern says, logits.

Letters: B batch, T tokens, D model, V vocabulary.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_hybridlm import HybridLMConfig
from .layers_hybridlm import Norm, Tokens
from .mixers_hybridlm import MIXERS

PAST = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What outputs of the installed transformers call the memory."""


FLOAT32 = (
    "norm", "after_norm", "q_norm", "k_norm", "o_norm", "mlp_norm", r"norm_\w+", "norms", "embed_norm", "router_norm",
    "B_norm", "C_norm", "q_a_layernorm", "kv_a_layernorm", "memory_norm", "A_log", "dt_bias", "D", "sinks", "conv1d",
    "q_conv1d", "k_conv1d", "v_conv1d", "filter", "scales", "embed_scales", "key_scale", "state_scale",
    "selection_bias", "lower_bound", "decay", "slopes", "bonus", "gate_biases", "decay_bias", "rate_bias", "share_bias",
    "shares", "first_share", "share_in", "share_gate", "k_k", "k_a", "r_k", "B_bias", "C_bias", "mimo_v", "mimo_z",
    "mimo_o", "rates", "memory_in", "memory_out", "profiles", "scale",
)  # fmt: skip
"""Parts of names of parameters that are used in float32, whatever the others are stored in."""


class HybridLMCache:
    """What the model remembers of the tokens that it has read: of each sublayer a dict of tensors [B, ...]."""

    is_compileable = False

    def __init__(self, n_layers: int):
        self.layers = [{} for _ in range(n_layers)]
        self.n_read, self.length_B = 0, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read of each row, padding counted."""
        return self.n_read

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in another order, or again: of beam search."""

        def taken(value):
            if isinstance(value, dict):
                return {name: taken(inside) for name, inside in value.items()}
            return value.index_select(0, beam_idx.to(value.device))

        self.layers = [taken(layer) for layer in self.layers]
        self.length_B = None if self.length_B is None else taken(self.length_B)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, one after the other."""
        if self.length_B is not None:
            rows = torch.arange(len(self.length_B), device=self.length_B.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """A recurrent state cannot go back to fewer tokens."""
        raise NotImplementedError("the cache of a hybrid model holds states, which cannot be cropped")


class ChannelScales(nn.Module):
    """(x + bias) * scale of each channel, of several tensors."""

    def __init__(self, d_model: int, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, d_model))
        self.bias = nn.Parameter(torch.zeros(n, d_model))

    def forward(self, *xs):
        pairs = zip(xs, self.weight.float(), self.bias.float())
        return [((x.float() + bias) * scale).to(x.dtype) for x, scale, bias in pairs]


def make_mixer(block: dict, d_model: int, norm_eps: float) -> nn.Module:
    """The mixer of a block."""
    return MIXERS[block["type"]](block, d_model, make=lambda b, d: make_mixer(b, d, norm_eps), norm_eps=norm_eps)


def stream_norm(config: HybridLMConfig, inside: bool, eps: float | None = None) -> Norm:
    """A norm of the residual stream. inside: of a sublayer."""
    bias = config.norm_bias == "all" or (inside and config.norm_bias == "sublayers")
    eps = config.norm_eps if eps is None else eps
    return Norm(config.hidden_size, eps, config.norm_offset, bias, centred=config.norm == "layer")


class HybridLMSublayer(nn.Module):
    """One symbol of the pattern: norm, mixer, residual stream."""

    def __init__(self, config: HybridLMConfig, symbol: str):
        super().__init__()
        block, D = config.blocks[symbol], config.hidden_size
        self.of_normed, self.multiplier = config.normed_residual.get(symbol), config.residual_multiplier
        self.norm = stream_norm(config, True) if config.norm_before is None or symbol in config.norm_before else None
        self.after_norm = stream_norm(config, True) if symbol in config.norm_after else None
        self.scales = ChannelScales(D, 2) if config.channel_scales else None
        self.link = None
        if block["type"] == "Shared":
            self.link, block = MIXERS["Shared"].link(block, D), block["mixer"]
        self.mixer = make_mixer(block, D, config.norm_eps)

    def forward(self, x_BTD, tokens: Tokens, cache: dict | None, shared: nn.Module | None, passed=None):
        """(The residual stream behind the sublayer, what blocks that hand something from depth to depth hand on).

        shared: what the depths of the symbol share. passed: what came from the depths before, None from none.
        """
        memory, u_BTD = cache, x_BTD
        if self.link is not None:
            memory, of_link = (None, None) if cache is None else (cache.setdefault(n, {}) for n in ("mixer", "link"))
            u_BTD = x_BTD + self.link(x_BTD, tokens, of_link, shared)
        u_BTD = u_BTD if self.norm is None else self.norm(u_BTD)
        if getattr(self.mixer, "hands_on", False):
            y_BTD, passed = self.mixer(u_BTD, tokens, memory, passed)
        else:
            y_BTD = self.mixer(u_BTD, tokens, memory)
        multiplier = self.multiplier
        y_BTD = y_BTD if self.after_norm is None else self.after_norm(y_BTD)
        if self.of_normed is not None:
            kept, multiplier = self.of_normed
            x_BTD = u_BTD * kept
        if self.scales is not None:
            x_BTD, y_BTD = self.scales(x_BTD, y_BTD)
        return x_BTD + y_BTD * multiplier, passed


class HybridLMPreTrainedModel(PreTrainedModel):
    config_class = HybridLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["HybridLMSublayer"]  # noqa: RUF012 (transformers' own names and types)
    _is_stateful = True
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = [rf"\b{name}\b" for name in FLOAT32]  # noqa: RUF012


class HybridLMModel(HybridLMPreTrainedModel):
    """Embedding, sublayers, last norm."""

    def __init__(self, config: HybridLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_scales = ChannelScales(config.hidden_size, 1) if config.channel_scales else None
        self.embed_norm = stream_norm(config, False) if config.embedding_norm else None
        self.sharing = [s for s in dict.fromkeys(config.pattern) if config.blocks[s]["type"] == "Shared"]
        made = [
            MIXERS["Shared"].transformer(config.blocks[s], config.hidden_size, config.norm_eps) for s in self.sharing
        ]
        self.shared = nn.ModuleList(made)
        self.layers = nn.ModuleList(HybridLMSublayer(config, symbol) for symbol in config.pattern)
        self.norm = stream_norm(config, False, config.final_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_hidden_states=None, return_dict=None, cache=None, **_,
    ):  # fmt: skip
        """attention_mask: [B, T], or as long as the tokens read before and these; 0 is padding, anywhere in a row.

        cache, or past_key_values as it was called: a HybridLMCache; None with use_cache: a new one.
        """
        cache = past_key_values if cache is None else cache
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = HybridLMCache(len(self.layers)) if cache is None and use_cache else cache
        x_BTD = x_BTD * self.config.embedding_multiplier
        x_BTD = x_BTD if self.embed_scales is None else self.embed_scales(x_BTD)[0]
        x_BTD = x_BTD if self.embed_norm is None else self.embed_norm(x_BTD)
        real_BT = None if attention_mask is None else attention_mask[:, -x_BTD.shape[1] :].to(x_BTD.device) != 0
        real_BT = None if real_BT is None or bool(real_BT.all()) else real_BT
        back = None
        if real_BT is not None and bool((real_BT[:, :-1] & ~real_BT[:, 1:]).any()):
            order = real_BT.int().argsort(dim=1, stable=True)  # padding in front of the row's tokens
            back, real_BT, x_BTD = order.argsort(dim=1), real_BT.gather(1, order), _take(x_BTD, order)
            position_ids = None if position_ids is None else position_ids.expand(order.shape).gather(1, order)
        tokens = self._tokens(x_BTD, real_BT, position_ids, cache)
        hidden, passed = [], None
        for i, (symbol, layer) in enumerate(zip(self.config.pattern, self.layers)):
            hidden.append(x_BTD)
            memory = None if cache is None else cache.layers[i]
            shared = self.shared[self.sharing.index(symbol)] if symbol in self.sharing else None
            if self.gradient_checkpointing and self.training:
                again = self._gradient_checkpointing_func
                x_BTD, passed = again(layer.__call__, x_BTD, tokens, memory, shared, passed)
            else:
                x_BTD, passed = layer(x_BTD, tokens, memory, shared, passed)
        hidden.append(self.norm(x_BTD))
        hidden = hidden if back is None else [_take(x, back) for x in hidden]
        states = tuple(hidden) if output_hidden_states else None
        out = BaseModelOutputWithPast(last_hidden_state=hidden[-1], hidden_states=states, **{PAST: cache})
        return out.to_tuple() if return_dict is False else out

    def _tokens(self, x_BTD, real_BT, position_ids, cache: HybridLMCache | None) -> Tokens:
        """What mixers know of the tokens; counts them in the cache."""
        (batch, n), device = x_BTD.shape[:2], x_BTD.device
        start_B = None if cache is None else cache.length_B
        start_B = torch.zeros(batch, dtype=torch.long, device=device) if start_B is None else start_B
        counted_BT = torch.ones(batch, n, dtype=torch.long, device=device) if real_BT is None else real_BT.long()
        place_BT = start_B[:, None] + counted_BT.cumsum(1) - 1
        place_BT = place_BT if real_BT is None else place_BT.masked_fill(~real_BT, -1)
        if cache is not None:
            cache.n_read, cache.length_B = cache.n_read + n, start_B + counted_BT.sum(1)
        position_BT = place_BT.clamp(min=0) if position_ids is None else position_ids
        return Tokens(place_BT, real_BT, position_BT, x_BTD)


def _take(x_BTD, order_BT):
    """The tokens of each row in another order."""
    return x_BTD.gather(1, order_BT[..., None].expand_as(x_BTD))


class HybridLMForCausalLM(HybridLMPreTrainedModel, GenerationMixin):
    """The model with logits of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridLMConfig):
        super().__init__(config)
        self.model = HybridLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_hidden_states=None, return_dict=None, logits_to_keep=0, cache=None, **more,
    ):  # fmt: skip
        """Float32 logits [B, T, V], of the last logits_to_keep tokens alone where that is not 0."""
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            True, cache,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept]).float() * self.config.logit_multiplier
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **more)
        out = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, **{PAST: getattr(out, PAST)}
        )
        return out.to_tuple() if return_dict is False else out

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, past_key_values=None, cache=None, inputs_embeds=None, use_cache=True,
        logits_to_keep=0, **_,
    ):  # fmt: skip
        """The tokens behind those in the cache. Positions follow from the mask."""
        cache = past_key_values if cache is None else cache
        n_read = 0 if cache is None else cache.get_seq_length()
        new = {"input_ids": input_ids[:, n_read:], "attention_mask": attention_mask}
        if inputs_embeds is not None:  # they are the prompt, and `input_ids` what was written behind it
            n_read -= inputs_embeds.shape[1]
            new["input_ids"] = input_ids[:, max(n_read, 0) :]
            if cache is None and input_ids.shape[1]:  # all again, without a cache
                inputs_embeds = torch.cat([inputs_embeds, self.model.embed_tokens(input_ids)], 1)
            if n_read < 0:
                new |= {"input_ids": None, "inputs_embeds": inputs_embeds}
        return new | {PAST: cache, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
