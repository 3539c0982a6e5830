# SPDX-License-Identifier: Apache-2.0
"""The keys of a config.json: which are read, which are carried along, and which ask for what is not supported."""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from hybridlm.errors import ConfigError
from hybridlm.fields import REAL, WHOLE
from hybridlm.model.config import MOST_SUBLAYERS

log = logging.getLogger(__name__)

_REQUIRED = object()
_BASE = frozenset(
    """
    _name_or_path _attn_implementation attn_implementation architectures auto_map bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id dtype eos_token_id id2label is_decoder is_encoder_decoder
    label2id max_position_embeddings model_type name_or_path num_labels num_logits_to_keep output_attentions
    output_hidden_states pad_token_id prefix problem_type pruned_heads return_dict sep_token_id task_specific_params
    tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version transformers.js_config
    use_bfloat16 use_cache use_return_dict finetuning_task tf_legacy_loss add_cross_attention
    """.split()  # noqa: SIM905
)
"""Keys of every config class that say nothing about what the model computes."""
_DEPTHS = frozenset(("num_hidden_layers", "n_layer", "n_layers"))
"""Keys that say how many layers there are."""
_GENERATION = frozenset(
    """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()  # noqa: SIM905
)
"""Keys of the generation config that older files mix in."""


class Keys:
    """The keys of a config.json; remembers which were read, so that none is overlooked."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json"):
        """where: what messages call it."""
        self.values, self.where = dict(values), where
        self._read: set[str] = set()
        self._derived: set[str] = set()
        self._carried: set[str] = set(_BASE | _GENERATION)

    def __call__(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, the class's default where it is missing. ConfigError where it is missing without one, and
        where the value is of another type than the default: a number, or True or False. Null is given as it is."""
        self._read.add(name)
        if name in self.values:
            return self._typed(name, default)
        if default is _REQUIRED:
            raise ConfigError(f"{self.where}: {name} is missing")
        return default

    def _typed(self, name: str, default: Any) -> Any:
        """The value of a key that is there."""
        value = self.values[name]
        shown = f"{self.where}: {name} ({value!r:.60})"
        if value is None:
            return None
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{shown} must be true or false")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, int | float) and not isinstance(default, bool) and not number:
            raise ConfigError(f"{shown} must be a number")
        if number:
            most = MOST_SUBLAYERS if name in _DEPTHS else WHOLE if isinstance(value, int) else REAL
            if not abs(value) <= most:  # nan is not, either
                raise ConfigError(f"{shown} must be a number of at most {most:.10g}")
        return value

    def some(self, name: str, default: Any) -> Any:
        """As a call, but null means the default too."""
        value = self(name, default)
        return default if value is None else value

    def only(self, name: str, *allowed: Any, default: Any = _REQUIRED) -> Any:
        """The value of a key that has to be one of `allowed`, else ConfigError. default: the first of them."""
        value = self(name, allowed[0] if default is _REQUIRED else default)
        if value not in allowed:
            known = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"{self.where}: {name} ({value!r}) is not supported: only {known}")
        self._carried.add(name)
        return value

    def choose(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """What the key's value stands for in `choices`."""
        return choices[self.only(name, *choices, default=default)]

    def derived(self, *names: str) -> None:
        """Keys that follow from others; neither read nor kept."""
        self._read.update(names)
        self._derived.update(names)

    def carry(self, *names: str) -> None:
        """Keys that say nothing about what the model computes; kept as they are when it is written again."""
        self._carried.update(names)

    def require(self, condition: bool, message: str) -> None:
        """ConfigError, naming the file, unless the condition holds."""
        if not condition:
            raise ConfigError(f"{self.where}: {message}")

    def finish(self) -> None:
        """ConfigError for keys that nobody read: what they ask for would be left out silently.

        Those of tools' own bookkeeping (`_commit_hash`, `unsloth_version`) cannot change the model: a note names them.
        """
        self.only("is_causal", True, None)
        unread = [
            name
            for name, value in self.values.items()
            if name not in self._read and name not in self._carried and value not in (None, False)
        ]
        ignored = tuple(name for name in unread if name.startswith("_") or name.endswith("_version"))
        if ignored:
            _note(self.where, ignored)
        unread = [name for name in unread if name not in ignored]
        if unread:
            shown = ", ".join(f"{name} ({str(self.values[name])[:60]})" for name in unread[:8])
            raise ConfigError(f"{self.where}: not supported: {shown}")

    def carried(self) -> dict[str, Any]:
        """The keys that were carried, with their values."""
        return {name: value for name, value in self.values.items() if name in self._carried - self._derived}


@cache
def _note(where: str, names: tuple[str, ...]) -> None:
    """Says once that keys are ignored: a folder is opened more than once in a run."""
    log.warning("%s: ignored, as they say nothing about the model: %s", where, ", ".join(names))
