# SPDX-License-Identifier: Apache-2.0
"""Conversations whose earlier turns stay in the cache: each answer reads what is new and nothing else."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hybridlm.data.stream import TextStream
from hybridlm.data.template import Rendered, Template
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError, require
from hybridlm.infer.texts import Options, Speed, check_tokens
from hybridlm.model.decoding import State, Writer
from hybridlm.model.generation import check_room
from hybridlm.model.model import HybridLM

LEAST_ROOM = 1024
"""Tokens that a conversation's cache has room for at first; it is doubled when it is full, so that programs are few."""


@dataclass
class _Read:
    """What a cache holds."""

    text: str
    state: State


class Conversation:
    """Turns of a user and of the model, by the tokenizer's template."""

    def __init__(
        self,
        model: HybridLM,
        tokenizer: Tokenizer,
        template: Template,
        options: Options | None = None,
        system: str | None = None,
    ):
        """options.max_new_tokens: of each answer; options.stop: beside what ends a turn. ConfigError for a model that
        cannot write."""
        options = Options() if options is None else options
        check_tokens(model, tokenizer, [np.zeros(1, np.int32)])
        self._model, self._tokenizer, self._template, self._options = model, tokenizer, template, options
        self._stop_ids, stop = template.stops(tokenizer)
        self._stop = (*options.stop, *stop)
        self._how = options.sampling(self._stop_ids)
        self._writer = Writer(model, options.prefill_chunk, options.cache)
        words = ((word, tokenizer.encode_template(word)[0]) for word in template.special)
        self._words = {int(ids[0]): word for word, ids in words if len(ids) == 1}
        self._system, self._drawn = system, 0
        self.messages: list[dict] = []
        """The turns so far, {"role": ..., "content": ...} each."""
        self.speed = Speed()
        """What the last answer took: how many tokens it read, too."""
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system's."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._answered: _Read | None = None
        self._asked: _Read | None = None

    def ask(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Pieces of the answer to a user's turn, as they come. It ends where the model ends its turn, after
        max_new_tokens, or after the token that is written when `stopped`; both turns are then part of the conversation.

        ConfigError, with the conversation as it was, where the template refuses the turn or memory cannot hold it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        rendered = self._template.spans(asked, add_generation_prompt=True, answers=False)
        state, tokens = self._begun(rendered)
        self.speed = Speed(prompt_tokens=len(tokens))
        state = self._writer.read(state, tokens[None], np.array([len(tokens)]))
        self._asked, self._answered = _Read(rendered.text, state.copy()), None
        self.messages = asked
        stream = TextStream(self._tokenizer, self._stop, self._stop_ids)
        try:
            while stream.reason is None and len(stream.ids) < self._options.max_new_tokens and not stopped():
                new_BN, state = self._writer.write(state, 1, self._how)
                piece = stream.push(np.asarray(new_BN)[0].tolist())
                self.speed.wrote(1)
                if piece:
                    yield piece
            rest = stream.end()
        finally:  # whoever asked may have gone, in the middle of a step, too
            self._drawn = state.drawn
            read = _Read(rendered.text + self._spelled(stream.ids), state)
            self._answer(stream, read if state.is_whole else None)
        if rest:
            yield rest

    def _begun(self, rendered: Rendered) -> tuple[State, np.ndarray]:
        """The state that holds the start of the conversation, and the int32 tokens that are to be read behind it."""
        text, tokenizer = rendered.text, self._tokenizer
        known = [read for read in (self._answered, self._asked) if read is not None and text.startswith(read.text)]
        start = len(known[0].text) if known else 0
        ids = tokenizer.encode_template(text[start:], [i - start for i in rendered.spelled if i >= start])[0]
        if not known and self._template.adds_bos and tokenizer.bos_id is not None:
            ids = np.concatenate([[tokenizer.bos_id], ids]).astype(np.int32)
        require(len(ids) > 0, "the chat template gives no text to read")
        check_tokens(self._model, tokenizer, [ids])
        n = (known[0].state.length if known else 0) + len(ids)
        check_room(self._model, 1, n, self._options.max_new_tokens, types=self._options.cache)
        wanted = n + self._options.max_new_tokens
        if not known:
            state = self._writer.start(1, max(LEAST_ROOM, 1 << (wanted - 1).bit_length()))
        elif known[0] is self._answered:
            state, self._answered = known[0].state, None
        else:
            state = known[0].state.copy()
        if wanted > state.room:
            state = self._writer.with_room(state, max(2 * state.room, wanted))
        return state.continued(self._drawn), ids

    def _answer(self, stream: TextStream, read: _Read | None) -> None:
        """Adds the answer to the conversation: such that the template, where it can, gives the text that was read."""
        answer = stream.text
        candidates = dict.fromkeys((answer, answer.removeprefix(" "), answer.strip()))
        turns = [[*self.messages, {"role": "assistant", "content": content}] for content in candidates]
        asked = "" if self._asked is None else self._asked.text
        fits = (turn for turn in turns if self._text(turn).startswith(asked + answer))
        self.messages, self._answered = next(fits, turns[0]), read

    def _text(self, messages: list[dict]) -> str:
        """The conversation; "" where the template refuses it."""
        try:
            return self._template.render(messages)
        except ConfigError:
            return ""

    def _spelled(self, ids: list[int]) -> str:
        """The text of tokens, the one that ended the turn spelled out."""
        if ids and ids[-1] in self._stop_ids:
            return self._tokenizer.decode(ids[:-1]) + self._words.get(ids[-1], "\ufdd0")  # which no text has
        return self._tokenizer.decode(ids)
