# SPDX-License-Identifier: Apache-2.0
"""Text of tokens that come one by one: nothing is given before it is sure, nothing behind a stop string at all."""

from collections.abc import Iterable, Sequence

from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import require

_UNSURE = 3
"""Characters that bytes to come can still change: those of UTF-8's longest character but for the last."""
_WINDOW = 64
"""Tokens that are decoded anew for each that comes."""
_BEFORE = 8
"""Tokens that stay in front of a new window: some tokenizers write a token otherwise at the start of a text."""


class TextStream:
    """The text of one row's tokens.

    It ends with a token of `stop_ids`, which is no part of it, or in front of the first of the stop strings, wherever
    tokens begin and end; the earliest where one token completes several.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), stop_ids: Iterable[int] = ()):
        """ConfigError for an empty stop string."""
        require(all(stop), "stop ('') must not be empty: every text holds it")
        self.tokenizer, self.stop, self.stop_ids = tokenizer, tuple(stop), frozenset(stop_ids)
        self.ids: list[int] = []
        """The tokens so far, with the one that ended the text."""
        self.reason: str | None = None
        """What ended the text: "eos", "stop", or "length" by `end`; None: it goes on."""
        self._sure, self._given = "", 0  # text that no token changes any more, of which so much was given
        self._first, self._decoded = 0, 0  # the window's first token, and how much of its text is in _sure
        self._searched = 0

    @property
    def text(self) -> str:
        """What was given so far."""
        return self._sure[: self._given]

    def push(self, ids: Iterable[int]) -> str:
        """What is sure now of the text and was not before; "" once it has ended."""
        for i in ids:
            if self.reason is not None:
                break
            self.ids.append(int(i))
            if int(i) in self.stop_ids:
                return self._finish("eos")
            self._decode(_UNSURE)
            self._find_stop()
        return self._give(held=True)

    def end(self) -> str:
        """The rest: no token comes any more."""
        return self._finish("length") if self.reason is None else ""

    def _finish(self, reason: str) -> str:
        self._decode(0)
        self._find_stop()
        self.reason = self.reason or reason
        return self._give(held=False)

    def _decode(self, unsure: int) -> None:
        """Adds to the sure text what the window's tokens say beyond it, but for a character that is not whole."""
        ids = self.ids[self._first :]
        if ids and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids)
        open_ = len(text) - len(text.rstrip("\ufffd"))
        stop = len(text) - min(open_, unsure)
        if stop > self._decoded:
            self._sure += text[self._decoded : stop]
            self._decoded = stop
        if len(ids) > _WINDOW and not open_:
            self._move(text)

    def _move(self, text: str) -> None:
        """Begins a new window, where the tokens before do not change how its own are written."""
        first = len(self.ids) - _BEFORE
        before = self.tokenizer.decode(self.ids[first:])
        if before and "\ufffd" not in before and text.endswith(before):
            self._first, self._decoded = first, len(before)

    def _find_stop(self) -> None:
        """Cuts the text in front of a stop string."""
        longest = max(map(len, self.stop), default=0)
        start = max(0, self._searched - longest + 1)
        found = [at for at in (self._sure.find(word, start) for word in self.stop) if at >= 0]
        self._searched = len(self._sure)
        if found and self.reason is None:
            self._sure, self.reason = self._sure[: min(found)], "stop"

    def _give(self, held: bool) -> str:
        """Text that was not given; held: without an end that may be the start of a stop string."""
        stop = len(self._sure)
        if held and self.reason is None:
            starts = (self._start_of(word) for word in self.stop)
            stop = min([stop, *starts])
        given, self._given = self._sure[self._given : stop], max(self._given, stop)
        return given

    def _start_of(self, word: str) -> int:
        """Where at the text's end the stop string may begin."""
        for n in range(min(len(word) - 1, len(self._sure)), 0, -1):
            if self._sure.endswith(word[:n]):
                return len(self._sure) - n
        return len(self._sure)
