# SPDX-License-Identifier: Apache-2.0
"""Config of a hybrid language model: a pattern string, one symbol a sublayer, and what each symbol is."""

from transformers import PretrainedConfig


class HybridLMConfig(PretrainedConfig):
    """pattern: one symbol of `blocks` per residual sublayer, first to last; blocks: {symbol: {"type": ..., options}}.

    The other options are those of the residual stream and of the vocabulary.
    """

    model_type = "hybridlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own name and type)

    def __init__(
        self,
        vocab_size=256,
        hidden_size=64,
        pattern="",
        blocks=None,
        norm="rms",
        norm_eps=1e-5,
        final_norm_eps=None,
        norm_bias="none",
        norm_offset=0.0,
        norm_before=None,
        norm_after="",
        normed_residual=None,
        embedding_norm=False,
        embedding_multiplier=1.0,
        channel_scales=False,
        residual_multiplier=1.0,
        logit_multiplier=1.0,
        logit_softcap=None,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.pattern, self.blocks, self.num_hidden_layers = pattern, blocks or {}, len(pattern)
        self.norm, self.norm_eps, self.final_norm_eps = norm, norm_eps, final_norm_eps
        self.norm_bias, self.norm_offset = norm_bias, norm_offset
        self.norm_before, self.norm_after, self.normed_residual = norm_before, norm_after, normed_residual or {}
        self.embedding_norm, self.embedding_multiplier = embedding_norm, embedding_multiplier
        self.channel_scales, self.residual_multiplier = channel_scales, residual_multiplier
        self.logit_multiplier, self.logit_softcap = logit_multiplier, logit_softcap
        self.initializer_range, self.use_cache = initializer_range, use_cache
        kwargs.pop("num_hidden_layers", None)  # the pattern says it
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
